//! What carries frames outside: a queue of a tap interface, or a stream to passt.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use arch::iov::Parts;
use arch::tap::{Offloads, Tap};

use super::header::{HEADER_BYTES, MAX_BYTES, net_feature};

/// Whole frames that a link holds in memory, so that its descriptor does not show them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    /// A frame is ready to be received.
    pub(super) incoming: bool,
    /// Part of a sent frame waits for the descriptor to be writable.
    pub(super) outgoing: bool,
}

/// One direction pair of frames. Nothing here blocks.
pub(super) trait Link: Send + std::fmt::Debug {
    /// Readable when a frame can be received, writable when one can be sent.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Starts with the features that the driver accepted; `None` stops.
    fn attach(&mut self, features: Option<u64>) -> io::Result<()>;
    /// What a frame of `frame` bytes begins with on this link, made in place of its virtio header.
    fn lead<'a>(&self, header: &'a mut [u8; HEADER_BYTES], frame: usize) -> &'a mut [u8];
    /// Receives one frame behind a virtio header; 0 if the other side hung up.
    fn receive(&mut self, into: &Parts<'_>) -> io::Result<usize>;
    /// Takes one frame behind its lead, or `WouldBlock`.
    fn send(&mut self, frame: &Parts<'_>) -> io::Result<()>;
    /// What is held back in memory, after another attempt to send it.
    fn held(&mut self) -> Held;
}

/// One queue of a tap interface.
#[derive(Debug)]
pub(super) struct TapLink {
    pub(super) tap: Tap,
    /// Has siblings, so that the kernel can do without it.
    pub(super) detachable: bool,
    pub(super) attached: bool,
}

impl Link for TapLink {
    fn fd(&self) -> BorrowedFd<'_> {
        self.tap.fd()
    }

    fn attach(&mut self, features: Option<u64>) -> io::Result<()> {
        let on = features.is_some();
        if self.detachable && self.attached != on {
            self.tap.set_attached(on)?;
            self.attached = on;
        }
        let Some(features) = features else {
            return Ok(());
        };
        self.tap.set_offloads(Offloads {
            checksum: features & net_feature::GUEST_CSUM != 0,
            tso4: features & net_feature::GUEST_TSO4 != 0,
            tso6: features & net_feature::GUEST_TSO6 != 0,
        })
    }

    fn lead<'a>(&self, header: &'a mut [u8; HEADER_BYTES], _frame: usize) -> &'a mut [u8] {
        header
    }

    fn receive(&mut self, into: &Parts<'_>) -> io::Result<usize> {
        into.read_from(self.tap.fd())
    }

    fn send(&mut self, frame: &Parts<'_>) -> io::Result<()> {
        frame.write_to(self.tap.fd()).map(drop)
    }

    fn held(&mut self) -> Held {
        Held::default()
    }
}

const LENGTH_BYTES: usize = 4;
const INBOX_BYTES: usize = 128 << 10;

/// A stream of frames, each behind its length as four bytes, most significant first: what QEMU's
/// `-netdev stream` speaks and passt(1) serves on its socket.
#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    inbox: Box<[u8]>,
    start: usize,
    end: usize,
    outbox: Vec<u8>,
}

impl Stream {
    /// `socket` must not block.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            inbox: vec![0; INBOX_BYTES].into(),
            start: 0,
            end: 0,
            outbox: vec![],
        }
    }

    /// The first whole frame in the inbox.
    fn front(&self) -> io::Result<Option<&[u8]>> {
        let bytes = self.inbox.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_BYTES.saturating_sub(HEADER_BYTES) {
            let text = format!("peer announced a frame of {length} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(rest.get(..length))
    }

    /// Reads more; false at the end of the stream.
    fn refill(&mut self) -> io::Result<bool> {
        self.inbox.copy_within(self.start..self.end, 0);
        self.end = self.end.saturating_sub(self.start);
        self.start = 0;
        let mut parts = Parts::new();
        parts.push(self.inbox.get_mut(self.end..).unwrap_or_default());
        let count = parts.read_from(self.socket.as_fd())?;
        self.end = self.end.saturating_add(count);
        Ok(count != 0)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let mut parts = Parts::new();
            parts.push(&mut self.outbox);
            let count = parts.write_to(self.socket.as_fd())?;
            self.outbox.drain(..count);
        }
        Ok(())
    }
}

impl Link for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn attach(&mut self, _features: Option<u64>) -> io::Result<()> {
        Ok(())
    }

    fn lead<'a>(&self, header: &'a mut [u8; HEADER_BYTES], frame: usize) -> &'a mut [u8] {
        let (length, _) = header.split_at_mut(LENGTH_BYTES);
        length.copy_from_slice(&u32::try_from(frame).unwrap_or(0).to_be_bytes());
        length
    }

    fn receive(&mut self, into: &Parts<'_>) -> io::Result<usize> {
        loop {
            if let Some(frame) = self.front()? {
                into.fill(0, &[0; HEADER_BYTES]);
                into.fill(HEADER_BYTES, frame);
                let length = frame.len();
                self.start = self.start.saturating_add(LENGTH_BYTES).saturating_add(length);
                return Ok(length.saturating_add(HEADER_BYTES));
            }
            if !self.refill()? {
                return Ok(0);
            }
        }
    }

    fn send(&mut self, frame: &Parts<'_>) -> io::Result<()> {
        self.flush()?;
        let count = frame.write_to(self.socket.as_fd())?;
        // The peer counts on whole frames; the rest of this one goes first when there is room again.
        if count < frame.bytes() {
            frame.append_to(&mut self.outbox, count);
        }
        Ok(())
    }

    fn held(&mut self) -> Held {
        // An error shows again, and is handled, at the next send or receive.
        let outgoing = self.flush().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
        Held {
            incoming: self.front().is_ok_and(|frame| frame.is_some()),
            outgoing,
        }
    }
}
