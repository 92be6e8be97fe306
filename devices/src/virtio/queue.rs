//! A virtqueue as a device uses it: every chain is walked once, into an owned and checked snapshot. Whatever
//! the guest writes to its descriptors afterwards is never looked at.
//!
//! `virtio-queue` reads the rings; it ends a bad chain silently, accepts indirect tables that were not
//! negotiated, and walks again for each reader. This layer closes that.

mod used;

use std::io::{self, Read, Write};
use std::sync::Arc;

use arch::addr::Gpa;
use arch::mem::SharedMem;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::device::feature;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const DESCRIPTOR_BYTES: u64 = 16;
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
    Ring(#[source] virtio_queue::Error),
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

/// One buffer of a chain, inside shared memory when it was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub start: Gpa,
    /// Length in bytes; never zero.
    pub bytes: u32,
}

/// An owned, checked copy of one descriptor chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// Index of the first descriptor; what [`VirtQueue::push`] wants back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the driver filled.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Buffers that the driver waits for.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes in the readable buffers.
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes in the writable buffers.
    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }

    /// Reads the readable buffers, front to back.
    pub fn reader<'a>(&'a self, mem: &'a SharedMem) -> ChainIo<'a> {
        ChainIo::new(mem, &self.readable)
    }

    /// Writes the writable buffers, front to back.
    pub fn writer<'a>(&'a self, mem: &'a SharedMem) -> ChainIo<'a> {
        ChainIo::new(mem, &self.writable)
    }

    /// The error for a chain that lacks a buffer its device type demands.
    pub fn bad_shape(&self, queue: u16) -> QueueBroken {
        QueueBroken {
            queue,
            source: RingError::Shape { head: self.head },
        }
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.bytes)).sum()
}

/// Sequential access to the buffers of one side of a chain. Copies; a page that turned private meanwhile
/// gives an I/O error.
#[derive(Debug)]
pub struct ChainIo<'a> {
    mem: &'a SharedMem,
    segments: &'a [Segment],
    /// Bytes of the first segment that are done.
    done: u32,
    moved: u64,
}

impl<'a> ChainIo<'a> {
    fn new(mem: &'a SharedMem, segments: &'a [Segment]) -> Self {
        Self {
            mem,
            segments,
            done: 0,
            moved: 0,
        }
    }

    /// Bytes moved so far.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    /// Bytes left.
    pub fn left(&self) -> u64 {
        total(self.segments).saturating_sub(u64::from(self.done))
    }

    /// Skips `bytes`, at most to the end.
    pub fn skip(&mut self, mut bytes: u64) {
        while bytes != 0
            && let Some((_, len)) = self.front()
        {
            let step = u64::from(len).min(bytes);
            self.advance(u32::try_from(step).unwrap_or(len));
            bytes = bytes.saturating_sub(step);
        }
    }

    /// The next contiguous piece that is not done yet: address and length.
    pub fn front(&self) -> Option<(Gpa, u32)> {
        let first = self.segments.first()?;
        let at = first.start.0.checked_add(u64::from(self.done))?;
        Some((Gpa(at), first.bytes.checked_sub(self.done)?))
    }

    fn advance(&mut self, bytes: u32) {
        self.moved = self.moved.saturating_add(u64::from(bytes));
        self.done = self.done.saturating_add(bytes);
        if self.segments.first().is_some_and(|s| s.bytes <= self.done) {
            self.segments = self.segments.get(1..).unwrap_or_default();
            self.done = 0;
        }
    }
}

impl Read for ChainIo<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((at, len)) = self.front() else {
            return Ok(0);
        };
        let count = buf.len().min(len as usize);
        let Some(part) = buf.get_mut(..count) else {
            return Ok(0);
        };
        self.mem
            .read_slice(part, GuestAddress(at.0))
            .map_err(io::Error::other)?;
        self.advance(u32::try_from(count).unwrap_or(len));
        Ok(count)
    }
}

impl Write for ChainIo<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some((at, len)) = self.front() else {
            return Ok(0);
        };
        let count = buf.len().min(len as usize);
        let Some(part) = buf.get(..count) else {
            return Ok(0);
        };
        self.mem
            .write_slice(part, GuestAddress(at.0))
            .map_err(io::Error::other)?;
        self.advance(u32::try_from(count).unwrap_or(len));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A ready queue of a running device.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    indirect: bool,
    irq: Box<dyn QueueIrq>,
    /// Chains given to the device and not pushed back yet; never more than the queue size.
    in_flight: u16,
    /// Used index at the last [`notify`](Self::notify).
    announced: u16,
    kick: Option<Arc<EventFd>>,
}

impl VirtQueue {
    /// Takes over queue `index`, already checked to lie in shared memory.
    pub fn new(index: u16, mut queue: Queue, features: u64, irq: Box<dyn QueueIrq>) -> Self {
        queue.set_event_idx(features & feature::EVENT_IDX != 0);
        Self {
            index,
            announced: queue.next_used(),
            queue,
            indirect: features & feature::INDIRECT_DESC != 0,
            irq,
            in_flight: 0,
            kick: None,
        }
    }

    /// Gives the queue the event of its own kicks, for [`kick_again`](Self::kick_again).
    #[must_use]
    pub fn with_kick(mut self, kick: Arc<EventFd>) -> Self {
        self.kick = Some(kick);
        self
    }

