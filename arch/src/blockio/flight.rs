//! One operation in flight: what is left of it, and everything the kernel may touch until it is over.
// UNSAFETY: the raw pointers of an iovec list move between threads with the memory they point into.
#![expect(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{Action, Done, Refused};
use crate::addr::Gpa;
use crate::mem::{Pin, SharedMem};

/// `IOV_MAX` of Linux.
const MAX_PIECES: usize = 1024;
/// Most bytes of one piece. The 1 GiB that a request may have adds 256 pieces to those that the guest made.
pub(super) const PIECE_BYTES: usize = 4 << 20;
/// Times that one operation is tried again without progress.
const MAX_RETRIES: u8 = 64;
/// `RWF_DSYNC`.
const DURABLE: i32 = libc::RWF_DSYNC;

/// An operation with its memory.
pub(super) struct Flight {
    tag: u64,
    work: Work,
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done.
    first: usize,
    retries: u8,
    /// Held only to be dropped at the end.
    _pins: Vec<Pin>,
    _map: Arc<GuestMemoryMmap>,
}

/// The system call that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// `preadv2`.
    Read { offset: u64 },
    /// `pwritev2` with flags.
    Write { offset: u64, flags: i32 },
    /// `fdatasync`.
    Flush,
    /// `fallocate`; where the file system lacks `mode`, `instead` is tried.
    Allocate {
        offset: u64,
        bytes: u64,
        mode: i32,
        instead: Option<i32>,
        /// `Flush` follows.
        durable: bool,
    },
}

/// What the result of a system call means for its operation.
#[derive(Debug)]
pub(super) enum Step {
    /// Issue the rest.
    Again,
    /// It is over.
    Over(io::Result<()>),
}

// SAFETY: the pointers in `pieces` point into the mapping that `_map` keeps alive, wherever the flight moves;
// they are only handed to the kernel, which treats that memory as racy bytes.
unsafe impl Send for Flight {}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight")
            .field("tag", &self.tag)
            .field("work", &self.work)
            .finish_non_exhaustive()
    }
}

impl Flight {
    /// Pins and translates the memory of `action`.
    pub(super) fn new(mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<Self, Refused> {
        let segments = match action {
            Action::Read { segments, .. } | Action::Write { segments, .. } => segments,
            Action::Flush | Action::Discard { .. } | Action::Zero { .. } => &[],
        };
        let mut flight = Self {
            tag,
            work: Work::from(action),
            pieces: Vec::with_capacity(segments.len()),
            first: 0,
            retries: 0,
            _pins: Vec::new(),
            _map: Arc::clone(mem.mapping()),
        };
        let mut pins = Vec::with_capacity(segments.len());
        for &(start, bytes) in segments {
            pins.push(flight.add(mem, start, bytes)?);
        }
        flight._pins = pins;
        Ok(flight)
    }

    fn add(&mut self, mem: &SharedMem, start: Gpa, bytes: u32) -> Result<Pin, Refused> {
        let not_shared = Refused::NotShared {
            start: start.0,
            bytes,
        };
        let pin = mem.pin(start, u64::from(bytes)).ok_or(not_shared)?;
        let count = usize::try_from(bytes).map_err(|_| not_shared)?;
        for slice in GuestMemoryBackend::get_slices(&**mem.mapping(), GuestAddress(start.0), count) {
            let slice = slice.map_err(|_| not_shared)?;
            let start = slice.ptr_guard_mut().as_ptr();
            for at in (0..slice.len()).step_by(PIECE_BYTES) {
                if self.pieces.len() >= MAX_PIECES {
                    return Err(Refused::TooManySegments);
                }
                self.pieces.push(libc::iovec {
                    iov_base: start.wrapping_byte_add(at).cast(),
                    iov_len: slice.len().saturating_sub(at).min(PIECE_BYTES),
                });
            }
        }
        Ok(pin)
    }

    /// What to issue next.
    pub(super) fn work(&self) -> Work {
        self.work
    }

    /// The pieces of memory that are left. They stay where they are until [`settle`](Self::settle).
    pub(super) fn pieces(&self) -> &[libc::iovec] {
        self.pieces.get(self.first..).unwrap_or_default()
    }

    /// Those of [`pieces`](Self::pieces) that come first and have `limit` bytes at most, but always one.
    pub(super) fn front(&self, limit: u64) -> &[libc::iovec] {
        let pieces = self.pieces();
        let mut left = limit;
        let fits = |piece: &&libc::iovec| {
            let rest = left.checked_sub(piece.iov_len as u64);
            left = rest.unwrap_or(left);
            rest.is_some()
        };
        let count = pieces.iter().take_while(fits).count().max(1);
        pieces.get(..count).unwrap_or_default()
    }

    /// Takes the result of the system call: bytes, zero, or a negative errno.
    pub(super) fn settle(&mut self, result: i32) -> Step {
        match u64::try_from(result) {
            Ok(moved) => self.progress(moved),
            Err(_) => self.failed(result.saturating_neg()),
        }
    }

    /// The completion that ends this operation.
    pub(super) fn done(self, result: io::Result<()>) -> Done {
        Done {
            tag: self.tag,
            result,
        }
    }

    fn progress(&mut self, moved: u64) -> Step {
        let (offset, at_end) = match &mut self.work {
            Work::Allocate { offset, bytes, .. } if (1..*bytes).contains(&moved) => {
                *offset = offset.saturating_add(moved);
                *bytes = bytes.saturating_sub(moved);
                return Step::Again;
            }
            Work::Allocate { durable: true, .. } => {
                self.work = Work::Flush;
                return Step::Again;
            }
            Work::Flush | Work::Allocate { .. } => return Step::Over(Ok(())),
            Work::Read { offset } => (offset, io::ErrorKind::UnexpectedEof),
            Work::Write { offset, .. } => (offset, io::ErrorKind::WriteZero),
        };
        *offset = offset.saturating_add(moved);
        let mut left = usize::try_from(moved).unwrap_or(usize::MAX);
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if let Some(rest) = piece.iov_len.checked_sub(left)
                && rest != 0
            {
                piece.iov_base = piece.iov_base.wrapping_byte_add(left);
                piece.iov_len = rest;
                break;
            }
            left = left.saturating_sub(piece.iov_len);
            self.first = self.first.saturating_add(1);
        }
        if self.pieces().is_empty() {
            return Step::Over(Ok(()));
        }
        if moved == 0 {
            return Step::Over(Err(at_end.into()));
        }
        self.retries = 0;
        Step::Again
    }

