//! The host side: the listening socket and its path, connections to services, the timer.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use arch::poll::Poll;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::mux::WINDOW;

/// Longest `CONNECT <port>\n`.
const LINE_MAX: usize = 32;
/// Longest path: `sun_path` has 108 bytes, `_4294967295` and a NUL have to fit behind it.
const PATH_MAX: usize = 108 - 1 - 11;

/// Why a vsock device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A context ID that is reserved.
    #[error("{0} cannot be the context ID of a guest; use 3 to 4294967294")]
    Cid(u64),
    /// No room for `_PORT`.
    #[error("socket path {0} is too long; use at most 96 bytes")]
    PathTooLong(PathBuf),
    /// A process listens there.
    #[error("socket {0} is in use by another process; choose another path or stop that process")]
    InUse(PathBuf),
    /// Something that must not be removed.
    #[error("{0} exists and is not a socket; choose another path or remove it")]
    NotASocket(PathBuf),
    /// The kernel's reason.
    #[error("cannot listen on socket {path}; its directory must exist and be writable")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The process or host has no more descriptors.
    #[error("cannot make an epoll or timer descriptor")]
    Descriptors(#[source] io::Error),
}

/// What lives as long as the device.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) listener: UnixListener,
    pub(super) timer: OwnedFd,
    pub(super) poll: Poll,
    /// [`WINDOW`], but in tests that want to fill it often.
    pub(super) window: u32,
    path: PathBuf,
    /// Device and inode of the socket file, so that nobody else's is removed.
    identity: Option<(u64, u64)>,
}

impl Host {
    pub(super) fn open(path: &Path) -> Result<Self, VsockError> {
        if path.as_os_str().as_bytes().len() > PATH_MAX {
            return Err(VsockError::PathTooLong(path.to_owned()));
        }
        let failed = |source| VsockError::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let listener = listener.map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        Ok(Self {
            listener,
            timer: timer.map_err(|e| VsockError::Descriptors(e.into()))?,
            poll: Poll::open().map_err(VsockError::Descriptors)?,
            window: WINDOW,
            path: path.to_owned(),
            identity: identity(path),
        })
    }

    /// The next process that connected, or `None`.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(e) => match io::Error::from(e) {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                // The process went away again.
                e if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Connects to the service behind host port `port`, without waiting for it.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(Path::new(&path))?)?;
        Ok(socket.into())
    }

    /// Makes the timer readable after `wait`; never with `None`.
    pub(super) fn arm(&self, wait: Option<Duration>) {
        // All zeros disarm.
        let wait = wait.map_or(Duration::ZERO, |wait| wait.max(Duration::from_nanos(1)));
        let time = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(wait.subsec_nanos()),
            },
        };
        if let Err(e) = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time) {
            log::warn!("vsock timer cannot be set: {e}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == identity(&self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path)
        .ok()
        .map(|meta| (meta.dev(), meta.ino()))
}

/// Removes a socket file that nobody listens on: a predecessor was killed.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if !is_socket {
        return Err(VsockError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(VsockError::InUse(path.to_owned())),
    }
    fs::remove_file(path).map_err(|source| VsockError::Listen {
        path: path.to_owned(),
        source,
    })
}

/// A process that connected and has not named a port yet.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) socket: UnixStream,
    pub(super) bytes: Vec<u8>,
}

impl Line {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            bytes: vec![],
        }
    }

    /// Reads on, never past the end of the line: the port, or `None` if the line is not complete.
    ///
    /// # Errors
    /// The line is no request, or the process is gone.
    pub(super) fn read(&mut self) -> io::Result<Option<u32>> {
        let mut ahead = [0; LINE_MAX];
        let room = LINE_MAX.saturating_sub(self.bytes.len());
        let window = ahead.get_mut(..room).unwrap_or_default();
        let count = match rustix::net::recv(&self.socket, window, RecvFlags::PEEK) {
            Ok((count, _)) => count,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let seen = ahead.get(..count).unwrap_or_default();
        let end = seen.iter().position(|byte| *byte == b'\n');
        let take = end.map_or(count, |end| end.saturating_add(1));
        let mut taken = vec![0; take];
        io::Read::read_exact(&mut self.socket, &mut taken)?;
        self.bytes.extend(taken);
        if end.is_some() {
            return parse(&self.bytes)
                .map(Some)
                .ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
        if count == 0 || self.bytes.len() >= LINE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(None)
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let port = text.strip_prefix("CONNECT ")?.strip_suffix('\n')?;
    port.starts_with(|c: char| c.is_ascii_digit())
        .then(|| port.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_only() {
        let path = std::env::temp_dir().join(format!("cvmm-mode-{}", std::process::id()));
        let _host = Host::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn only_connect_with_a_port_is_a_request() {
        for (line, port) in [
            ("CONNECT 52\n", Some(52)),
            ("CONNECT 4294967295\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT \n", None),
            ("CONNECT 1 \n", None),
            ("connect 1\n", None),
            ("CONNECT 1\r\n", None),
            ("\n", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line:?}");
        }
    }

    #[test]
    fn paths_are_taken_over_only_from_the_dead() {
        let dir = std::env::temp_dir().join(format!("cvmm-vsock-host-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("v.sock");
        let first = Host::open(&path).unwrap();
        assert!(matches!(Host::open(&path), Err(VsockError::InUse(_))));
        drop(first);
        assert!(!path.exists(), "orderly drop removes the file");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed process leaves it");
        let second = Host::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let foreign = UnixListener::bind(&path).unwrap();
        drop(second);
        assert!(path.exists(), "somebody else's file stays");
        drop(foreign);
        let file = dir.join("file");
        fs::write(&file, b"precious").unwrap();
        assert!(matches!(Host::open(&file), Err(VsockError::NotASocket(_))));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        assert!(matches!(
            Host::open(&dir.join("no/v")),
            Err(VsockError::Listen { .. })
        ));
        assert!(matches!(
            Host::open(&dir.join("x".repeat(97))),
            Err(VsockError::PathTooLong(_))
        ));
        fs::remove_dir_all(dir).unwrap();
    }
}
