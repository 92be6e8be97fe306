//! Asynchronous disk I/O straight between a file and shared guest memory, without a bounce copy.
//!
//! Each operation in flight owns a [`Pin`](crate::mem::Pin) on every range that it names and keeps the mapping
//! alive, so a page cannot turn private, nor memory go away, while the kernel may still write to it.

mod disk;
mod flight;
mod pool;
mod uring;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::Gpa;
use crate::mem::SharedMem;

pub use disk::{Disk, Geometry};

/// What to do with a part of the disk. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Fills guest memory from the disk at this offset.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Guest ranges, in order.
        segments: &'a [(Gpa, u32)],
    },
    /// Stores guest memory on the disk at this offset.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Guest ranges, in order.
        segments: &'a [(Gpa, u32)],
        /// Complete only once the data is on stable storage.
        durable: bool,
    },
    /// Brings all writes that completed before to stable storage.
    Flush,
    /// Tells the host that the content of a range is not needed any more.
    Discard {
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u64,
    },
    /// Makes a range read as zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u64,
        /// The host may free the space.
        unmap: bool,
        /// Complete only once the zeros are on stable storage.
        durable: bool,
    },
}

/// One operation that finished.
#[derive(Debug)]
pub struct Done {
    /// The tag it was submitted with.
    pub tag: u64,
    /// All of it, or why not.
    pub result: io::Result<()>,
}

/// Why an operation was not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A byte of the range is private or not RAM.
    #[error("guest range {start:#x}+{bytes:#x} is not shared memory")]
    NotShared {
        /// Guest-physical address.
        start: u64,
        /// Length.
        bytes: u32,
    },
    /// More pieces of memory than one system call takes, or more than the address space has.
    #[error("the request has more pieces than the host takes at once")]
    TooManySegments,
    /// As many operations are in flight as the engine was made for.
    #[error("too many operations in flight")]
    Full,
}

/// Runs operations on one disk for one queue. Its [`Disk`]'s notifier turns readable when something finished
/// that [`run`](Self::run) has not returned yet. A thread that runs an engine gets system calls interrupted
/// (`EINTR`), also without a signal.
///
/// Dropping an engine waits as [`quiesce`](Self::quiesce) does; memory of an operation that the host does not
/// finish in time stays pinned and mapped.
pub trait Engine: Send + Debug {
    /// Takes an operation over; [`run`](Self::run) starts it.
    ///
    /// # Errors
    /// Nothing was begun, and no completion will come.
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused>;
    /// Starts all that was submitted, then appends what finished to `done`. Does not block. On a file that lives in
    /// memory this thread does the work, as far as `copies` goes, in bytes, from which it takes what it did: true if some
    /// is left, for which the notifier stays silent.
    ///
    /// # Errors
    /// The host refuses to start operations; they stay queued for the next call.
    fn run(&mut self, done: &mut Vec<Done>, copies: &mut u64) -> io::Result<bool>;
    /// Operations submitted and not returned yet.
    fn in_flight(&self) -> usize;
    /// Finishes everything in flight and forgets it; false if the host did not get there within `limit`, and then the
    /// notifier turns readable when more of it is over.
    fn quiesce(&mut self, limit: Duration) -> bool;
}

/// What a thread for disk I/O does before its work: it gives up what it does not need. A thread for which that fails
/// does not work.
pub type Enter = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the calling thread copies at a time, for all engines of a disk together, while it holds up conversions, in bytes: a
/// few milliseconds' worth. A piece that has begun is copied to its end, so it may be twice as much.
pub const COPIES: u64 = 4 << 20;

/// How long a dropped engine waits for the host.
const DROP_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
