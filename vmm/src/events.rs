//! What happens to the machine, told to whoever supervises it: one JSON object per line, and a line when the guest
//! begins to run. Nothing here ever waits for the reader: a slow one misses events and learns how many.

use std::collections::VecDeque;
use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::config::{EventSink, Notify};
use crate::ending::{Ending, ExitClass};
use crate::spec::inherited::{FdError, Inherited};

/// Something that happened.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The machine is checked; nothing runs yet.
    Started {
        /// cvmm's process id.
        pid: u32,
        /// Platform as chosen: `soft`, `snp`.
        platform: &'static str,
        /// Path of the pseudo-terminal, if the console is one.
        #[serde(skip_serializing_if = "Option::is_none")]
        console: Option<String>,
    },
    /// cvmm gave up what it does not need.
    Sandbox {
        /// System calls are filtered.
        seccomp: bool,
        /// Version of Landlock that restricts access by path; absent if nothing does.
        #[serde(skip_serializing_if = "Option::is_none")]
        landlock: Option<i32>,
        /// The user that cvmm became.
        #[serde(skip_serializing_if = "Option::is_none")]
        user: Option<u32>,
    },
    /// The launch is sealed.
    Measured {
        /// Launch digest in hexadecimal digits.
        digest: String,
        /// False on `soft`, where the digest is only what hardware would have measured.
        protected: bool,
    },
    /// The first vCPU enters the guest.
    Running {
        /// Thread ids of the vCPUs by index, for pinning.
        vcpu_threads: Vec<i32>,
    },
    /// A device got a ring or request that it cannot go on with; it waits for a reset by the guest.
    DeviceBroken {
        /// Which device, e.g. `virtio-blk 0`.
        device: String,
        /// What was wrong.
        reason: String,
    },
    /// The guest reboots.
    GuestReboot,
    /// The guest powered off.
    GuestOff,
    /// The guest ended itself or crashed.
    GuestTerminated {
        /// Why, in words.
        reason: String,
    },
    /// A signal asks the guest to power off.
    Stopping {
        /// Number of the signal.
        signal: u32,
    },
    /// cvmm is about to exit; always the last event.
    Stopped {
        /// Exit code.
        code: u8,
    },
    /// The machine could not be started or kept running.
    Error {
        /// One line for people.
        message: String,
        /// Exit code that follows.
        code: u8,
    },
}

impl Event {
    /// What the guest did to end; `None` if it did nothing, or if that has been told.
    pub fn of_ending(ending: &Ending) -> Option<Self> {
        match ending {
            Ending::PowerOff => Some(Self::GuestOff),
            Ending::Terminated(reason) | Ending::Crashed(reason) => Some(Self::GuestTerminated {
                reason: reason.clone(),
            }),
            Ending::Reboot | Ending::Forced(_) => None,
        }
    }
}

/// An event sink that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The descriptor is wrong.
    #[error(transparent)]
    Fd(#[from] FdError),
    /// The path cannot be opened.
    #[error("events {}: {cause}; give a file, a FIFO or a Unix socket that somebody listens on", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

impl EventsError {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        ExitClass::Usage
    }
}

/// Where events go. Clones share one sink, and any thread may use one.
#[derive(Clone, Debug)]
pub struct Events(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sink: Mutex<Sink>,
    ready: Mutex<Option<File>>,
    systemd: Option<UnixDatagram>,
}

#[derive(Debug, Default)]
struct Sink {
    /// None if nobody listens, or not any more.
    to: Option<Target>,
    /// Bytes that the reader was too slow to take.
    pending: VecDeque<u8>,
    /// Events lost since the last one that was kept.
    dropped: u64,
}

#[derive(Debug)]
enum Target {
    File(File),
    Socket(UnixStream),
}

