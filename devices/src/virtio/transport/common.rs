//! The common configuration structure (virtio 1.2, "Common configuration structure layout") and the status
//! machine (virtio 1.2, "Device Initialization"), apart from everything that they set in motion.

use crate::pci::{from_le, to_le};
use crate::virtio::device::feature;
use crate::virtio::queue::Placement;

/// Bytes that the structure occupies.
pub(super) const COMMON_BYTES: u64 = 0x40;
/// "No vector", the value at reset.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;

/// Offered for every device.
const TRANSPORT_FEATURES: u64 =
    feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::INDIRECT_DESC | feature::EVENT_IDX;
/// Refused without.
const DEMANDED_FEATURES: u64 = feature::VERSION_1 | feature::ACCESS_PLATFORM;

/// What a write to the structure asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Stop what runs, then call [`Registers::reset`].
    Reset,
    /// Start the device.
    Start,
}

/// Registers of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) max: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) place: Placement,
}

/// The registers. While the device runs, and once it is broken, everything but the selectors, the status and
/// the configuration vector is frozen.
#[derive(Debug)]
pub(super) struct Registers {
    status: u8,
    offered: u64,
    accepted: u64,
    /// The driver accepted a bit that has no number in `accepted`.
    accepted_unknown: bool,
    device_window: u32,
    driver_window: u32,
    config_vector: u16,
    generation: u8,
    selected: u16,
    vectors: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    /// `vectors` is the number of MSI-X vectors; `features` are the device's own.
    pub(super) fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        let queue = |max: &u16| QueueRegisters {
            max: *max,
            vector: NO_VECTOR,
            enabled: false,
            place: Placement {
                size: *max,
                ..Placement::default()
            },
        };
        Self {
            status: 0,
            offered: features | TRANSPORT_FEATURES,
            accepted: 0,
            accepted_unknown: false,
            device_window: 0,
            driver_window: 0,
            config_vector: NO_VECTOR,
            generation: 0,
            selected: 0,
            vectors,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Everything is back at its initial value, which the driver sees from the status.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// The device cannot go on; only a reset helps.
    pub(super) fn set_broken(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// The device configuration space may have changed.
    pub(super) fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// A guest's read. Anything but a whole register, or half of one of 8 bytes, reads as ones.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(value) = self.value(offset, data.len()) {
            to_le(value, data);
        }
    }

    fn value(&self, offset: u64, len: usize) -> Option<u64> {
        let queue = self.queues.get(usize::from(self.selected));
        let place = queue.map(|q| q.place).unwrap_or_default();
        Some(match (offset, len) {
            (0x00, 4) => u64::from(self.device_window),
            (0x04, 4) => window(self.offered, self.device_window),
            (0x08, 4) => u64::from(self.driver_window),
            (0x0c, 4) => window(self.accepted, self.driver_window),
            (0x10, 2) => u64::from(self.config_vector),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.status),
            (0x15, 1) => u64::from(self.generation),
            (0x16, 2) => u64::from(self.selected),
            (0x18, 2) => u64::from(place.size),
            (0x1a, 2) => u64::from(queue.map_or(NO_VECTOR, |q| q.vector)),
            (0x1c, 2) => u64::from(queue.is_some_and(|q| q.enabled)),
            // The multiplier is 4, so each queue has its own notification address. A queue that does not
            // exist must not lead a driver to one.
            (0x1e, 2) => queue.map_or(0, |_| u64::from(self.selected)),
            (0x20, 4 | 8) => place.table,
            (0x24, 4) => place.table >> 32,
            (0x28, 4 | 8) => place.driver,
            (0x2c, 4) => place.driver >> 32,
            (0x30, 4 | 8) => place.device,
            (0x34, 4) => place.device >> 32,
            // Notification data and queue reset are not offered.
            (0x38 | 0x3a, 2) => 0,
            _ => return None,
        })
    }

    /// A guest's write. Anything but a whole register, or half of one of 8 bytes, is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        let value = from_le(data);
        let low32 = u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
        let low16 = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, data.len()) {
            (0x00, 4) => self.device_window = low32,
            (0x08, 4) => self.driver_window = low32,
            (0x0c, 4) => self.accept(low32),
            (0x10, 2) => self.config_vector = self.vector(low16),
            (0x14, 1) => return self.set_status(u8::try_from(value).unwrap_or(0)),
            (0x16, 2) => self.selected = low16,
            (0x18..0x38, _) if self.is_configurable() => self.set_queue(offset, data.len(), value),
            _ => {}
        }
        None
    }

    fn is_configurable(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == 0
    }

    fn set_queue(&mut self, offset: u64, len: usize, value: u64) {
        let low16 = u16::try_from(value & 0xffff).unwrap_or(0);
        let vector = self.vector(low16);
        let Some(queue) = self.queues.get_mut(usize::from(self.selected)) else {
            return;
        };
        match (offset, len) {
            (0x18, 2) => queue.place.size = low16,
            (0x1a, 2) => queue.vector = vector,
            // A queue cannot be disabled but by a reset.
            (0x1c, 2) => queue.enabled |= value == 1,
            (0x20 | 0x24, 4 | 8) => set_address(&mut queue.place.table, offset, len, value),
            (0x28 | 0x2c, 4 | 8) => set_address(&mut queue.place.driver, offset, len, value),
            (0x30 | 0x34, 4 | 8) => set_address(&mut queue.place.device, offset, len, value),
            _ => {}
        }
    }

    /// What a vector register reads after `wanted` was written to it.
    fn vector(&self, wanted: u16) -> u16 {
        if wanted < self.vectors { wanted } else { NO_VECTOR }
    }

    fn accept(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 || !self.is_configurable() {
            return;
        }
        let value = u64::from(value);
        match self.driver_window {
            0 => self.accepted = (self.accepted & !u64::from(u32::MAX)) | value,
            1 => self.accepted = (self.accepted & u64::from(u32::MAX)) | (value << 32),
            _ => self.accepted_unknown |= value != 0,
        }
    }

    fn set_status(&mut self, value: u8) -> Option<Request> {
        if value == 0 {
            return Some(Request::Reset);
        }
        // Bits are added one after the other and taken away only by a reset.
        let own = self.status & !NEEDS_RESET;
        if value & own != own {
            return None;
        }
        self.status |= value & FAILED;
        if !self.is_configurable() {
            return None;
        }
        self.status |= value & (ACKNOWLEDGE | DRIVER);
        if self.status & FEATURES_OK != 0 {
            self.status |= value & DRIVER_OK;
            return (value & DRIVER_OK != 0).then_some(Request::Start);
        }
        let begun = self.status & (ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER;
        if begun && self.features_agree() {
            self.status |= value & FEATURES_OK;
        }
        None
    }

    fn features_agree(&self) -> bool {
        self.accepted & !self.offered == 0
            && self.accepted & DEMANDED_FEATURES == DEMANDED_FEATURES
            && !self.accepted_unknown
    }
}

fn window(features: u64, window: u32) -> u64 {
    match window {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    }
}

/// Writes all of an address register, or one half of it.
fn set_address(address: &mut u64, offset: u64, len: usize, value: u64) {
    let low = u64::from(u32::MAX);
    match (offset & 4, len) {
        (0, 8) => *address = value,
        (0, 4) => *address = (*address & !low) | value,
        (4, 4) => *address = (*address & low) | (value << 32),
        _ => {}
    }
}
