//! One direction of a link, without waiting.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec, read, writev};

use crate::wake::{Wake, retry};

/// A descriptor that is read or written without waiting.
#[derive(Debug)]
pub(super) struct Stream {
    fd: OwnedFd,
    /// The descriptor may wait, so it is asked first.
    ask: bool,
    /// Stands in where epoll refuses the descriptor, as it does files, which are always ready.
    always: Option<Wake>,
}

impl Stream {
    /// `fd` is non-blocking, or a file to write.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            ask: false,
            always: None,
        }
    }

    /// A descriptor that other processes share, such as standard input. Non-blocking mode belongs to what is
    /// shared, so switching it on would surprise them: a terminal or pipe is opened anew, anything else is
    /// asked before each use.
    pub(super) fn shared(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
        let reopened = matches!(kind, FileType::Fifo | FileType::CharacterDevice)
            .then(|| {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                open(path, flags, Mode::empty()).ok()
            })
            .flatten();
        let ask = reopened.is_none() && kind != FileType::RegularFile;
        let fd = match reopened {
            Some(own) => own,
            None => fcntl_dupfd_cloexec(fd, 3)?,
        };
        let always = always_ready(&fd)?;
        Ok(Self { fd, ask, always })
    }

    /// What to watch for readiness.
    pub(super) fn watched(&self) -> BorrowedFd<'_> {
        self.always.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd)
    }

    /// Reads at most `limit` bytes; nothing at the end of the stream.
    ///
    /// # Errors
    /// `AGAIN` if there is nothing now.
    pub(super) fn read(&self, limit: usize) -> Result<Vec<u8>, Errno> {
        if self.ask && !self.wait(PollFlags::IN, 0) {
            return Err(Errno::AGAIN);
        }
        let mut bytes = Vec::with_capacity(limit);
        retry(|| read(&self.fd, spare_capacity(&mut bytes)))?;
        Ok(bytes)
    }

    /// Writes what the other side takes.
    ///
    /// # Errors
    /// `AGAIN` if that is nothing now.
    pub(super) fn write(&self, slices: &[io::IoSlice<'_>]) -> Result<usize, Errno> {
        if self.ask && !self.wait(PollFlags::OUT, 0) {
            return Err(Errno::AGAIN);
        }
        retry(|| writev(&self.fd, slices))
    }

    /// Waits up to `ms` milliseconds until the other side takes output.
    pub(super) fn wait_writable(&self, ms: u32) -> bool {
        self.wait(PollFlags::OUT, ms)
    }

    fn wait(&self, flags: PollFlags, ms: u32) -> bool {
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(ms).saturating_mul(1_000_000),
        };
        let mut fds = [PollFd::new(&self.fd, flags)];
        matches!(retry(|| poll(&mut fds, Some(&limit))), Ok(1))
    }
}

/// A substitute to watch if epoll refuses `fd`.
fn always_ready(fd: &OwnedFd) -> io::Result<Option<Wake>> {
    let probe = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    if epoll::add(&probe, fd, data, epoll::EventFlags::empty()) != Err(Errno::PERM) {
        return Ok(None);
    }
    let wake = Wake::new()?;
    wake.signal();
    Ok(Some(wake))
}
