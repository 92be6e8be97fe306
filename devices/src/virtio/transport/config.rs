//! The PCI face of a virtio device: where its structures lie in the BAR, and the capabilities that say so
//! (virtio 1.2, "Virtio Structure PCI Capabilities").

use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::root::Slot;

use super::common::COMMON_BYTES;

/// Parts of the BAR, each on a page of its own.
const PART_BYTES: u64 = 0x1000;
const COMMON_PART: u64 = 0;
const NOTIFY_PART: u64 = 0x1000;
const ISR_PART: u64 = 0x2000;
const DEVICE_PART: u64 = 0x3000;
const VECTORS_PART: u64 = 0x4000;
const PENDING_PART: u64 = 0x5000;
/// Distance of two queues' notification addresses (`notify_off_multiplier`).
pub(super) const NOTIFY_BYTES: u64 = 4;

const VENDOR: u16 = 0x1af4;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const MSIX_CONTROL_ENABLE: u64 = 1 << 15;
const MSIX_CONTROL_MASK: u64 = 1 << 14;

/// What lies at an offset of the BAR, with the offset inside that part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Common(u64),
    Notify(u64),
    Isr(u64),
    Device(u64),
    Vectors(u64),
    Pending(u64),
    Nothing,
}

impl Part {
    /// Decodes an access of `len` bytes. One that is not aligned to its own size decodes to nothing, so none
    /// crosses a part.
    pub(super) fn at(offset: u64, len: usize) -> Self {
        if !matches!(len, 1 | 2 | 4 | 8) || !offset.is_multiple_of(len as u64) {
            return Self::Nothing;
        }
        let inside = offset % PART_BYTES;
        match offset.saturating_sub(inside) {
            COMMON_PART => Self::Common(inside),
            NOTIFY_PART => Self::Notify(inside),
            ISR_PART => Self::Isr(inside),
            DEVICE_PART => Self::Device(inside),
            VECTORS_PART => Self::Vectors(inside),
            PENDING_PART => Self::Pending(inside),
            _ => Self::Nothing,
        }
    }

    /// Offset of the notification address of `queue` in the BAR.
    pub(super) fn notify_offset(queue: usize) -> u64 {
        (queue as u64)
            .saturating_mul(NOTIFY_BYTES)
            .saturating_add(NOTIFY_PART)
    }
}

/// The function's configuration space with the capabilities' places.
#[derive(Debug)]
pub(super) struct Face {
    pub(super) space: ConfigSpace,
    /// Offset of the capability "PCI configuration access".
    access: usize,
    /// Offset of the MSI-X capability.
    msix: usize,
}

/// A read or write of the BAR through configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) offset: u64,
    pub(super) len: usize,
}

impl Face {
    /// For a device of type `id` with that many queues and vectors.
    pub(super) fn new(id: u32, queues: u64, vectors: u16, slot: &Slot) -> Self {
        let low = u16::try_from(id & 0x3f).unwrap_or(0);
        let identity = Identity {
            vendor: VENDOR,
            device: 0x1040_u16.saturating_add(low),
            class: class(id),
            revision: 1,
            subsystem: 0x40_u16.saturating_add(low),
        };
        let mut space = ConfigSpace::new(identity, Some(slot.bar));
        let notify = queues.saturating_mul(NOTIFY_BYTES);
        add_structure(&mut space, COMMON_CFG, COMMON_PART, COMMON_BYTES, None);
        add_structure(&mut space, NOTIFY_CFG, NOTIFY_PART, notify, Some(NOTIFY_BYTES));
        add_structure(&mut space, ISR_CFG, ISR_PART, 1, None);
        add_structure(&mut space, DEVICE_CFG, DEVICE_PART, PART_BYTES, None);
        let access = add_structure(&mut space, PCI_CFG, 0, 0, Some(0));
        // Bar, offset, length and data of the access window are the driver's.
        space.allow(access.saturating_add(4), &[0xff]);
        space.allow(access.saturating_add(8), &[0xff; 12]);
        let msix = space.add_capability(CAPABILITY_MSIX, &[0; 10]);
        space.put(msix.saturating_add(2), &vectors.saturating_sub(1).to_le_bytes());
        space.allow(msix.saturating_add(3), &[0xc0]);
        space.put(msix.saturating_add(4), &low32(VECTORS_PART));
        space.put(msix.saturating_add(8), &low32(PENDING_PART));
        Self { space, access, msix }
    }

    /// The enable and function mask bits of MSI-X.
    pub(super) fn msix_control(&self) -> (bool, bool) {
        let control = self.space.get(self.msix.saturating_add(2), 2);
        (
            control & MSIX_CONTROL_ENABLE != 0,
            control & MSIX_CONTROL_MASK != 0,
        )
    }

    /// The access to the BAR that an access to configuration register `at` stands for, if that is the data
    /// field of the access window and the window is one that the driver may set.
    pub(super) fn window(&self, at: usize) -> Option<Window> {
        let field = |offset: usize, len| self.space.get(self.access.saturating_add(offset), len);
        let len = usize::try_from(field(12, 4)).ok()?;
        let offset = field(8, 4);
        let good = field(4, 1) == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64);
        (at == self.access.saturating_add(16) && good).then_some(Window { offset, len })
    }
}

/// Adds a virtio structure capability; `extra` is the word that follows it for some kinds.
fn add_structure(space: &mut ConfigSpace, kind: u8, start: u64, bytes: u64, extra: Option<u64>) -> usize {
    let len: u8 = if extra.is_some() { 20 } else { 16 };
    let body = vec![0; usize::from(len).saturating_sub(2)];
    let at = space.add_capability(CAPABILITY_VENDOR, &body);
    space.put(at.saturating_add(2), &[len, kind]);
    space.put(at.saturating_add(8), &low32(start));
    space.put(at.saturating_add(12), &low32(bytes));
    if let Some(extra) = extra {
        space.put(at.saturating_add(16), &low32(extra));
    }
    at
}

fn low32(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(0).to_le_bytes()
}

/// PCI class and subclass of a virtio device type; drivers look at the device ID only.
fn class(id: u32) -> u16 {
    match id {
        1 => 0x0200,
        2 => 0x0180,
        3 => 0x0780,
        _ => 0xff00,
    }
}
