//! The event thread: waits for descriptors and runs what belongs to them, one at a time.

use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken from the kernel at a time.
const BATCH: usize = 32;

/// Runs when its descriptor is readable. It must drain the descriptor, or it runs again.
pub type Handler = Box<dyn FnMut() + Send>;

/// Descriptors and their handlers.
pub struct EventLoop {
    epoll: Epoll,
    handlers: Vec<Handler>,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EventLoop({} sources)", self.handlers.len())
    }
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            handlers: vec![],
        })
    }

    /// Watches `fd`, which `handler` keeps open.
    ///
    /// # Errors
    /// `fd` cannot be watched.
    pub fn add(&mut self, fd: RawFd, handler: Handler) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, self.handlers.len() as u64);
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        self.handlers.push(handler);
        Ok(())
    }

    /// Waits once, at most `timeout_ms` (-1: for ever), and runs what is ready.
    ///
    /// # Errors
    /// The kernel's; `EINTR` is not an error.
    pub fn turn(&mut self, timeout_ms: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in events.iter().take(count) {
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            if let Some(handler) = self.handlers.get_mut(index) {
                handler();
            }
        }
        Ok(())
    }
}
