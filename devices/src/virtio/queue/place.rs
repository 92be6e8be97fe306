//! Where a queue lies.

use arch::addr::Gpa;
use arch::mem::SharedMem;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::RingError;
use super::walk::DESCRIPTOR_BYTES;

/// Where a driver wants a queue to be; not checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub table: u64,
    /// Address of the available ring, the driver's area.
    pub driver: u64,
    /// Address of the used ring, the device's area.
    pub device: u64,
}

impl Placement {
    /// A queue here, of at most `max` descriptors.
    ///
    /// # Errors
    /// Size or alignment breaks a rule, or a part is not in shared memory.
    pub fn check(&self, max: u16, mem: &SharedMem) -> Result<Queue, RingError> {
        let mut queue = Queue::new(max).map_err(RingError::Ring)?;
        queue.try_set_size(self.size).map_err(RingError::Ring)?;
        let place = |at| GuestAddress(at);
        queue
            .try_set_desc_table_address(place(self.table))
            .and_then(|()| queue.try_set_avail_ring_address(place(self.driver)))
            .and_then(|()| queue.try_set_used_ring_address(place(self.device)))
            .map_err(RingError::Ring)?;
        let size = u64::from(self.size);
        // Each ring has four bytes before its entries and two behind.
        let parts = [
            (
                "descriptor table",
                self.table,
                size.saturating_mul(DESCRIPTOR_BYTES),
            ),
            (
                "available ring",
                self.driver,
                size.saturating_mul(2).saturating_add(6),
            ),
            ("used ring", self.device, size.saturating_mul(8).saturating_add(6)),
        ];
        for (part, start, bytes) in parts {
            if !mem.all_shared(Gpa(start), bytes) {
                return Err(RingError::Outside { part, start, bytes });
            }
        }
        queue.set_ready(true);
        Ok(queue)
    }
}
