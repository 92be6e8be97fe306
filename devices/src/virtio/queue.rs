//! A virtqueue as a device uses it: every chain is walked once, into an owned and checked snapshot. Whatever
//! the guest writes to its descriptors afterwards is never looked at.
//!
//! `virtio-queue` reads the rings; it ends a bad chain silently, accepts indirect tables that were not
//! negotiated, and walks again for each reader. This layer closes that.

mod chain;
mod place;
#[cfg(test)]
mod tests;
mod used;
mod walk;

use std::sync::atomic::Ordering;

use arch::mem::SharedMem;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::device::feature;
pub use chain::{Chain, ChainIo, Segment};
pub use place::Placement;
use walk::Walk;

/// Longest chain, in descriptors, whatever the queue size. Linux' largest block request has 128 + 2.
pub const MAX_CHAIN: usize = 1024;
/// Most bytes that one chain may describe.
pub const MAX_CHAIN_BYTES: u64 = 1 << 30;

/// Raises the interrupt of one queue. Implemented by the transport and by tests.
pub trait QueueIrq: Send + std::fmt::Debug {
    /// Signals "used buffers are ready".
    fn notify(&self);
}

/// The guest broke the ring itself; the transport sets `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {queue} is unusable")]
pub struct QueueBroken {
    /// Index of the queue.
    pub queue: u16,
    /// What the guest did.
    #[source]
    pub source: RingError,
}

