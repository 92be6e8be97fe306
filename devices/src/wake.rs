//! A descriptor that one thread makes readable for another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

/// A non-blocking event counter. `vmm-sys-util`'s lacks `AsFd`, without which a crate that forbids `unsafe`
/// cannot lend the descriptor.
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// Not readable yet.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(0, flags)?))
    }

    /// Makes the descriptor readable. It already is if the counter is full, the only way this can fail.
    pub fn signal(&self) {
        let _ = retry(|| write(&self.0, &1_u64.to_ne_bytes()));
    }

    /// Makes the descriptor unreadable; returns the number of signals since the last call.
    pub fn clear(&self) -> u64 {
        let mut count = [0; 8];
        match retry(|| read(&self.0, &mut count)) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Repeats a system call that a signal interrupted.
pub(crate) fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_until_cleared() {
        let wake = Wake::new().unwrap();
        assert_eq!(wake.clear(), 0);
        wake.signal();
        wake.signal();
        assert_eq!(wake.clear(), 2);
        assert_eq!(wake.clear(), 0);
    }
}
