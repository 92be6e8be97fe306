//! All connections: who is who, whose turn it is, and the limits.

use std::collections::VecDeque;
use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arch::mem::SharedMem;
use arch::poll::Interest;

use super::super::queue::Chain;
use super::conn::Conn;
use super::host::{Host, Line};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Key, SHUT_BOTH, STREAM, op};
use super::state::{State, Verdict};
use super::table::{Table, Token};

/// Most connections, whoever asked for them, with those that have not named a port yet.
pub const CONNECTIONS: usize = 1024;
/// Most processes that connected and have not named a port yet.
pub const PENDING_LINES: usize = 64;
/// Bytes that one connection may hold for a host process that does not read.
pub const WINDOW: u32 = 256 << 10;
/// The same beyond the first [`WIDE_CONNECTIONS`], so that all connections hold at most 32 MiB.
pub const NARROW_WINDOW: u32 = 16 << 10;
/// Connections with the full [`WINDOW`].
pub const WIDE_CONNECTIONS: usize = 64;
/// Most resets that wait for a receive buffer of the guest; more are lost, and the guest times out.
pub const RESETS: usize = 256;
/// How long a process may take to name a port, the guest to answer a request, and a closed connection to be
/// remembered for the guest's confirmation.
pub const TIME_LIMIT: Duration = Duration::from_secs(2);

const ACCEPTS: usize = 16;
const DEADLINES: usize = 4 * CONNECTIONS;
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const READ: Interest = Interest {
    read: true,
    write: false,
    hang_up: false,
};

#[derive(Debug)]
enum Entry {
    Line(Line),
    Conn(Box<Conn>),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Awaited {
    Line(Token),
    Answer(Token),
    Reset(Token),
    /// Descriptors had run out; accept again.
    Descriptors,
}

/// The multiplexer.
#[derive(Debug)]
pub(super) struct Mux {
    cid: u64,
    host: Arc<Host>,
    table: Table<Entry>,
    lines: usize,
    /// Connections with something for the guest, in turn.
    pub(super) ready: VecDeque<Token>,
    resets: VecDeque<Key>,
    /// In order: every limit is equally long.
    pub(super) deadlines: VecDeque<(Instant, Awaited)>,
    armed: Option<Instant>,
    /// Connections whose interest may have changed.
    touched: Vec<Token>,
    listening: Interest,
    lens: Vec<u32>,
}

impl Mux {
    pub(super) fn start(cid: u64, host: Arc<Host>) -> io::Result<Self> {
        let mut listening = Interest::NONE;
        host.arm(None);
        // Both fail if a driver is up already.
        host.poll
            .watch(host.timer.as_fd(), TIMER, &mut { Interest::NONE }, READ)?;
        host.poll
            .watch(host.listener.as_fd(), LISTENER, &mut listening, READ)?;
        Ok(Self {
            cid,
            host,
            table: Table::new(CONNECTIONS),
            lines: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: VecDeque::new(),
            armed: None,
            touched: vec![],
            listening,
            lens: vec![],
        })
    }

    /// True if the guest is due a packet.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Looks at the descriptors that are ready.
    pub(super) fn on_events(&mut self) {
        let host = Arc::clone(&self.host);
        for (token, is) in host.poll.ready().iter() {
            match token {
                LISTENER => self.accept(),
                TIMER => self.expire(Instant::now()),
                token => self.on_ready(Token(token), is),
            }
        }
    }

    /// Makes the epoll set and the timer fit what happened. With `again`, wakes up at once.
    pub(super) fn settle(&mut self, again: bool) {
        let mut touched = std::mem::take(&mut self.touched);
        for token in touched.drain(..) {
            if let Some(Entry::Conn(conn)) = self.table.get(token) {
                let (wanted, mut watched) = (conn.wanted(), conn.watched);
                let outcome = self.host.poll.watch(conn.fd(), token.0, &mut watched, wanted);
                conn.watched = watched;
                if outcome.is_err() {
                    self.reset(token);
                }
            }
        }
        self.touched = touched;
        let next = if again {
            Some(Instant::now())
        } else {
            self.deadlines.front().map(|(at, _)| *at)
        };
        if next != self.armed {
            self.armed = next;
            let wait = next.map(|at| at.saturating_duration_since(Instant::now()));
            self.host.arm(wait);
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let socket = match self.host.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => return,
                Err(e) => {
                    log::warn!("vsock connection cannot be accepted, trying again: {e}");
                    self.listen(Interest::NONE);
                    self.await_until(Awaited::Descriptors);
                    return;
                }
            };
            // Beyond the limits: dropping the socket refuses the process.
            if self.lines >= PENDING_LINES {
                continue;
            }
            let Ok(token) = self.table.insert(Entry::Line(Line::new(socket))) else {
                continue;
            };
            self.lines = self.lines.saturating_add(1);
            self.await_until(Awaited::Line(token));
            if let Some(Entry::Line(line)) = self.table.get(token) {
                let fd = line.socket.as_fd();
                let watched = self.host.poll.watch(fd, token.0, &mut { Interest::NONE }, READ);
                if watched.is_err() {
                    self.remove(token);
                }
            }
        }
    }

