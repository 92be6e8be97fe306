//! A stream to a service that may be slow, silent or gone: nothing waits past its deadline, nor for a guest that ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};

use super::{Address, QgsError};

/// Ends every wait of the streams that watch it.
#[derive(Debug)]
pub struct Stop {
    raised: AtomicBool,
    event: OwnedFd,
}

impl Stop {
    /// Not raised.
    ///
    /// # Errors
    /// The process or host has no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            raised: AtomicBool::new(false),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// For good.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        // Fails only if it has been raised more often than it can count.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// True from then on.
    pub fn raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }
}

/// Time between two attempts to join a queue of connections that is full, for which there is no event.
const ATTEMPT_AGAIN: Duration = Duration::from_millis(20);

pub(super) struct Stream(OwnedFd);

impl Stream {
    pub(super) fn connect(address: &Address, until: Instant, stop: &Stop) -> Result<Self, QgsError> {
        let late = |e| match e {
            QgsError::Late => absent(Errno::TIMEDOUT),
            QgsError::Absent(_) | QgsError::Broken(_) | QgsError::Stopped | QgsError::Answer(_) => e,
        };
        let socket = match address {
            Address::Unix(path) => {
                let to = SocketAddrUnix::new(path).map_err(absent)?;
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket =
                    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(absent)?;
                loop {
                    match connect(&socket, &to) {
                        Ok(()) => break socket,
                        Err(Errno::AGAIN | Errno::INTR) => {}
                        Err(e) => return Err(absent(e)),
                    }
                    pause(until, stop).map_err(late)?;
                }
            }
            Address::Vsock { cid, port } => {
                let socket = arch::vsock::connect(*cid, *port).map_err(QgsError::Absent)?;
                wait(socket.as_fd(), PollFlags::OUT, until, stop).map_err(late)?;
                socket_error(&socket).and_then(|result| result).map_err(absent)?;
                socket
            }
        };
        Ok(Self(socket))
    }

    pub(super) fn write_all(
        &mut self,
        mut bytes: &[u8],
        until: Instant,
        stop: &Stop,
    ) -> Result<(), QgsError> {
        while !bytes.is_empty() {
            wait(self.0.as_fd(), PollFlags::OUT, until, stop)?;
            match send(&self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(QgsError::Broken(e.into())),
            }
        }
        Ok(())
    }

    pub(super) fn read_exact(
        &mut self,
        mut room: &mut [u8],
        until: Instant,
        stop: &Stop,
    ) -> Result<(), QgsError> {
        while !room.is_empty() {
            wait(self.0.as_fd(), PollFlags::IN, until, stop)?;
            match recv(&self.0, &mut *room, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(QgsError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok((_, got)) => room = room.get_mut(got..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(QgsError::Broken(e.into())),
            }
        }
        Ok(())
    }
}

fn absent(e: Errno) -> QgsError {
    QgsError::Absent(e.into())
}

/// Waits until `fd` is ready or in error.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, until: Instant, stop: &Stop) -> Result<(), QgsError> {
    let mut all = [
        PollFd::from_borrowed_fd(fd, flags),
        PollFd::new(&stop.event, PollFlags::IN),
    ];
    loop {
        poll_until(&mut all, until)?;
        if stop.raised() {
            return Err(QgsError::Stopped);
        }
        if all.first().is_some_and(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
    }
}

fn pause(until: Instant, stop: &Stop) -> Result<(), QgsError> {
    let now = Instant::now();
    if now >= until {
        return Err(QgsError::Late);
    }
    let next = now.checked_add(ATTEMPT_AGAIN).unwrap_or(until).min(until);
    match poll_until(&mut [PollFd::new(&stop.event, PollFlags::IN)], next) {
        Ok(()) | Err(QgsError::Late) if stop.raised() => Err(QgsError::Stopped),
        Ok(()) | Err(QgsError::Late) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Waits for one of `all`.
fn poll_until(all: &mut [PollFd<'_>], until: Instant) -> Result<(), QgsError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(QgsError::Late);
    }
    let limit = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(all, Some(&limit)) {
        Ok(0) => Err(QgsError::Late),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(QgsError::Broken(e.into())),
    }
}