/// Most bytes kept for a slow reader.
const PENDING_MAX: usize = 64 << 10;
/// Longest wait for a slow reader when cvmm ends.
const LAST_WAIT: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    event: &'a Event,
    /// Nanoseconds since 1970 (`CLOCK_REALTIME`).
    time_ns: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dropped: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Events {
    /// Opens what `notify` names. Call it before opening anything else, so that a number that the caller did not
    /// open is noticed.
    ///
    /// # Errors
    /// See [`EventsError`].
    pub fn open(notify: &Notify) -> Result<Self, EventsError> {
        let ready = match notify.ready_fd {
            Some(number) => Some(File::from(Inherited::take("ready-fd", number)?.writable()?.fd)),
            None => None,
        };
        let to = match &notify.events {
            None => None,
            Some(EventSink::Fd(number)) => {
                let fd = Inherited::take("events fd", *number)?.writable()?.fd;
                let path = PathBuf::from(format!("fd:{number}"));
                Some(adopt(fd, *number).map_err(|cause| EventsError::Open { path, cause })?)
            }
            Some(EventSink::Path(path)) => Some(open_path(path).map_err(|cause| EventsError::Open {
                path: path.clone(),
                cause,
            })?),
        };
        Ok(Self::new(to, ready))
    }

    /// Events that go nowhere.
    pub fn none() -> Self {
        Self::new(None, None)
    }

    fn new(to: Option<Target>, ready: Option<File>) -> Self {
        Self(Arc::new(Shared {
            sink: Mutex::new(Sink {
                to,
                ..Sink::default()
            }),
            ready: Mutex::new(ready),
            systemd: systemd(),
        }))
    }

    /// Tells that something happened. Never blocks and never fails: a reader that has gone is forgotten.
    pub fn emit(&self, event: &Event) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut sink = self.0.sink.lock().unwrap_or_else(PoisonError::into_inner);
        if sink.to.is_none() {
            return;
        }
        let line = Line {
            event,
            time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            dropped: sink.dropped,
        };
        let Ok(mut line) = serde_json::to_vec(&line) else {
            return;
        };
        line.push(b'\n');
        sink.flush();
        if sink.pending.len().saturating_add(line.len()) > PENDING_MAX {
            sink.dropped = sink.dropped.saturating_add(1);
            return;
        }
        sink.dropped = 0;
        sink.pending.extend(line);
        sink.flush();
    }

    /// Tells the supervisor, once, that the guest runs: the line `READY=1` on `--ready-fd`, and the same to systemd
    /// where it asks for that with NOTIFY_SOCKET (sd_notify(3)).
    pub fn ready(&self) {
        let ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut file) = ready
            && let Err(e) = file.write_all(b"READY=1\n")
        {
            log::warn!("ready-fd: {e}");
        }
        if let Some(socket) = &self.0.systemd
            && let Err(e) = socket.send(b"READY=1\n")
        {
            log::warn!("NOTIFY_SOCKET: {e}");
        }
    }

    /// Gives a slow reader a last half second for what it has not taken yet.
    pub fn finish(&self) {
        let step = Duration::from_millis(10);
        let mut waited = Duration::ZERO;
        while waited < LAST_WAIT {
            let mut sink = self.0.sink.lock().unwrap_or_else(PoisonError::into_inner);
            sink.flush();
            if sink.pending.is_empty() || sink.to.is_none() {
                return;
            }
            drop(sink);
            thread::sleep(step);
            waited = waited.saturating_add(step);
        }
    }
}

impl Sink {
    /// Writes what the reader takes now.
    fn flush(&mut self) {
        while !self.pending.is_empty() {
            let (bytes, _) = self.pending.as_slices();
            let written = match &mut self.to {
                Some(Target::File(file)) => file.write(bytes),
                Some(Target::Socket(socket)) => socket.write(bytes),
                None => return self.pending.clear(),
            };
            match written {
                Ok(n) if n > 0 => drop(self.pending.drain(..n)),
                Err(e) if passes(e.kind()) => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => self.to = None,
            }
        }
    }
}

/// True of a slow reader and of a full disk, which may have room again.
fn passes(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Opening a FIFO for writing alone fails until somebody reads; with both it waits in the pipe.
fn open_path(path: &Path) -> io::Result<Target> {
    let kind = path.metadata().map(|m| m.file_type()).ok();
    if kind.is_some_and(|k| k.is_socket()) {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        return Ok(Target::Socket(socket));
    }
    let fifo = kind.is_some_and(|k| k.is_fifo());
    let file = OpenOptions::new()
        .read(fifo)
        .write(fifo)
        .append(!fifo)
        .create(!fifo)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    Ok(Target::File(file))
}

/// Makes an inherited descriptor non-blocking, without changing the open file that others may share: pipes and files
/// are opened anew, which sockets cannot be.
fn adopt(fd: OwnedFd, number: u32) -> io::Result<Target> {
    let again = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{number}"));
    if let Ok(file) = again {
        return Ok(Target::File(file));
    }
    let socket = UnixStream::from(fd);
    socket.set_nonblocking(true)?;
    Ok(Target::Socket(socket))
}

/// The socket of systemd, if it waits for news. Connected early: later its path may be out of reach.
fn systemd() -> Option<UnixDatagram> {
    let path = env::var_os("NOTIFY_SOCKET")?;
    let connected = connect(&path);
    connected.inspect_err(|e| log::warn!("NOTIFY_SOCKET: {e}")).ok()
}

fn connect(path: &std::ffi::OsStr) -> io::Result<UnixDatagram> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests;
