//! One direction of a link, without waiting.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec, read, writev};

use crate::wake::{Wake, retry};

/// A descriptor that is read or written without waiting.
#[derive(Debug)]
pub(super) struct Stream {
    fd: OwnedFd,
    /// The descriptor may wait, so it is asked first.
    ask: bool,
    /// Is watched where epoll refuses the descriptor, as it does files, which are always ready.
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
        Ok(Self { ask, ..Self::new(fd) })
    }

    /// Has `epoll` tell when the descriptor is ready.
    ///
    /// # Errors
    /// The process has no descriptors left, or the kernel no memory.
    pub(super) fn watch(&mut self, epoll: &OwnedFd, flags: EventFlags) -> io::Result<()> {
        if let Some(always) = &self.always {
            return Ok(watch(epoll, always, flags)?);
        }
        match watch(epoll, &self.fd, flags) {
            Err(Errno::PERM) => {
                let always = self.always.insert(Wake::new()?);
                always.signal();
                Ok(watch(epoll, always, flags)?)
            }
            result => Ok(result?),
        }
    }

    /// Takes [`Self::watch`] back.
    pub(super) fn unwatch(&self, epoll: &OwnedFd) {
        match &self.always {
            Some(always) => unwatch(epoll, always),
            None => unwatch(epoll, &self.fd),
        }
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

pub(super) fn watch(epoll: &OwnedFd, fd: impl AsFd, flags: EventFlags) -> Result<(), Errno> {
    epoll::add(epoll, fd, EventData::new_u64(0), flags)
}

pub(super) fn unwatch(epoll: &OwnedFd, fd: impl AsFd) {
    let _ = epoll::delete(epoll, fd);
}
