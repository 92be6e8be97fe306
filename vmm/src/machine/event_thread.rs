//! The event thread, which serves the devices.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::inbox::{Address, Note};
use crate::event_loop::EventLoop;
use crate::sandbox::{Sandbox, Thread};

/// The running event thread. Dropping it stops it; the devices are dropped by the thread that does so.
#[derive(Debug)]
pub(super) struct EventThread {
    bell: EventFd,
    thread: Option<JoinHandle<EventLoop>>,
}

impl EventThread {
    /// Runs `events` on a thread of its own.
    pub(super) fn start(mut events: EventLoop, to_main: Address, sandbox: &Sandbox) -> io::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (heard, stopped) = (bell.try_clone()?, Arc::clone(&stop));
        let fd = std::os::fd::AsRawFd::as_raw_fd(&heard);
        let ring = move |_| {
            // Readable, or this would not run.
            let _ = heard.read();
            stopped.store(true, Ordering::Relaxed);
        };
        events.add(fd, Box::new(ring))?;
        let sandbox = sandbox.clone();
        let thread = Builder::new().name("events".into()).spawn(move || {
            let mut outcome = sandbox.confine(Thread::Events);
            while outcome.is_ok() && !stop.load(Ordering::Relaxed) {
                outcome = events.turn(-1);
            }
            if let Err(e) = outcome {
                to_main.send(Note::EventsFailed(e));
            }
            events
        })?;
        Ok(Self {
            bell,
            thread: Some(thread),
        })
    }
}

impl Drop for EventThread {
    fn drop(&mut self) {
        if let Err(e) = self.bell.write(1) {
            log::error!("stopping the event thread: {e}");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the event thread panicked; this is a bug of cvmm");
        }
    }
}
