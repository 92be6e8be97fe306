//! PCI: the functions behind the ECAM, and where their virtio registers are (virtio 1.2, "Virtio Over PCI Bus").

use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::{mmio_read, mmio_write};

static ECAM: AtomicU64 = AtomicU64::new(0xe000_0000);

/// Names the place of the ECAM (`ecam=`).
pub(crate) fn set_ecam(at: u64) {
    ECAM.store(at, Ordering::Relaxed);
}

/// A function of bus 0, by its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Function(pub(crate) u64);

impl Function {
    /// Every function 0 of bus 0 that is there.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let ecam = ECAM.load(Ordering::Relaxed);
        (0..32)
            .map(move |device| Self(ecam + (device << 15)))
            .filter(|function| function.word(0) != 0xffff)
    }

    /// A 16-bit register.
    pub(crate) fn word(self, at: u64) -> u16 {
        mmio_read(self.0 + at)
    }

    /// The kind of a modern or transitional virtio device; 0 for anything else.
    pub(crate) fn virtio_kind(self) -> u16 {
        match (self.word(0), self.word(2)) {
            (0x1af4, modern @ 0x1040..0x1080) => modern - 0x1040,
            (0x1af4, 0x1000..0x1040) => self.word(0x2e),
            _ => 0,
        }
    }

    /// Address of a memory BAR, after letting the function decode it and master the bus.
    pub(crate) fn bar(self, index: u64) -> u64 {
        mmio_write(self.0 + 4, self.word(4) | 0x406);
        let low: u32 = mmio_read(self.0 + 0x10 + index * 4);
        let high: u32 = if low & 6 == 4 {
            mmio_read(self.0 + 0x14 + index * 4)
        } else {
            0
        };
        u64::from(high) << 32 | u64::from(low & !15)
    }

    /// Offsets of the capabilities with this ID.
    pub(crate) fn capabilities(self, id: u8) -> impl Iterator<Item = u64> {
        let mut next = u64::from(mmio_read::<u8>(self.0 + 0x34));
        core::iter::from_fn(move || {
            let at = (next >= 0x40).then_some(next)?;
            next = u64::from(mmio_read::<u8>(self.0 + at + 1));
            Some(at)
        })
        .take(48)
        .filter(move |at| mmio_read::<u8>(self.0 + at) == id)
    }

    /// Address of the virtio structure of this type (1 common, 2 notify, 3 ISR, 4 device), and its capability.
    pub(crate) fn structure(self, wanted: u8) -> Option<(u64, u64)> {
        let at = self
            .capabilities(9)
            .find(|at| mmio_read::<u8>(self.0 + at + 3) == wanted)?;
        let bar = self.bar(u64::from(mmio_read::<u8>(self.0 + at + 4)));
        Some((bar + u64::from(mmio_read::<u32>(self.0 + at + 8)), at))
    }
}
