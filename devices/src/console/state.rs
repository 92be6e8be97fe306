//! The console behind its lock: buffers, and which descriptors are watched.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::buffer::Tail;
use super::escape::Escape;
use super::open::Link;
use super::stream::{unwatch, watch};
use crate::ratelimit::LogGate;

/// Output kept while nobody takes it.
const OUTPUT_BYTES: usize = 64 << 10;
/// Input kept while the guest does not take it.
const INPUT_BYTES: usize = 16 << 10;
/// Read from the host at once.
const READ_BYTES: usize = 4 << 10;
/// Output that does not wait for the end of its line.
const LARGE_BYTES: usize = 512;
/// Longest wait for the rest of a line; also the pause after which a byte leaves at once.
const LINE_WAIT: Duration = Duration::from_millis(4);
/// Wait after a client could not be accepted, as when descriptors have run out.
const ACCEPT_WAIT: Duration = Duration::from_secs(1);
/// Time that pending output gets when the console is dropped, in steps of `LAST_STEP_MS`.
const LAST_STEPS: u32 = 10;
const LAST_STEP_MS: u32 = 30;

pub(super) static GATE: LogGate = LogGate::new(1);

/// What one round of service came to.
#[derive(Debug, Default)]
pub(super) struct Served {
    pub(super) input: bool,
    pub(super) quit: bool,
}

#[derive(Debug)]
pub(super) struct State {
    link: Link,
    epoll: Arc<OwnedFd>,
    output: Output,
    input: Tail,
    /// The reader is watched.
    reading: bool,
    /// A client could not be accepted; the timer says when to try again.
    accept_waits: bool,
    escape: Escape,
    /// Input goes to the virtio console.
    pub(super) port_attached: bool,
}

#[derive(Debug)]
struct Output {
    tail: Tail,
    dropped: u64,
    flushed: Option<Instant>,
    /// The other side takes nothing; the writer is watched.
    blocked: bool,
    timer: OwnedFd,
    armed: bool,
}

impl Output {
    /// False if the timer cannot be set.
    fn set_timer(&mut self, wait: Duration) -> bool {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(wait.subsec_nanos()),
            },
        };
        self.armed = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
        self.armed
    }
}

