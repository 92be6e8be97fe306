//! Services of the host's kernel that no crate at hand wraps: inherited descriptors, signals as a descriptor, settings of
//! the allocator, and the version of Landlock.
// UNSAFETY: raw system calls.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use vmm_sys_util::signal::create_sigset;

/// A new close-on-exec descriptor for what `number` refers to in this process; `number` itself stays open.
///
/// # Errors
/// `EBADF` if `number` is not open.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes no pointer; a wrong number is answered with EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned `copy` as a new descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Signals that arrive as something to read instead of interrupting the process (`signalfd`).
#[derive(Debug)]
pub struct SignalFd(File);

impl SignalFd {
    /// Blocks `signals` in this thread and in every thread that it starts afterwards, and opens a
    /// non-blocking descriptor that is readable while one of them is pending.
    ///
    /// # Errors
    /// The kernel's.
    pub fn block(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = create_sigset(signals)?;
        // SAFETY: `set` is a live, initialised signal set that is only read; no old set is asked for.
        let rc = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::from_raw_os_error(rc));
        }
        // SAFETY: `set` as above; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned `fd` as a new descriptor, and nobody else knows its number.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Number of the next pending signal, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take(&self) -> io::Result<Option<u32>> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match (&self.0).read(&mut info) {
            Ok(_) => Ok(info.first_chunk().map(|number| u32::from_ne_bytes(*number))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes the C library serve the memory of all threads from one heap. With a heap for each thread glibc reads
/// `/proc/sys/vm/overcommit_memory` when it first gives memory of one back, which a thread that may open no files must not
/// do. Call it before there is a second thread. Other C libraries have one heap anyway.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers and changes the allocator's settings under its own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Version of Landlock that the kernel speaks (Linux, "Landlock: unprivileged access control", "Current limitations").
///
/// # Errors
/// `ENOSYS` without Landlock, `EOPNOTSUPP` where it is switched off.
pub fn landlock_version() -> io::Result<u32> {
    // SAFETY: no pointer is passed; with this flag the kernel only answers with a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0_usize, 0_usize, 1_u32) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_duplicate_is_the_same_file_and_a_closed_number_is_refused() {
        let (mut reader, writer) = io::pipe().unwrap();
        File::from(duplicate(writer.as_raw_fd()).unwrap())
            .write_all(b"x")
            .unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        assert_eq!(
            duplicate(1_000_000).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }

    #[test]
    fn a_blocked_signal_is_read_instead_of_delivered() {
        let thread = std::thread::spawn(|| {
            let signals = SignalFd::block(&[libc::SIGUSR2]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            // SAFETY: sends a signal that this thread blocks to this very thread.
            assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
            signals.take().unwrap()
        });
        assert_eq!(thread.join().unwrap(), Some(libc::SIGUSR2.unsigned_abs()));
    }
}