    fn listen(&mut self, wanted: Interest) {
        let fd = self.host.listener.as_fd();
        if let Err(e) = self.host.poll.watch(fd, LISTENER, &mut self.listening, wanted) {
            log::warn!("vsock listener cannot be watched: {e}");
        }
    }

    fn on_ready(&mut self, token: Token, is: Interest) {
        match self.table.get(token) {
            Some(Entry::Line(line)) => match line.read() {
                Ok(None) => {}
                Ok(Some(port)) => self.request(token, port),
                Err(_) => self.remove(token),
            },
            Some(Entry::Conn(conn)) => {
                conn.on_ready(is);
                if !conn.is_finished() {
                    self.wake(token);
                } else if conn.draining {
                    self.remove(token);
                } else {
                    self.reset(token);
                }
            }
            None => {}
        }
    }

    fn window(&self) -> u32 {
        if self.table.len() <= WIDE_CONNECTIONS {
            self.host.window
        } else {
            NARROW_WINDOW
        }
    }

    /// A host process asked for guest port `port`.
    fn request(&mut self, token: Token, port: u32) {
        let Some(Entry::Line(line)) = self.table.remove(token) else {
            return;
        };
        self.lines = self.lines.saturating_sub(1);
        // The set knows the socket under the old token.
        if self
            .host
            .poll
            .watch(line.socket.as_fd(), token.0, &mut { READ }, Interest::NONE)
            .is_err()
        {
            return;
        }
        let key = Key {
            host: self.table.free_port(port),
            guest: port,
        };
        let state = State::request(self.window());
        if let Some(token) = self.add(key, state, line.socket) {
            self.await_until(Awaited::Answer(token));
        }
    }

    fn add(&mut self, key: Key, state: State, socket: UnixStream) -> Option<Token> {
        let conn = Conn::new(key, state, socket, Interest::NONE);
        let token = self.table.insert(Entry::Conn(Box::new(conn))).ok()?;
        self.table.bind(key, token);
        self.wake(token);
        Some(token)
    }

    /// Queues a connection if it has something for the guest, and has its interest looked at.
    fn wake(&mut self, token: Token) {
        if let Some(Entry::Conn(conn)) = self.table.get(token) {
            let has_data = conn.has_data();
            if !conn.queued && !conn.draining && (has_data || conn.state.owes()) {
                conn.queued = true;
                self.ready.push_back(token);
            }
            self.touched.push(token);
        }
    }

    fn remove(&mut self, token: Token) {
        match self.table.remove(token) {
            Some(Entry::Line(_)) => self.lines = self.lines.saturating_sub(1),
            Some(Entry::Conn(conn)) => {
                if conn.queued {
                    self.ready.retain(|waiting| *waiting != token);
                }
                if self.table.find(conn.key) == Some(token) {
                    self.table.release(conn.key);
                }
            }
            None => {}
        }
    }

    /// Drops a connection and lets the guest know.
    fn reset(&mut self, token: Token) {
        if let Some(Entry::Conn(conn)) = self.table.get(token) {
            let key = conn.key;
            self.remove(token);
            self.refuse(key);
        }
    }

    fn refuse(&mut self, key: Key) {
        if self.resets.len() < RESETS {
            self.resets.push_back(key);
        }
    }

    fn await_until(&mut self, awaited: Awaited) {
        if self.deadlines.len() >= DEADLINES {
            let mut deadlines = std::mem::take(&mut self.deadlines);
            deadlines.retain(|(_, awaited)| self.is_awaited(*awaited));
            self.deadlines = deadlines;
        }
        if let Some(at) = Instant::now().checked_add(TIME_LIMIT) {
            self.deadlines.push_back((at, awaited));
        }
    }

    fn is_awaited(&mut self, awaited: Awaited) -> bool {
        match awaited {
            Awaited::Descriptors => true,
            Awaited::Line(token) => matches!(self.table.get(token), Some(Entry::Line(_))),
            Awaited::Answer(token) => {
                matches!(self.table.get(token), Some(Entry::Conn(conn)) if conn.state.is_requested())
            }
            Awaited::Reset(token) => {
                matches!(self.table.get(token), Some(Entry::Conn(conn)) if conn.state.awaits_reset())
            }
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        self.armed = None;
        self.host.arm(None);
        while let Some((at, awaited)) = self.deadlines.front().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_front();
            if !self.is_awaited(awaited) {
                continue;
            }
            match awaited {
                Awaited::Descriptors => self.listen(READ),
                Awaited::Answer(token) => self.reset(token),
                // The guest may still have data to read, which a reset would destroy: just forget.
                Awaited::Line(token) | Awaited::Reset(token) => self.remove(token),
            }
        }
    }