    /// Makes [`on_kick`](super::device::Running::on_kick) be called again soon, as if the driver had kicked: for a
    /// device that has more to do than one wake-up should.
    pub fn kick_again(&self) {
        if let Some(kick) = &self.kick {
            // It fails only if 2^64 - 2 kicks are waiting, which is as good as one more.
            let _ = kick.write(1);
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
        self.in_flight
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
        let size = self.queue.size();
        let table = self.queue.desc_table();
        let Some(first) = self.queue.iter(mem).map_err(RingError::Ring)?.next() else {
            return Ok(None);
        };
        let head = first.head_index();
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        // More chains in flight than descriptors: some head is in flight twice.
        if self.in_flight >= size {
            return Err(RingError::Endless { head });
        }
        let walk = Walk {
            mem,
            head,
            indirect: self.indirect,
            chain: Chain {
                head,
                readable: vec![],
                writable: vec![],
            },
        };
        let chain = walk.run(table, usize::from(size))?;
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(Some(chain))
    }

    /// Forgets the last popped chain, so that the next pop finds it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Asks the driver for kicks again; true if chains arrived meanwhile, so that one must look once more.
    ///
    /// # Errors
    /// The rings are no longer in shared memory.
    pub fn enable_kicks(&mut self, mem: &SharedMem) -> Result<bool, QueueBroken> {
        self.queue.enable_notification(mem).map_err(|e| self.broken(e))
    }

    /// Tells the driver that kicks are not needed for now.
    ///
    /// # Errors
    /// The rings are no longer in shared memory.
    pub fn disable_kicks(&mut self, mem: &SharedMem) -> Result<(), QueueBroken> {
        self.queue.disable_notification(mem).map_err(|e| self.broken(e))
    }

    fn broken(&self, error: virtio_queue::Error) -> QueueBroken {
        QueueBroken {
            queue: self.index,
            source: RingError::Ring(error),
        }
    }
}

/// One walk over one chain.
struct Walk<'a> {
    mem: &'a SharedMem,
    head: u16,
    indirect: bool,
    chain: Chain,
}

impl Walk<'_> {
    fn run(mut self, table: u64, size: usize) -> Result<Chain, RingError> {
        let head = self.head;
        let mut next = head;
        for _ in 0..size.min(MAX_CHAIN) {
            let descriptor = self.fetch(table, next)?;
            if descriptor.flags() & F_INDIRECT != 0 {
                self.follow(&descriptor)?;
                return Ok(self.chain);
            }
            self.add(&descriptor)?;
            if descriptor.flags() & F_NEXT == 0 {
                return Ok(self.chain);
            }
            next = descriptor.next();
            if usize::from(next) >= size {
                return Err(RingError::Next { head, next, size });
            }
        }
        Err(RingError::Endless { head })
    }

    /// Walks an indirect table, which must be the last descriptor of the chain and hold no further tables.
    fn follow(&mut self, to: &Descriptor) -> Result<(), RingError> {
        let bad = RingError::Indirect { head: self.head };
        let bytes = u64::from(to.len());
        let count = usize::try_from(bytes / DESCRIPTOR_BYTES).unwrap_or(usize::MAX);
        let shape = bytes.is_multiple_of(DESCRIPTOR_BYTES) && count != 0 && count <= MAX_CHAIN;
        if !self.indirect || to.flags() & (F_NEXT | F_WRITE) != 0 || !shape {
            return Err(bad);
        }
        let mut next = 0_u16;
        for _ in 0..count {
            let descriptor = self.fetch(to.addr().0, next)?;
            if descriptor.flags() & F_INDIRECT != 0 {
                return Err(bad);
            }
            self.add(&descriptor)?;
            if descriptor.flags() & F_NEXT == 0 {
                return Ok(());
            }
            next = descriptor.next();
            if usize::from(next) >= count {
                return Err(RingError::Next {
                    head: self.head,
                    next,
                    size: count,
                });
            }
        }
        Err(RingError::Endless { head: self.head })
    }

    fn fetch(&self, table: u64, index: u16) -> Result<Descriptor, RingError> {
        let not_shared = RingError::NotShared {
            head: self.head,
            start: table,
            bytes: DESCRIPTOR_BYTES,
        };
        let offset = u64::from(index).saturating_mul(DESCRIPTOR_BYTES);
        let Some(at) = table.checked_add(offset) else {
            return Err(not_shared);
        };
        self.mem.read_obj(GuestAddress(at)).map_err(|_| not_shared)
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), RingError> {
        let (head, start, bytes) = (self.head, descriptor.addr().0, descriptor.len());
        if bytes == 0 {
            return Err(RingError::Empty { head });
        }
        if !self.mem.all_shared(Gpa(start), u64::from(bytes)) {
            return Err(RingError::NotShared {
                head,
                start,
                bytes: u64::from(bytes),
            });
        }
        let segment = Segment {
            start: Gpa(start),
            bytes,
        };
        if descriptor.flags() & F_WRITE != 0 {
            self.chain.writable.push(segment);
        } else if self.chain.writable.is_empty() {
            self.chain.readable.push(segment);
        } else {
            return Err(RingError::Order { head });
        }
        let bytes = self
            .chain
            .readable_bytes()
            .saturating_add(self.chain.writable_bytes());
        if bytes > MAX_CHAIN_BYTES {
            return Err(RingError::TooLong { head });
        }
        Ok(())
    }
}
