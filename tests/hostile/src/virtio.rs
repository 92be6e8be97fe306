//! The driver's side of virtio-pci with split rings, without any of a driver's good manners: every value can be
//! written anywhere.

use crate::machine::{ARENA, load, mmio_read, mmio_write, store, ticks};
use crate::pci::Function;

/// Kinds of devices (virtio 1.2, "Device Types").
pub(crate) const NET: u16 = 1;
/// Block device.
pub(crate) const BLOCK: u16 = 2;
/// Console.
pub(crate) const CONSOLE: u16 = 3;
/// Entropy source.
pub(crate) const RNG: u16 = 4;
/// Socket device.
pub(crate) const VSOCK: u16 = 19;

/// Status bits.
pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Feature bits.
pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Registers of the common structure.
pub(crate) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(crate) const DEVICE_FEATURE: u64 = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(crate) const DRIVER_FEATURE: u64 = 12;
    pub(crate) const STATUS: u64 = 20;
    pub(crate) const QUEUE_SELECT: u64 = 22;
    pub(crate) const QUEUE_SIZE: u64 = 24;
    pub(crate) const QUEUE_VECTOR: u64 = 26;
    pub(crate) const QUEUE_ENABLE: u64 = 28;
    pub(crate) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(crate) const QUEUE_DESC: u64 = 32;
    pub(crate) const QUEUE_DRIVER: u64 = 40;
    pub(crate) const QUEUE_DEVICE: u64 = 48;
    /// Length that every device has.
    pub(crate) const LEN: u64 = 56;
}

/// Entries of every ring that the cases use.
pub(crate) const SIZE: u16 = 16;
/// A second of a time stamp counter of at least 1 GHz, or a fraction of one that is faster; twice.
pub(crate) const PATIENCE: u64 = 2_000_000_000;

/// Where a queue's three parts lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

impl Ring {
    /// Three pages in a row.
    pub(crate) const fn at(gpa: u64) -> Self {
        Self {
            desc: gpa,
            avail: gpa.wrapping_add(0x1000),
            used: gpa.wrapping_add(0x2000),
        }
    }

    /// Zeroes the ring.
    pub(crate) fn clear(self) {
        for at in (0..0x1000).step_by(8) {
            for part in [self.desc, self.avail, self.used] {
                store(part + at, 0_u64);
            }
        }
    }

    /// Writes a descriptor.
    pub(crate) fn descriptor(self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        descriptor(self.desc, index, address, len, flags, next);
    }

    /// Makes heads available.
    pub(crate) fn offer(self, heads: &[u16]) {
        let mut index = self.available();
        for head in heads {
            store(self.avail + 4 + u64::from(index % SIZE) * 2, *head);
            index = index.wrapping_add(1);
        }
        store(self.avail + 2, index);
    }

    /// The driver's index.
    pub(crate) fn available(self) -> u16 {
        load(self.avail + 2)
    }

    /// The device's index.
    pub(crate) fn used_index(self) -> u16 {
        load(self.used + 2)
    }

    /// The used element before the device's index: id and length.
    pub(crate) fn last_used(self) -> (u32, u32) {
        let at = self.used + 4 + u64::from(self.used_index().wrapping_sub(1) % SIZE) * 8;
        (load(at), load(at + 4))
    }
}

/// Where rings lie that stay empty.
const IDLE: Ring = Ring::at(ARENA + 0x1e_0000);

/// Writes a descriptor into any table.
pub(crate) fn descriptor(table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
    let at = table + u64::from(index) * 16;
    store(at, address);
    store(at + 8, len);
    store(at + 12, flags);
    store(at + 14, next);
}

/// What a device did about something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// It returned the chain; the length it says it wrote.
    Used(u32),
    /// It says that it needs a reset.
    NeedsReset,
    /// Nothing, for [`PATIENCE`].
    Silence,
}

/// A virtio function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    pub(crate) function: Function,
    /// Queues without which the device does not start, apart from the one under attack.
    companions: &'static [u16],
    pub(crate) common: u64,
    pub(crate) notify: u64,
    multiplier: u64,
    pub(crate) isr: u64,
    pub(crate) specific: u64,
}