    /// Takes a packet of the guest; its payload is behind the header in `chain`.
    pub(super) fn on_packet(&mut self, mem: &SharedMem, chain: &Chain, header: &Header) {
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = header.key_from_guest();
        if header.kind != STREAM {
            return self.refuse(key);
        }
        let Some(token) = self.table.find(key) else {
            return self.on_stranger(key, header);
        };
        let Some(Entry::Conn(conn)) = self.table.get(token) else {
            return;
        };
        let payload = chain.readable_bytes().saturating_sub(HEADER_BYTES as u64);
        let whole = header.op != op::RW || u64::from(header.len) <= payload;
        let verdict = if whole {
            conn.state.on_packet(header)
        } else {
            Verdict::Violation
        };
        let fine = match verdict {
            Verdict::Go => true,
            Verdict::Established => conn.greet().is_ok(),
            Verdict::Deliver => conn.deliver(mem, chain, header.len).is_ok(),
            Verdict::HalfClosed => {
                conn.on_guest_shut();
                true
            }
            Verdict::Closed => return self.on_closed(token),
            Verdict::Gone => return self.remove(token),
            Verdict::Violation => false,
        };
        if fine {
            self.wake(token);
        } else {
            self.reset(token);
        }
    }

    /// A packet of no connection that we know.
    fn on_stranger(&mut self, key: Key, header: &Header) {
        match header.op {
            op::REQUEST => match self.host.connect(key.host) {
                Ok(socket) => {
                    let state = State::respond(self.window(), header);
                    if self.add(key, state, socket).is_none() {
                        self.refuse(key);
                    }
                }
                Err(_) => self.refuse(key),
            },
            // The first must not be answered; the others may belong to one that we already forgot, whose
            // last bytes the guest is still reading.
            op::RST | op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
            _ => self.refuse(key),
        }
    }

    /// Confirms, and keeps the socket until the host process has read what the guest sent.
    fn on_closed(&mut self, token: Token) {
        if let Some(Entry::Conn(conn)) = self.table.get(token) {
            conn.on_guest_shut();
            conn.draining = true;
            let (key, finished) = (conn.key, conn.is_finished());
            self.table.release(key);
            self.refuse(key);
            if finished {
                self.remove(token);
            } else {
                self.touched.push(token);
            }
        }
    }

    /// Puts the next packet, or packets of one connection, into `chains` and notes in `used` which of them
    /// it took with how many bytes.
    ///
    /// # Errors
    /// The memory is no longer shared.
    pub(super) fn emit(
        &mut self,
        mem: &SharedMem,
        chains: &VecDeque<Chain>,
        used: &mut Vec<(u16, u32)>,
    ) -> io::Result<()> {
        if let Some(key) = self.resets.pop_front() {
            return put(mem, chains, used, Header::to_guest(self.cid, key, op::RST));
        }
        let Some(token) = self.ready.pop_front() else {
            return Ok(());
        };
        let Some(Entry::Conn(conn)) = self.table.get(token) else {
            return Ok(());
        };
        conn.queued = false;
        // Its reset went out already.
        if conn.draining {
            return Ok(());
        }
        let mut header = Header::to_guest(self.cid, conn.key, op::RW);
        let mut closing = false;
        if let Some((op, flags)) = conn.state.next() {
            (header.op, header.flags) = (op, flags);
            (header.buf_alloc, header.fwd_cnt) = conn.state.flow.announce();
            closing = op == op::SHUTDOWN && flags == SHUT_BOTH;
            put(mem, chains, used, header)?;
        } else if conn.has_data() {
            conn.read(mem, chains, &mut self.lens)?;
            for len in &self.lens {
                // Only what a packet carries is known to the guest, and there may be none.
                (header.buf_alloc, header.fwd_cnt) = conn.state.flow.announce();
                header.len = *len;
                put(mem, chains, used, header)?;
            }
        }
        if closing {
            self.await_until(Awaited::Reset(token));
        }
        self.wake(token);
        Ok(())
    }
}

#[cfg(test)]
impl Mux {
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes that are kept for host processes.
    pub(super) fn held(&mut self) -> usize {
        let held = |entry: &Entry| match entry {
            Entry::Conn(conn) => conn.held(),
            Entry::Line(_) => 0,
        };
        self.table.entries().map(held).sum()
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.listen(Interest::NONE);
        let timer = self.host.timer.as_fd();
        if let Err(e) = self.host.poll.watch(timer, TIMER, &mut { READ }, Interest::NONE) {
            log::warn!("vsock timer stays watched: {e}");
        }
    }
}

/// Writes `header` to the first of `chains` that is not in `used`.
fn put(
    mem: &SharedMem,
    chains: &VecDeque<Chain>,
    used: &mut Vec<(u16, u32)>,
    header: Header,
) -> io::Result<()> {
    if let Some(chain) = chains.get(used.len()) {
        chain.writer(mem).write_all(&header.bytes())?;
        let bytes = u64::from(header.len).saturating_add(HEADER_BYTES as u64);
        used.push((chain.head(), u32::try_from(bytes).unwrap_or(u32::MAX)));
    }
    Ok(())
}