    fn failed(&mut self, errno: i32) -> Step {
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries = self.retries.saturating_add(1);
            return Step::Again;
        }
        if errno == libc::EOPNOTSUPP
            && let Work::Allocate { mode, instead, .. } = &mut self.work
            && let Some(other) = instead.take()
        {
            *mode = other;
            return Step::Again;
        }
        Step::Over(Err(io::Error::from_raw_os_error(errno)))
    }
}

impl From<Action<'_>> for Work {
    fn from(action: Action<'_>) -> Self {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match action {
            Action::Read { offset, .. } => Self::Read { offset },
            Action::Write { offset, durable, .. } => Self::Write {
                offset,
                flags: if durable { DURABLE } else { 0 },
            },
            Action::Flush => Self::Flush,
            Action::Discard { offset, bytes } => Self::Allocate {
                offset,
                bytes,
                mode: PUNCH,
                instead: None,
                durable: false,
            },
            Action::Zero {
                offset,
                bytes,
                unmap,
                durable,
            } => {
                // A file system that cannot keep the space may free it: the guest wants zeros first of all.
                let (mode, instead) = if unmap { (PUNCH, ZERO) } else { (ZERO, PUNCH) };
                Self::Allocate {
                    offset,
                    bytes,
                    mode,
                    instead: Some(instead),
                    durable,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flight over two pieces of 100 bytes, whose addresses nobody follows.
    fn flight(work: Work) -> Flight {
        let piece = |at: usize| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(at),
            iov_len: 100,
        };
        Flight {
            tag: 5,
            work,
            pieces: vec![piece(1000), piece(2000)],
            first: 0,
            retries: 0,
            _pins: vec![],
            _map: Arc::new(GuestMemoryMmap::new()),
        }
    }

    fn left(flight: &Flight) -> Vec<(usize, usize)> {
        let pieces = flight.pieces().iter();
        pieces.map(|p| (p.iov_base.addr(), p.iov_len)).collect()
    }

    #[test]
    fn short_transfers_continue_where_they_stopped() {
        let mut read = flight(Work::Read { offset: 4096 });
        let steps: [(i32, &[(usize, usize)]); 4] = [
            (30, &[(1030, 70), (2000, 100)]),
            (70, &[(2000, 100)]),
            (-libc::EINTR, &[(2000, 100)]),
            (99, &[(2099, 1)]),
        ];
        for (result, rest) in steps {
            assert!(matches!(read.settle(result), Step::Again));
            assert_eq!(left(&read), rest);
        }
        assert_eq!(read.work(), Work::Read { offset: 4096 + 199 });
        assert!(matches!(read.settle(1), Step::Over(Ok(()))));
    }

    #[test]
    fn a_part_is_as_many_pieces_as_fit_but_always_one() {
        let mut read = flight(Work::Read { offset: 0 });
        for (limit, expected) in [(0, 1), (99, 1), (100, 1), (199, 1), (200, 2), (u64::MAX, 2)] {
            assert_eq!(read.front(limit).len(), expected, "{limit}");
        }
        assert!(matches!(read.settle(200), Step::Over(Ok(()))));
        assert_eq!(read.front(u64::MAX).len(), 0);
    }

    #[test]
    fn no_progress_ends_in_an_error() {
        let write = Work::Write { offset: 0, flags: 0 };
        let cases = [
            (Work::Read { offset: 0 }, 0, io::ErrorKind::UnexpectedEof),
            (write, 0, io::ErrorKind::WriteZero),
            (write, -libc::ENOSPC, io::ErrorKind::StorageFull),
            (Work::Flush, -libc::EDQUOT, io::ErrorKind::QuotaExceeded),
        ];
        for (work, result, kind) in cases {
            match flight(work).settle(result) {
                Step::Over(Err(e)) => assert_eq!(e.kind(), kind),
                other => panic!("{work:?} {result}: {other:?}"),
            }
        }
        let mut busy = flight(write);
        let tries = (0..1000).take_while(|_| matches!(busy.settle(-libc::EAGAIN), Step::Again));
        assert_eq!(tries.count(), usize::from(MAX_RETRIES));
    }

    #[test]
    fn a_missing_way_to_zero_is_replaced_once() {
        let action = |durable| Action::Zero {
            offset: 0,
            bytes: 512,
            unmap: false,
            durable,
        };
        let mut zero = flight(Work::from(action(false)));
        assert!(matches!(zero.settle(-libc::EOPNOTSUPP), Step::Again));
        let Work::Allocate { mode, .. } = zero.work() else {
            panic!("not an allocation any more");
        };
        assert_eq!(mode, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        assert!(matches!(zero.settle(-libc::EOPNOTSUPP), Step::Over(Err(_))));
        let mut durable = flight(Work::from(action(true)));
        assert!(matches!(durable.settle(0), Step::Again));
        assert_eq!(durable.work(), Work::Flush);
        assert!(matches!(durable.settle(0), Step::Over(Ok(()))));
    }
}