impl Device {
    /// The `nth` device of a kind.
    pub(crate) fn find(kind: u16, nth: usize) -> Option<Self> {
        let function = Function::all()
            .filter(|function| function.virtio_kind() == kind)
            .nth(nth)?;
        let (notify, capability) = function.structure(2)?;
        Some(Self {
            function,
            companions: if kind == VSOCK { &[0, 2] } else { &[] },
            common: function.structure(1)?.0,
            notify,
            multiplier: mmio_read::<u32>(function.0 + capability + 16).into(),
            isr: function.structure(3)?.0,
            specific: function.structure(4).map_or(0, |(at, _)| at),
        })
    }

    /// The status register.
    pub(crate) fn status(&self) -> u8 {
        mmio_read(self.common + common::STATUS)
    }

    /// Writes the status register.
    pub(crate) fn set_status(&self, status: u8) {
        mmio_write(self.common + common::STATUS, status);
    }

    /// Resets; false if the device has not done it within [`PATIENCE`].
    pub(crate) fn reset(&self) -> bool {
        self.set_status(0);
        let began = ticks();
        while self.status() != 0 {
            if ticks() - began > PATIENCE {
                return false;
            }
        }
        true
    }

    /// What the device offers.
    pub(crate) fn offered(&self) -> u64 {
        let half = |index: u32| {
            mmio_write(self.common + common::DEVICE_FEATURE_SELECT, index);
            u64::from(mmio_read::<u32>(self.common + common::DEVICE_FEATURE))
        };
        half(1) << 32 | half(0)
    }

    /// Writes the driver's features.
    pub(crate) fn accept(&self, features: u64) {
        for (index, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            mmio_write(self.common + common::DRIVER_FEATURE_SELECT, index);
            mmio_write(self.common + common::DRIVER_FEATURE, half);
        }
    }

    /// Resets and negotiates; true if the device takes the features.
    pub(crate) fn negotiate(&self, wanted: u64) -> bool {
        let reset = self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(self.offered() & (wanted | F_VERSION_1 | F_ACCESS_PLATFORM));
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        reset && self.status() & FEATURES_OK != 0
    }

    /// Selects a queue.
    pub(crate) fn select(&self, queue: u16) {
        mmio_write(self.common + common::QUEUE_SELECT, queue);
    }

    /// Writes all registers of a queue and enables it.
    pub(crate) fn set_queue(&self, queue: u16, size: u16, ring: Ring) {
        self.select(queue);
        mmio_write(self.common + common::QUEUE_SIZE, size);
        mmio_write(self.common + common::QUEUE_VECTOR, 0xffff_u16);
        self.set_addresses(ring);
        mmio_write(self.common + common::QUEUE_ENABLE, 1_u16);
    }

    /// Writes the addresses of the selected queue.
    pub(crate) fn set_addresses(&self, ring: Ring) {
        let parts = [
            (common::QUEUE_DESC, ring.desc),
            (common::QUEUE_DRIVER, ring.avail),
            (common::QUEUE_DEVICE, ring.used),
        ];
        for (register, address) in parts {
            mmio_write(self.common + register, address as u32);
            mmio_write(self.common + register + 4, (address >> 32) as u32);
        }
    }

    /// Starts the device, with empty rings in the queues that it also needs.
    pub(crate) fn go(&self) {
        for (queue, ring) in self.companions.iter().zip([IDLE, Ring::at(IDLE.used + 0x1000)]) {
            ring.clear();
            self.set_queue(*queue, SIZE, ring);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Everything up to a running device with one cleared queue.
    pub(crate) fn start(&self, features: u64, queue: u16, ring: Ring) -> bool {
        let fine = self.negotiate(features);
        ring.clear();
        self.set_queue(queue, SIZE, ring);
        self.go();
        fine
    }

    /// Tells the device that a queue has something.
    pub(crate) fn kick(&self, queue: u16) {
        self.select(queue);
        let offset: u16 = mmio_read(self.common + common::QUEUE_NOTIFY_OFF);
        mmio_write(self.notify + u64::from(offset) * self.multiplier, queue);
    }

    /// Waits until the device has used up to `index`, complains, or does nothing.
    pub(crate) fn wait(&self, ring: Ring, index: u16) -> Reaction {
        self.wait_for(ring, index, PATIENCE)
    }

    /// [`wait`](Self::wait) with another patience.
    pub(crate) fn wait_for(&self, ring: Ring, index: u16, patience: u64) -> Reaction {
        let began = ticks();
        loop {
            if ring.used_index() == index {
                return Reaction::Used(ring.last_used().1);
            }
            if self.status() & NEEDS_RESET != 0 {
                return Reaction::NeedsReset;
            }
            if ticks() - began > patience {
                return Reaction::Silence;
            }
        }
    }
}
