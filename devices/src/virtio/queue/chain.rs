//! The snapshot of a descriptor chain, and copies in and out of its buffers.

use std::io::{self, Read, Write};

use arch::addr::Gpa;
use arch::mem::SharedMem;
use vm_memory::{Bytes, GuestAddress};

use super::{QueueBroken, RingError};

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
    pub(super) head: u16,
    pub(super) readable: Vec<Segment>,
    pub(super) writable: Vec<Segment>,
}

impl Chain {
    /// Index of the first descriptor; what [`push`](super::VirtQueue::push) wants back.
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
