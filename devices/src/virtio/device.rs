//! What a transport needs from a device, and what a running device gets.

use std::io;
use std::os::fd::BorrowedFd;

use arch::mem::SharedMem;

use super::queue::{QueueBroken, VirtQueue};

/// Feature bits that every transport offers for every device (virtio 1.2, "Reserved Feature Bits").
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`; a driver that does not accept it is refused.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_ACCESS_PLATFORM`; a driver that does not accept it is refused.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
}

/// Everything a device owns while its driver is running.
#[derive(Debug)]
pub struct Activation {
    /// Shared guest memory; there is no other kind in this crate.
    pub mem: SharedMem,
    /// Queues that the driver enabled, by queue index; `None` where it left one disabled.
    pub queues: Vec<Option<VirtQueue>>,
    /// Feature bits both sides agreed on.
    pub features: u64,
}

/// A device before its driver set `DRIVER_OK`. Negotiation is the transport's work.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section "Device Types").
    fn id(&self) -> u32;
    /// Device-specific feature bits; the transport adds those in [`feature`].
    fn features(&self) -> u64;
    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// Fills `data` from the device configuration space; bytes past its end stay as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Takes a driver's write to the device configuration space. Most devices have no writable field.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// A descriptor that turns readable when the running device should look at its backend. It is the same
    /// for the whole life of the device; one that watches several sources returns an epoll descriptor.
    fn backend(&self) -> Option<BorrowedFd<'_>>;
    /// Starts the device. Everything that can only happen while running is on the result.
    ///
    /// # Errors
    /// The backend is gone; the transport sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>>;
}

/// A device whose driver is up. A reset is [`stop`](Self::stop) until that is true, then the drop.
///
/// The transport calls `on_kick` and `on_backend` under one [`SharedMem::batch`] guard, so work must be bounded; a
/// device that has more to do returns with its backend descriptor readable.
pub trait Running: Send {
    /// The driver kicked `queue`.
    ///
    /// # Errors
    /// The guest broke the ring; the transport stops the device and sets `DEVICE_NEEDS_RESET`.
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken>;
    /// The backend descriptor is readable.
    ///
    /// # Errors
    /// As for [`on_kick`](Self::on_kick).
    fn on_backend(&mut self) -> Result<(), QueueBroken>;
    /// Begins nothing any more and leaves the rings alone. True once nothing that was begun can touch guest memory any
    /// more; until then the backend descriptor turns readable when it is worth asking again. Never waits.
    fn stop(&mut self) -> bool {
        true
    }
}
