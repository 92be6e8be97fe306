//! An epoll descriptor that a device owns: level-triggered, nested into the event loop's own.
// UNSAFETY: lends the descriptor of an epoll that it owns.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// What one watched descriptor is watched for, or ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Readable, or the other side hung up.
    pub read: bool,
    /// Writable, or in error.
    pub write: bool,
    /// Closed by the other side. The kernel reports it whenever a descriptor is watched for anything.
    pub hang_up: bool,
}

impl Interest {
    /// Nothing: the descriptor is not in the set.
    pub const NONE: Self = Self {
        read: false,
        write: false,
        hang_up: false,
    };

    fn events(self) -> EventSet {
        let mut set = EventSet::empty();
        set.set(EventSet::IN, self.read);
        set.set(EventSet::OUT, self.write);
        set
    }
}

/// A set of watched descriptors, readable itself while one of them is ready.
#[derive(Debug)]
pub struct Poll(Epoll);

/// Room for what one [`Poll::ready`] reports.
#[derive(Debug)]
pub struct Ready {
    events: [EpollEvent; 32],
    count: usize,
}

impl Ready {
    /// Token and readiness of each ready descriptor.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Interest)> {
        self.events.iter().take(self.count).map(|event| {
            let set = event.event_set();
            let gone = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
            let interest = Interest {
                read: gone || set.contains(EventSet::IN),
                write: gone || set.contains(EventSet::OUT),
                hang_up: gone,
            };
            (event.data(), interest)
        })
    }

    /// True if nothing is ready.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Poll {
    /// An empty set.
    ///
    /// # Errors
    /// The process or host has no more descriptors.
    pub fn open() -> io::Result<Self> {
        Epoll::new().map(Self)
    }

    /// Changes what `fd` is watched for from `*now` to `wanted`; `*now` follows if the kernel agrees.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(
        &self,
        fd: BorrowedFd<'_>,
        token: u64,
        now: &mut Interest,
        wanted: Interest,
    ) -> io::Result<()> {
        let operation = match (*now == Interest::NONE, wanted == Interest::NONE) {
            _ if *now == wanted => return Ok(()),
            (true, _) => ControlOperation::Add,
            (false, true) => ControlOperation::Delete,
            (false, false) => ControlOperation::Modify,
        };
        self.0
            .ctl(operation, fd.as_raw_fd(), EpollEvent::new(wanted.events(), token))?;
        *now = wanted;
        Ok(())
    }

    /// Descriptors that are ready now, at most 32 of them; the rest comes with the next call.
    pub fn ready(&self) -> Ready {
        let mut events = [EpollEvent::default(); 32];
        // The only error that an own, valid set can give is an interrupted call; it is repeated by the loop.
        let count = self.0.wait(0, &mut events).unwrap_or(0);
        Ready { events, count }
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.0`, which the result borrows through `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_set_nested_in_another_is_ready_as_long_as_its_member() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let (inner, outer) = (Poll::open().unwrap(), Poll::open().unwrap());
        let read = Interest {
            read: true,
            ..Interest::NONE
        };
        let (mut of_near, mut of_inner) = (Interest::NONE, Interest::NONE);
        inner.watch(near.as_fd(), 7, &mut of_near, read).unwrap();
        outer.watch(inner.as_fd(), 8, &mut of_inner, read).unwrap();
        assert!(outer.ready().is_empty());
        far.write_all(b"x").unwrap();
        for _ in 0..2 {
            assert_eq!(outer.ready().iter().collect::<Vec<_>>(), [(8, read)]);
            assert_eq!(inner.ready().iter().collect::<Vec<_>>(), [(7, read)]);
        }
        near.read_exact(&mut [0]).unwrap();
        assert!(outer.ready().is_empty());
        far.write_all(b"x").unwrap();
        inner
            .watch(near.as_fd(), 7, &mut of_near, Interest::NONE)
            .unwrap();
        assert!(outer.ready().is_empty());
    }

    #[test]
    fn a_hang_up_is_seen_by_who_waits_for_nothing_else() {
        let (near, far) = UnixStream::pair().unwrap();
        let poll = Poll::open().unwrap();
        let wanted = Interest {
            hang_up: true,
            ..Interest::NONE
        };
        poll.watch(near.as_fd(), 1, &mut { Interest::NONE }, wanted)
            .unwrap();
        assert!(poll.ready().is_empty());
        drop(far);
        assert!(poll.ready().iter().all(|(_, is)| is.hang_up) && !poll.ready().is_empty());
    }
}
