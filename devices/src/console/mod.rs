//! The host's end of the guest's console. The 16550 and the virtio console share one [`Console`]; its descriptor
//! is watched by the event thread, which calls [`Console::service`].
//!
//! Nothing here waits for the other side: output that nobody takes is kept up to a bound, then the oldest bytes
//! go and are counted; input that the guest does not take stays with the sender.

mod buffer;
mod escape;
mod open;
mod state;
mod stream;
mod terminal;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll;

use crate::serial::SerialLine;
use crate::wake::Wake;
use open::Link;
use state::State;
pub use terminal::restore_terminal;

/// Where the guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// Standard input and output. A terminal is switched to raw mode; Ctrl-A x asks to quit, Ctrl-A Ctrl-A
    /// sends one Ctrl-A.
    Stdio,
    /// A new pseudo-terminal; see [`Console::terminal_path`].
    Pty,
    /// Output to a file, truncated; no input.
    File(PathBuf),
    /// A unix socket that listens; one client at a time, others wait for their turn.
    Socket(PathBuf),
    /// Output is dropped; no input.
    Null,
}

/// The console cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be created or written.
    #[error(
        "console file {path} cannot be opened for writing; check the directory and its permissions, and that somebody reads a FIFO"
    )]
    File {
        /// As given.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Someone listens on the socket.
    #[error("console socket {path} is in use by a running process; choose another path or stop that process")]
    InUse {
        /// As given.
        path: PathBuf,
    },
    /// The path of the socket is taken by something else.
    #[error("{path} exists and is not a socket; choose another path for the console or remove it")]
    NotSocket {
        /// As given.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error(
        "console socket {path} cannot be created; check the directory, and that the path has at most 107 bytes"
    )]
    Socket {
        /// As given.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No pseudo-terminal to be had.
    #[error("no pseudo-terminal for the console; check that /dev/pts is mounted, or use another console")]
    Pty(#[source] io::Error),
    /// Standard input or output cannot be used.
    #[error("standard input and output cannot serve as console; use another console")]
    Stdio(#[source] io::Error),
    /// Out of descriptors, or memory.
    #[error("console needs a few descriptors; raise the limit on open files")]
    Descriptors(#[source] io::Error),
}

/// What the user asks of cvmm through the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleRequest {
    /// End the VM (Ctrl-A x).
    Quit,
}

/// A console; clones share it. When the last one goes, output gets a moment to leave, the terminal is restored
/// and a socket is removed.
#[derive(Clone, Debug)]
pub struct Console(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoll: Arc<OwnedFd>,
    /// Readable when there is input for the virtio console.
    input_ready: Wake,
    terminal_path: Option<PathBuf>,
    size: Option<(u16, u16)>,
    state: Mutex<State>,
}

impl Console {
    /// Opens the host side.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(spec: &ConsoleSpec) -> Result<Self, ConsoleError> {
        Self::over(open::open(spec)?).map_err(ConsoleError::Descriptors)
    }

    fn over(link: Link) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        Ok(Self(Arc::new(Shared {
            input_ready: Wake::new()?,
            terminal_path: link.terminal_path.clone(),
            size: link.size,
            state: Mutex::new(State::new(link, Arc::clone(&epoll))?),
            epoll,
        })))
    }

    /// A console on two pipes, for tests of the devices.
    #[cfg(test)]
    pub(crate) fn on_pipes(input: impl AsFd, output: impl AsFd, size: (u16, u16)) -> Self {
        let link = Link {
            reader: Some(stream::Stream::shared(input.as_fd(), rustix::fs::OFlags::RDONLY).unwrap()),
            writer: Some(stream::Stream::shared(output.as_fd(), rustix::fs::OFlags::WRONLY).unwrap()),
            size: Some(size),
            ..Link::default()
        };
        Self::over(link).unwrap()
    }

    /// Path of the pseudo-terminal, if this is one; the user needs to be told.
    pub fn terminal_path(&self) -> Option<&Path> {
        self.0.terminal_path.as_deref()
    }

    /// Columns and rows of the terminal when it was opened, if there is one.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.0.size
    }

    /// Readable when [`service`](Self::service) has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.epoll.as_fd()
    }

    /// Moves what can be moved without waiting, a bounded amount.
    pub fn service(&self) -> Option<ConsoleRequest> {
        let mut state = self.state();
        let served = state.service();
        if served.input && state.port_attached {
            self.0.input_ready.signal();
        }
        served.quit.then_some(ConsoleRequest::Quit)
    }

    /// Bytes of guest output that were thrown away because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.state().dropped()
    }

    /// Takes output. A byte after a pause, the end of a line and a large amount leave at once; anything else
    /// with what follows, a few milliseconds later at most.
    pub fn put(&self, bytes: &[u8]) {
        self.state().put(bytes);
    }

    /// Sends what [`put`](Self::put) kept back.
    pub fn flush(&self) {
        self.state().flush();
    }

    pub(crate) fn input_ready(&self) -> &Wake {
        &self.0.input_ready
    }

    /// Directs input to the virtio console (true) or back to the 16550.
    pub(crate) fn attach_port(&self, attached: bool) {
        let mut state = self.state();
        state.port_attached = attached;
        if attached && state.has_input() {
            self.0.input_ready.signal();
        }
    }

    pub(crate) fn has_input(&self) -> bool {
        self.state().has_input()
    }

    /// Input for the virtio console; zero bytes if there is none.
    pub(crate) fn take_for_port(&self, buf: &mut [u8]) -> usize {
        self.state().take(buf)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialLine for Console {
    fn send(&mut self, bytes: &[u8]) {
        self.put(bytes);
    }

    fn receive(&mut self, buf: &mut [u8]) -> usize {
        let mut state = self.state();
        if state.port_attached { 0 } else { state.take(buf) }
    }
}

#[cfg(test)]
mod tests;
