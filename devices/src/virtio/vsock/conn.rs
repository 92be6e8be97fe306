//! One connection: its state, its socket on the host, and bytes that the socket did not take yet.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use arch::iov::{MAX_PARTS, Parts};
use arch::mem::SharedMem;
use arch::poll::Interest;
use rustix::net::RecvFlags;

use super::super::queue::Chain;
use super::packet::{HEADER_BYTES, Key, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND};
use super::state::State;

/// Most payload of one packet (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux).
const PACKET_MAX: u64 = 64 << 10;
/// Most packets that one read from a socket fills.
pub(super) const BURST_MAX: usize = 16;

/// Bytes on their way to the socket. Bounded by the window of the connection: more has no credit.
#[derive(Debug, Default)]
struct Outbox {
    bytes: Vec<u8>,
    start: usize,
}

impl Outbox {
    fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    fn read_from(&mut self, mut from: impl Read, count: usize) -> io::Result<()> {
        // Dropping the front each time that it outgrows the rest keeps the cost per byte constant.
        if self.start >= self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end.saturating_add(count), 0);
        from.read_exact(self.bytes.get_mut(end..).unwrap_or_default())
    }

    fn flush(&mut self, mut to: &UnixStream) -> io::Result<usize> {
        let count = match to.write(self.bytes.get(self.start..).unwrap_or_default()) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            other => other?,
        };
        self.start = self.start.saturating_add(count);
        if self.len() == 0 {
            *self = Self::default();
        }
        Ok(count)
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) key: Key,
    pub(super) state: State,
    socket: UnixStream,
    outbox: Outbox,
    /// The socket has, or may have, bytes or its end for the guest.
    readable: bool,
    /// The process at the other end of the socket closed it.
    hung_up: bool,
    /// The socket takes no more; bytes from the guest are dropped.
    deaf: bool,
    /// The guest is done with the connection; only the outbox is left.
    pub(super) draining: bool,
    /// In the queue of connections with something for the guest.
    pub(super) queued: bool,
    burst: usize,
    pub(super) watched: Interest,
}

