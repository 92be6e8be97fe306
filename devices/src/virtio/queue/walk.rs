//! The one walk over a chain (virtio 1.2, "The Virtqueue Descriptor Table" and "Indirect Descriptors").

use arch::addr::Gpa;
use arch::mem::SharedMem;
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, Segment};
use super::{MAX_CHAIN, MAX_CHAIN_BYTES, RingError};
use crate::pci::from_le;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const DESCRIPTOR_LEN: usize = 16;
pub(super) const DESCRIPTOR_BYTES: u64 = DESCRIPTOR_LEN as u64;

/// A copy of one descriptor.
struct Descriptor {
    start: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(raw: &[u8]) -> Self {
        let field = |range| raw.get(range).map_or(0, from_le);
        let half = |range| u16::try_from(field(range)).unwrap_or(0);
        Self {
            start: field(0..8),
            bytes: u32::try_from(field(8..12)).unwrap_or(0),
            flags: half(12..14),
            next: half(14..16),
        }
    }

    fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// One walk over one chain.
pub(super) struct Walk<'a> {
    mem: &'a SharedMem,
    head: u16,
    indirect: bool,
    chain: Chain,
    bytes: u64,
}

impl<'a> Walk<'a> {
    /// A walk that starts at descriptor `head`, which exists; `indirect` says whether that was negotiated.
    pub(super) fn new(mem: &'a SharedMem, head: u16, indirect: bool) -> Self {
        Self {
            mem,
            head,
            indirect,
            chain: Chain {
                head,
                readable: vec![],
                writable: vec![],
            },
            bytes: 0,
        }
    }

    /// Walks through the queue's table of `size` descriptors.
    pub(super) fn run(mut self, table: u64, size: usize) -> Result<Chain, RingError> {
        let mut next = self.head;
        for _ in 0..size.min(MAX_CHAIN) {
            let descriptor = self.fetch(table, next)?;
            if descriptor.is(F_INDIRECT) {
                self.follow(&descriptor)?;
                return Ok(self.chain);
            }
            match self.step(&descriptor, size)? {
                Some(index) => next = index,
                None => return Ok(self.chain),
            }
        }
        Err(RingError::Endless { head: self.head })
    }

    /// Walks an indirect table, which must be the last descriptor of the chain and hold no further tables. The
    /// table is copied as a whole.
    fn follow(&mut self, to: &Descriptor) -> Result<(), RingError> {
        let head = self.head;
        let bytes = u64::from(to.bytes);
        let count = usize::try_from(bytes / DESCRIPTOR_BYTES).unwrap_or(usize::MAX);
        let shape = bytes.is_multiple_of(DESCRIPTOR_BYTES) && (1..=MAX_CHAIN).contains(&count);
        // The "writable" flag has no meaning here and must be ignored.
        if !self.indirect || to.is(F_NEXT) || !shape {
            return Err(RingError::Indirect { head });
        }
        let mut table = vec![[0; DESCRIPTOR_LEN]; count];
        self.mem
            .read_slice(table.as_flattened_mut(), GuestAddress(to.start))
            .map_err(|_| self.not_shared(to.start, bytes))?;
        let mut next = 0;
        for _ in 0..count {
            let raw = table.get(usize::from(next));
            let descriptor = Descriptor::parse(raw.map_or(&[], |raw| raw));
            if descriptor.is(F_INDIRECT) {
                return Err(RingError::Indirect { head });
            }
            match self.step(&descriptor, count)? {
                Some(index) => next = index,
                None => return Ok(()),
            }
        }
        Err(RingError::Endless { head })
    }

    /// Takes one buffer; returns the index of the next descriptor in a table of `size`, if there is one.
    fn step(&mut self, descriptor: &Descriptor, size: usize) -> Result<Option<u16>, RingError> {
        self.add(descriptor)?;
        let next = descriptor.next;
        if !descriptor.is(F_NEXT) {
            Ok(None)
        } else if usize::from(next) < size {
            Ok(Some(next))
        } else {
            let head = self.head;
            Err(RingError::Next { head, next, size })
        }
    }

    fn fetch(&self, table: u64, index: u16) -> Result<Descriptor, RingError> {
        let offset = u64::from(index).saturating_mul(DESCRIPTOR_BYTES);
        let at = table.saturating_add(offset);
        let raw: [u8; DESCRIPTOR_LEN] = self
            .mem
            .read_obj(GuestAddress(at))
            .map_err(|_| self.not_shared(at, DESCRIPTOR_BYTES))?;
        Ok(Descriptor::parse(&raw))
    }

    fn not_shared(&self, start: u64, bytes: u64) -> RingError {
        let head = self.head;
        RingError::NotShared { head, start, bytes }
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), RingError> {
        let (head, start, bytes) = (self.head, descriptor.start, u64::from(descriptor.bytes));
        if bytes == 0 {
            return Err(RingError::Empty { head });
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > MAX_CHAIN_BYTES {
            return Err(RingError::TooLong { head });
        }
        if !self.mem.all_shared(Gpa(start), bytes) {
            return Err(self.not_shared(start, bytes));
        }
        let segment = Segment {
            start: Gpa(start),
            bytes: descriptor.bytes,
        };
        if descriptor.is(F_WRITE) {
            self.chain.writable.push(segment);
        } else if self.chain.writable.is_empty() {
            self.chain.readable.push(segment);
        } else {
            return Err(RingError::Order { head });
        }
        Ok(())
    }
}
