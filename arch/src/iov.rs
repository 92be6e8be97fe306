//! Vectored I/O between host descriptors and shared guest memory, without a bounce copy.
// UNSAFETY: readv and writev on slices whose lifetimes the borrow checker keeps.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::addr::Gpa;
use crate::mem::SharedMem;

/// Most pieces in one [`Parts`].
pub const MAX_PARTS: usize = 64;

/// A list of pieces of guest or host memory, read from or written to a descriptor in one system call.
#[derive(Debug)]
pub struct Parts<'a> {
    list: [VolatileSlice<'a>; MAX_PARTS],
    count: usize,
    bytes: usize,
}

impl Default for Parts<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Parts<'a> {
    /// An empty list.
    pub fn new() -> Self {
        Self {
            list: [VolatileSlice::from(&mut [][..]); MAX_PARTS],
            count: 0,
            bytes: 0,
        }
    }

    /// Bytes in all pieces.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pieces that still fit.
    pub fn room(&self) -> usize {
        MAX_PARTS.saturating_sub(self.count)
    }

    /// Adds a piece of host memory; false if the list is full.
    pub fn push(&mut self, host: &'a mut [u8]) -> bool {
        self.add(VolatileSlice::from(host))
    }

    /// Adds `bytes` of guest memory at `start`; false if the list is full.
    ///
    /// # Errors
    /// The range is not, or no longer, shared memory.
    pub fn push_guest(&mut self, mem: &'a SharedMem, start: Gpa, bytes: usize) -> io::Result<bool> {
        let at = GuestAddress(start.0);
        let slices = mem
            .get_slices(at, bytes, Permissions::ReadWrite)
            .map_err(io::Error::other)?;
        for slice in slices.stop_on_error().map_err(io::Error::other)? {
            if !self.add(slice) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn add(&mut self, slice: VolatileSlice<'a>) -> bool {
        let Some(free) = self.list.get_mut(self.count) else {
            return false;
        };
        self.bytes = self.bytes.saturating_add(slice.len());
        *free = slice;
        self.count = self.count.saturating_add(1);
        true
    }

    fn pieces(&self) -> &[VolatileSlice<'a>] {
        self.list.get(..self.count).unwrap_or_default()
    }

    /// Copies `data` into the pieces, behind their first `skip` bytes, and returns how many bytes fitted.
    pub fn fill(&self, mut skip: usize, mut data: &[u8]) -> usize {
        let mut done = 0_usize;
        for piece in self.pieces() {
            let from = skip.min(piece.len());
            skip = skip.saturating_sub(from);
            let count = piece.write(data, from).unwrap_or(0);
            data = data.get(count..).unwrap_or_default();
            done = done.saturating_add(count);
        }
        done
    }

    /// Appends what lies behind the first `skip` bytes to `to`.
    pub fn append_to(&self, to: &mut Vec<u8>, mut skip: usize) {
        for piece in self.pieces() {
            let start = to.len();
            let from = skip.min(piece.len());
            skip = skip.saturating_sub(from);
            to.resize(start.saturating_add(piece.len().saturating_sub(from)), 0);
            let copied = to
                .get_mut(start..)
                .map_or(0, |room| piece.read(room, from).unwrap_or(0));
            to.truncate(start.saturating_add(copied));
        }
    }

    fn vectors(&self) -> [libc::iovec; MAX_PARTS] {
        let mut vectors = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; MAX_PARTS];
        for (vector, piece) in vectors.iter_mut().zip(self.pieces()) {
            vector.iov_base = piece.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = piece.len();
        }
        vectors
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.count).unwrap_or(0)
    }

    /// Reads from `fd` into the pieces, front to back. Interrupted calls are repeated.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the descriptor has nothing.
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        retry(|| {
            // SAFETY: `vectors` holds `count()` entries, each a volatile slice that `self` borrows for `'a`,
            // so it stays mapped during the call. The kernel writes them; nobody holds a reference into
            // them: guest memory is only accessed volatile, host pieces are mutably borrowed by `self`.
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), self.count()) }
        })
    }

    /// Writes the pieces to `fd`, front to back. Interrupted calls are repeated.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the descriptor takes nothing now.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        retry(|| {
            // SAFETY: as in `read_from`; the kernel only reads the pieces.
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), self.count()) }
        })
    }
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn pieces_are_read_and_written_in_order() {
        let (mut left, right) = UnixStream::pair().unwrap();
        let (mut a, mut b) = ([0; 3], [0; 5]);
        let mut parts = Parts::new();
        assert!(parts.push(&mut a) && parts.push(&mut b));
        left.write_all(b"abcdef").unwrap();
        assert_eq!(parts.read_from(right.as_fd()).unwrap(), 6);
        assert_eq!(parts.write_to(right.as_fd()).unwrap(), 8);
        let mut back = [0; 8];
        left.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"abcdef\0\0");
        let mut tail = vec![];
        parts.append_to(&mut tail, 2);
        assert_eq!(tail, b"cdef\0\0");
        assert_eq!(parts.fill(1, b"123456789"), 7);
        assert_eq!((&a, &b), (b"a12", b"34567"));
    }

    #[test]
    fn a_full_list_takes_no_more() {
        let mut bytes = [0; MAX_PARTS + 1];
        let mut parts = Parts::new();
        let taken = bytes
            .chunks_mut(1)
            .map(|b| parts.push(b))
            .filter(|ok| *ok)
            .count();
        assert_eq!((taken, parts.bytes(), parts.room()), (MAX_PARTS, MAX_PARTS, 0));
    }
}