impl Conn {
    /// `socket` must not block; `watched` is what it is watched for now.
    pub(super) fn new(key: Key, state: State, socket: UnixStream, watched: Interest) -> Self {
        Self {
            key,
            state,
            socket,
            outbox: Outbox::default(),
            readable: false,
            hung_up: false,
            deaf: false,
            draining: false,
            queued: false,
            burst: 1,
            watched,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the socket should be watched for: nothing that could not be acted on.
    pub(super) fn wanted(&self) -> Interest {
        Interest {
            read: !self.readable && !self.draining && self.state.takes_host_data(),
            write: self.outbox.len() != 0,
            hang_up: !self.hung_up,
        }
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.outbox.bytes.len()
    }

    /// Nothing keeps the connection alive any more.
    pub(super) fn is_finished(&self) -> bool {
        let abandoned = self.hung_up && self.state.is_requested();
        abandoned || self.draining && self.outbox.len() == 0
    }

    /// There is data that the guest has room for. Without room, asks for credit; an end needs none.
    pub(super) fn has_data(&mut self) -> bool {
        if !self.readable || !self.state.takes_host_data() {
            return false;
        }
        if self.state.flow.room() != 0 {
            return true;
        }
        if self.state.has_asked() {
            return false;
        }
        match rustix::net::recv(&self.socket, &mut [0; 1], RecvFlags::PEEK) {
            Ok((_, 1..)) => self.state.ask_for_credit(),
            Err(rustix::io::Errno::AGAIN) => self.readable = false,
            Ok((_, 0)) | Err(_) => self.on_end(),
        }
        false
    }

    /// The socket gave its last byte.
    fn on_end(&mut self) {
        self.readable = false;
        let flags = if self.hung_up { SHUT_BOTH } else { SHUT_SEND };
        self.state.host_shut(flags);
    }

    /// The socket is ready.
    pub(super) fn on_ready(&mut self, is: Interest) {
        if is.hang_up && !self.hung_up {
            self.hung_up = true;
            self.deafen();
        }
        if is.read && self.state.takes_host_data() {
            self.readable = true;
        } else if self.hung_up {
            self.state.host_shut(SHUT_BOTH);
        }
        if is.write {
            self.flush();
        }
    }

    fn deafen(&mut self) {
        self.deaf = true;
        self.forwarded(self.outbox.len());
        self.outbox = Outbox::default();
        if !self.state.is_requested() && !self.hung_up {
            self.state.host_shut(SHUT_RECEIVE);
        }
    }

    fn forwarded(&mut self, bytes: usize) {
        self.state.flow.forward(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    fn flush(&mut self) {
        match self.outbox.flush(&self.socket) {
            Ok(count) => self.forwarded(count),
            Err(_) => self.deafen(),
        }
        self.pass_on_end();
    }

    /// Tells the host process that the guest sends no more, once it has all that was sent.
    fn pass_on_end(&mut self) {
        if self.state.guest_done() && self.outbox.len() == 0 {
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&self, how: Shutdown) {
        // The only error is that the other side is gone, which shows at the next read or write.
        let _ = self.socket.shutdown(how);
    }

    /// The guest closed a direction.
    pub(super) fn on_guest_shut(&mut self) {
        self.pass_on_end();
        if self.state.guest_deaf() {
            self.readable = false;
            self.shut(Shutdown::Read);
        }
    }

    /// Tells the host process that the guest accepted.
    pub(super) fn greet(&mut self) -> io::Result<()> {
        let line = format!("OK {}\n", self.key.host);
        // A new socket has room for it.
        (&self.socket).write_all(line.as_bytes())
    }

    /// Moves the `len` bytes behind the header in `chain` to the socket, as far as it takes them, and keeps
    /// the rest.
    ///
    /// # Errors
    /// The memory is no longer shared.
    pub(super) fn deliver(&mut self, mem: &SharedMem, chain: &Chain, len: u32) -> io::Result<()> {
        if self.deaf {
            self.forwarded(len as usize);
            return Ok(());
        }
        let skip = HEADER_BYTES as u64;
        let mut done = 0;
        if self.outbox.len() == 0 && len != 0 {
            let mut parts = Parts::new();
            gather(&mut parts, mem, chain.readable(), u64::from(len))?;
            done = match parts.write_to(self.socket.as_fd()) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.deafen();
                    len as usize
                }
            };
            self.forwarded(done);
        }
        let rest = (len as usize).saturating_sub(done);
        if rest == 0 {
            return Ok(());
        }
        let mut reader = chain.reader(mem);
        reader.skip(skip.saturating_add(done as u64));
        self.outbox.read_from(reader, rest)
    }

    /// Reads from the socket into the payload of `chains`; `lens` becomes the payload of each that is used.
    ///
    /// # Errors
    /// The memory is no longer shared.
    pub(super) fn read(
        &mut self,
        mem: &SharedMem,
        chains: &VecDeque<Chain>,
        lens: &mut Vec<u32>,
    ) -> io::Result<()> {
        lens.clear();
        let mut parts = Parts::new();
        let mut room = u64::from(self.state.flow.room());
        for chain in chains.iter().take(self.burst) {
            let payload = chain.writable_bytes().saturating_sub(HEADER_BYTES as u64);
            let before = parts.bytes();
            let most = payload.min(PACKET_MAX).min(room);
            gather(&mut parts, mem, chain.writable(), most)?;
            let pushed = parts.bytes().saturating_sub(before);
            if pushed == 0 {
                break;
            }
            room = room.saturating_sub(pushed as u64);
            lens.push(u32::try_from(pushed).unwrap_or(0));
        }
        let mut left = match parts.read_from(self.socket.as_fd()) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                lens.clear();
                return Ok(());
            }
            // A socket that was closed with unread bytes gives an error after its last byte.
            Err(_) | Ok(0) => {
                self.on_end();
                lens.clear();
                return Ok(());
            }
            Ok(count) => u32::try_from(count).unwrap_or(u32::MAX),
        };
        self.state.flow.sent(left);
        // What was not filled was the last; the level-triggered set tells of more without a probe.
        self.readable = left as usize == parts.bytes();
        self.burst = match self.readable {
            true => self.burst.saturating_mul(2).min(BURST_MAX),
            false => lens.len().max(1),
        };
        for len in lens.iter_mut() {
            *len = left.min(*len);
            left = left.saturating_sub(*len);
        }
        lens.retain(|len| *len != 0);
        Ok(())
    }
}

/// Adds at most `most` bytes behind the header that the segments begin with.
fn gather<'a>(
    parts: &mut Parts<'a>,
    mem: &'a SharedMem,
    segments: &[super::super::queue::Segment],
    most: u64,
) -> io::Result<()> {
    let (mut skip, mut left) = (HEADER_BYTES as u64, most);
    for segment in segments {
        let bytes = u64::from(segment.bytes);
        let from = skip.min(bytes);
        skip = skip.saturating_sub(from);
        let count = bytes.saturating_sub(from).min(left);
        // A segment may cross into another memory region, hence two.
        if count == 0 || parts.room() < 2 {
            continue;
        }
        let start = arch::addr::Gpa(segment.start.0.saturating_add(from));
        parts.push_guest(mem, start, usize::try_from(count).unwrap_or(0))?;
        left = left.saturating_sub(count);
    }
    Ok(())
}

const _: () = assert!(BURST_MAX * 2 < MAX_PARTS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_never_empty_stays_within_four_windows() {
        const WINDOW: usize = 256 << 10;
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let (mut outbox, mut part) = (Outbox::default(), [0; 40_000]);
        for round in 0..500 {
            // Filled in chunks that double the vector at its worst.
            while outbox.len() < WINDOW {
                let chunk = (WINDOW - outbox.len()).min(10_007);
                outbox.read_from(io::repeat(1), chunk).unwrap();
            }
            assert!(outbox.bytes.capacity() <= 4 * WINDOW, "round {round}");
            while outbox.flush(&near).unwrap() == 0 {
                far.read_exact(&mut part).unwrap();
            }
        }
    }
}
