//! The event thread: waits for descriptors and runs what belongs to them, one at a time.

use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken from the kernel at a time.
const BATCH: usize = 32;
/// Low bits of an event's data tell which of its handler's descriptors it is.
const SOURCE_BITS: u32 = 16;

/// Runs when one of its descriptors is readable, and is told which. It must drain a level-triggered descriptor,
/// or it runs again.
pub type Handler = Box<dyn FnMut(u16) + Send>;

/// Descriptors and their handlers.
pub struct EventLoop {
    epoll: Epoll,
    handlers: Vec<Handler>,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EventLoop({} handlers)", self.handlers.len())
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

    /// Watches one descriptor, which `handler` keeps open.
    ///
    /// # Errors
    /// `fd` cannot be watched.
    pub fn add(&mut self, fd: RawFd, handler: Handler) -> io::Result<()> {
        self.add_many(handler, |epoll, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
        })
    }

    /// Lets `watch` put descriptors into the epoll set with data from the given token up to 65535 more; the
    /// handler is told the difference.
    ///
    /// # Errors
    /// Those of `watch`.
    pub fn add_many(
        &mut self,
        handler: Handler,
        watch: impl FnOnce(&Epoll, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        watch(&self.epoll, (self.handlers.len() as u64) << SOURCE_BITS)?;
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
            let index = usize::try_from(event.data() >> SOURCE_BITS).unwrap_or(usize::MAX);
            let source = u16::try_from(event.data() & 0xffff).unwrap_or_default();
            if let Some(handler) = self.handlers.get_mut(index) {
                handler(source);
            }
        }
        Ok(())
    }
}