impl State {
    pub(super) fn new(link: Link, epoll: Arc<OwnedFd>) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        watch(&epoll, &timer, EventFlags::IN)?;
        let mut state = Self {
            link,
            epoll,
            output: Output {
                tail: Tail::new(OUTPUT_BYTES),
                dropped: 0,
                flushed: None,
                blocked: false,
                timer,
                armed: false,
            },
            input: Tail::new(INPUT_BYTES),
            reading: false,
            accept_waits: false,
            escape: Escape::default(),
            port_attached: false,
        };
        if let Some(listener) = &state.link.listener {
            watch(&state.epoll, listener.fd(), EventFlags::IN)?;
        }
        state.resume_reading();
        Ok(state)
    }

    pub(super) fn dropped(&self) -> u64 {
        self.output.dropped
    }

    pub(super) fn has_input(&self) -> bool {
        self.input.len() != 0
    }

    pub(super) fn service(&mut self) -> Served {
        self.accept();
        let served = self.read();
        let mut ticks = [0; 8];
        if self.output.armed && rustix::io::read(&self.output.timer, &mut ticks).is_ok() {
            self.output.armed = false;
        }
        self.unblock();
        self.flush();
        served
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.link.writer.is_none() && self.link.listener.is_none() {
            return;
        }
        let lost = self.output.tail.push(bytes);
        self.count_lost(lost);
        let now = Instant::now();
        let paused = self
            .output
            .flushed
            .is_none_or(|then| now.saturating_duration_since(then) >= LINE_WAIT);
        if paused || bytes.contains(&b'\n') || self.output.tail.len() >= LARGE_BYTES {
            self.output.flushed = Some(now);
            self.flush();
        } else {
            self.arm();
        }
    }

    /// Writes what the other side takes. What it does not take now waits for the writer to be ready.
    pub(super) fn flush(&mut self) {
        while let Some(writer) = &mut self.link.writer
            && !self.output.blocked
            && self.output.tail.len() != 0
        {
            match writer.write(&self.output.tail.slices()) {
                Ok(count) => self.output.tail.consume(count),
                Err(Errno::AGAIN) => {
                    self.output.blocked = writer.watch(&self.epoll, EventFlags::OUT).is_ok();
                    return;
                }
                // The disk is full, perhaps not for long.
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    let lost = self.output.tail.len();
                    self.output.tail.consume(lost);
                    self.count_lost(lost);
                }
                Err(error) => self.lose_writer(error),
            }
        }
    }

    /// Takes input for the guest.
    pub(super) fn take(&mut self, buf: &mut [u8]) -> usize {
        let count = self.input.pop(buf);
        if count != 0 && !self.reading {
            self.resume_reading();
        }
        count
    }

    fn count_lost(&mut self, lost: usize) {
        self.output.dropped = self.output.dropped.saturating_add(lost as u64);
        if lost != 0 && self.link.writer.is_some() {
            GATE.warn(format_args!(
                "console output is not taken fast enough, {} bytes dropped so far",
                self.output.dropped
            ));
        }
    }

    fn arm(&mut self) {
        if self.output.armed || self.output.blocked || self.link.writer.is_none() {
            return;
        }
        if !self.output.set_timer(LINE_WAIT) {
            self.flush();
        }
    }

    /// Stops watching the writer; the next flush finds out whether it takes output again.
    fn unblock(&mut self) {
        if std::mem::take(&mut self.output.blocked)
            && let Some(writer) = &self.link.writer
        {
            writer.unwatch(&self.epoll);
        }
    }

    fn accept(&mut self) {
        if self.link.writer.is_some() {
            return;
        }
        let Some(listener) = &self.link.listener else {
            return;
        };
        match listener.accept() {
            Ok((reader, writer)) => {
                self.accept_waits = false;
                unwatch(&self.epoll, listener.fd());
                self.link.reader = Some(reader);
                self.link.writer = Some(writer);
                self.resume_reading();
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if std::mem::take(&mut self.accept_waits) {
                    let _ = watch(&self.epoll, listener.fd(), EventFlags::IN);
                }
            }
            // The client stays in line, and the socket readable.
            Err(_) if self.output.set_timer(ACCEPT_WAIT) => {
                unwatch(&self.epoll, listener.fd());
                self.accept_waits = true;
            }
            Err(_) => {}
        }
    }

    fn resume_reading(&mut self) {
        if let Some(reader) = &mut self.link.reader {
            self.reading = reader.watch(&self.epoll, EventFlags::IN).is_ok();
        }
    }

    fn pause_reading(&mut self) {
        if std::mem::take(&mut self.reading)
            && let Some(reader) = &self.link.reader
        {
            reader.unwatch(&self.epoll);
        }
    }

    /// One read. A person at a terminal is always listened to, because of the escape sequence, and loses what
    /// the guest does not take; any other sender waits.
    fn read(&mut self) -> Served {
        let typed = self.link.raw.is_some();
        let limit = if typed {
            READ_BYTES
        } else {
            self.input.room().min(READ_BYTES)
        };
        if limit == 0 {
            self.pause_reading();
        }
        let Some(reader) = self.link.reader.as_ref().filter(|_| self.reading) else {
            return Served::default();
        };
        let bytes = match reader.read(limit) {
            Ok(bytes) if !bytes.is_empty() => bytes,
            Err(Errno::AGAIN) => return Served::default(),
            Ok(_) | Err(_) => {
                self.lose_reader();
                return Served::default();
            }
        };
        let mut served = Served::default();
        if typed {
            let mut guest = vec![];
            served.quit = self.escape.filter(&bytes, &mut guest);
            guest.truncate(self.input.room());
            self.input.push(&guest);
        } else {
            self.input.push(&bytes);
        }
        if !typed && self.input.room() == 0 {
            self.pause_reading();
        }
        served.input = self.has_input();
        served
    }

    /// The sender is gone: the end of standard input, or of a client.
    fn lose_reader(&mut self) {
        self.pause_reading();
        self.link.reader = None;
        if self.link.listener.is_some() {
            self.lose_client();
        }
    }

    fn lose_writer(&mut self, error: Errno) {
        if self.link.listener.is_some() {
            self.lose_client();
        } else {
            GATE.warn(format_args!("console output ends here: {error}"));
            self.unblock();
            self.link.writer = None;
        }
    }

    /// Makes room for the next client. What this one did not take is for the next.
    fn lose_client(&mut self) {
        self.pause_reading();
        self.unblock();
        self.link.reader = None;
        self.link.writer = None;
        if let Some(listener) = &self.link.listener {
            let _ = watch(&self.epoll, listener.fd(), EventFlags::IN);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for _ in 0..LAST_STEPS {
            self.unblock();
            self.flush();
            if self.output.tail.len() == 0 {
                return;
            }
            if let Some(writer) = &self.link.writer {
                writer.wait_writable(LAST_STEP_MS);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ConsoleSpec, open};
    use super::*;
    use rustix::event::{PollFd, PollFlags, epoll, poll};

    const ALONE: &str = "CVMM_TEST_ALONE";

    /// In a process of its own, because the limit of descriptors is one for all threads.
    #[test]
    fn a_client_that_cannot_be_accepted_does_not_keep_the_event_thread_awake() {
        if std::env::var_os(ALONE).is_some() {
            return without_descriptors();
        }
        let name = std::thread::current().name().unwrap().to_owned();
        let test = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&test.stdout);
        assert!(test.status.success() && said.contains("1 passed"), "{test:?}");
    }

    fn without_descriptors() {
        let path = std::env::temp_dir().join(format!("cvmm-accept-{}", std::process::id()));
        let link = open::open(&ConsoleSpec::Socket(path.clone())).unwrap();
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let mut state = State::new(link, Arc::clone(&epoll)).unwrap();
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let limit = |current| {
            let files = rustix::process::Resource::Nofile;
            let mut limit = rustix::process::getrlimit(files);
            let before = limit.current.replace(current);
            rustix::process::setrlimit(files, limit).unwrap();
            before.unwrap()
        };
        let before = limit(3);
        let mut serve = |milliseconds| {
            let (began, mut calls) = (Instant::now(), 0);
            while began.elapsed() < Duration::from_millis(milliseconds) {
                let mut fds = [PollFd::new(&epoll, PollFlags::IN)];
                let wait = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                };
                if poll(&mut fds, Some(&wait)).is_ok_and(|count| count == 1) {
                    calls += 1;
                    state.service();
                }
            }
            (calls, state.link.writer.is_some())
        };
        let (calls, accepted) = serve(2500);
        assert!(!accepted && (2..=4).contains(&calls), "{calls} calls");
        limit(before);
        let (calls, accepted) = serve(1500);
        assert!(accepted && calls <= 4, "{calls} calls");
    }
}