/// A rule of the ring that the guest broke (virtio 1.2, "Split Virtqueues").
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Rings outside shared memory, or indices that make no sense.
    #[error("ring is malformed or not in shared memory")]
    Ring(#[source] Error),
    /// A part of the queue that the driver put outside shared memory.
    #[error("{part} at {start:#x}+{bytes:#x} is not in shared memory")]
    Outside {
        /// Which part.
        part: &'static str,
        /// Guest-physical address.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// The chain starts at a descriptor that does not exist.
    #[error("available ring names descriptor {head}, the table has {size}")]
    Head {
        /// Descriptor index.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A chain that was made available again before the device was done with it.
    #[error("descriptor chain {head} is available twice")]
    Twice {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A descriptor continues at one that does not exist.
    #[error("descriptor chain {head} continues at {next}, the table has {size}")]
    Next {
        /// First descriptor of the chain.
        head: u16,
        /// The bad index.
        next: u16,
        /// Size of the table.
        size: usize,
    },
    /// A chain longer than its table, which includes every loop.
    #[error("descriptor chain {head} does not end")]
    Endless {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer that is not shared RAM: a hole, a device, private, or wrapping around.
    #[error("descriptor chain {head} points at {start:#x}+{bytes:#x}, which is not shared memory")]
    NotShared {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical address.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// A buffer without bytes.
    #[error("descriptor chain {head} has an empty buffer")]
    Empty {
        /// First descriptor of the chain.
        head: u16,
    },
    /// More bytes than [`MAX_CHAIN_BYTES`].
    #[error("descriptor chain {head} describes too many bytes")]
    TooLong {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table that is not allowed there or malformed.
    #[error("descriptor chain {head} has a bad indirect table")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A device-readable buffer after a device-writable one.
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The device needs a buffer that the chain does not have.
    #[error("descriptor chain {head} lacks a buffer that the device type demands")]
    Shape {
        /// First descriptor of the chain.
        head: u16,
    },
}

/// A ready queue of a running device.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    indirect: bool,
    irq: Box<dyn QueueIrq>,
    in_flight: InFlight,
    /// Available index as it was last read. Chains up to it are taken without another look, so that a guest which
    /// moves it to and fro cannot keep a device looking that finds nothing.
    available: u16,
    /// Used index at the last [`notify`](Self::notify).
    announced: u16,
}

impl VirtQueue {
    /// Takes over queue `index`, already checked to lie in shared memory.
    pub fn new(index: u16, mut queue: Queue, features: u64, irq: Box<dyn QueueIrq>) -> Self {
        queue.set_event_idx(features & feature::EVENT_IDX != 0);
        Self {
            index,
            available: queue.next_avail(),
            announced: queue.next_used(),
            queue,
            indirect: features & feature::INDIRECT_DESC != 0,
            irq,
            in_flight: InFlight::default(),
        }
    }

    /// Number of the queue within its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Size that the driver chose.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains popped and not pushed yet.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.count
    }

    /// The next available chain, if any.
    ///
    /// # Errors
    /// The guest broke a rule; the queue must not be used any more.
    pub fn pop(&mut self, mem: &SharedMem) -> Result<Option<Chain>, QueueBroken> {
        self.try_pop(mem).map_err(|source| QueueBroken {
            queue: self.index,
            source,
        })
    }

    fn try_pop(&mut self, mem: &SharedMem) -> Result<Option<Chain>, RingError> {
        let Some(head) = self.next_head(mem).map_err(RingError::Ring)? else {
            return Ok(None);
        };
        let size = self.queue.size();
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        let walk = Walk::new(mem, head, self.indirect);
        let chain = walk.run(self.queue.desc_table(), usize::from(size))?;
        if !self.in_flight.insert(head) {
            return Err(RingError::Twice { head });
        }
        self.queue.set_next_avail(self.queue.next_avail().wrapping_add(1));
        Ok(Some(chain))
    }

    /// The entry of the available ring that is next. Not left to `virtio-queue`, which takes an entry that it
    /// cannot read for the end of the ring.
    fn next_head(&mut self, mem: &SharedMem) -> Result<Option<u16>, Error> {
        let next = self.queue.next_avail();
        if self.available == next {
            self.look(mem)?;
        }
        if self.available == next {
            return Ok(None);
        }
        let slot = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
        let at = slot.saturating_mul(2).saturating_add(4);
        let at = self.queue.avail_ring().checked_add(at);
        let head: u16 = mem
            .load(GuestAddress(at.ok_or(Error::AddressOverflow)?), Ordering::Relaxed)
            .map_err(Error::GuestMemory)?;
        Ok(Some(u16::from_le(head)))
    }

    /// Reads the available index.
    fn look(&mut self, mem: &SharedMem) -> Result<(), Error> {
        let available = self.queue.avail_idx(mem, Ordering::Acquire)?.0;
        if available.wrapping_sub(self.queue.next_avail()) > self.queue.size() {
            return Err(Error::InvalidAvailRingIndex);
        }
        self.available = available;
        Ok(())
    }

    /// Forgets the last popped chain, so that the next pop finds it again. Only right after a pop.
    pub fn unpop(&mut self) {
        if let Some(head) = self.in_flight.last.take() {
            self.in_flight.remove(head);
            self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
            self.available = self.queue.next_avail();
        }
    }

    /// Asks the driver for kicks again; true if chains arrived meanwhile, so that one must look once more.
    ///
    /// # Errors
    /// The rings are no longer in shared memory.
    pub fn enable_kicks(&mut self, mem: &SharedMem) -> Result<bool, QueueBroken> {
        let news = self.queue.enable_notification(mem).map_err(|e| self.broken(e))?;
        if news {
            self.look(mem).map_err(|e| self.broken(e))?;
        }
        Ok(self.available != self.queue.next_avail())
    }

    /// Tells the driver that kicks are not needed for now.
    ///
    /// # Errors
    /// The rings are no longer in shared memory.
    pub fn disable_kicks(&mut self, mem: &SharedMem) -> Result<(), QueueBroken> {
        self.queue.disable_notification(mem).map_err(|e| self.broken(e))
    }

    fn broken(&self, error: Error) -> QueueBroken {
        QueueBroken {
            queue: self.index,
            source: RingError::Ring(error),
        }
    }
}

/// Heads of the chains that were given to the device and not pushed back yet.
#[derive(Debug, Default)]
struct InFlight {
    /// A bit for each descriptor up to the highest head so far.
    bits: Vec<u64>,
    count: u16,
    last: Option<u16>,
}

impl InFlight {
    /// False if it is in flight already.
    fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = Self::place(head);
        if self.bits.len() <= word {
            self.bits.resize(word.saturating_add(1), 0);
        }
        let new = self.bits.get_mut(word).is_some_and(|bits| {
            let new = *bits & bit == 0;
            *bits |= bit;
            new
        });
        self.count = self.count.saturating_add(u16::from(new));
        self.last = Some(head);
        new
    }

    fn remove(&mut self, head: u16) {
        let (word, bit) = Self::place(head);
        if let Some(bits) = self.bits.get_mut(word).filter(|bits| **bits & bit != 0) {
            *bits &= !bit;
            self.count = self.count.saturating_sub(1);
        }
    }

    fn place(head: u16) -> (usize, u64) {
        (usize::from(head / 64), 1 << (head % 64))
    }
}
