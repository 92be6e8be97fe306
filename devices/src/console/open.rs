//! Opening each kind of console.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::stream::Stream;
use super::terminal::{self, RawMode};
use super::{ConsoleError, ConsoleSpec};

/// Clients that wait for their turn.
const BACKLOG: i32 = 4;

/// An opened host side.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) reader: Option<Stream>,
    pub(super) writer: Option<Stream>,
    pub(super) listener: Option<Listener>,
    /// A person types, so the escape sequence counts.
    pub(super) raw: Option<RawMode>,
    /// The terminal side of a pseudo-terminal. While it is open, the other side sees no hang-up.
    #[expect(dead_code, reason = "only held open")]
    pub(super) terminal: Option<OwnedFd>,
    pub(super) terminal_path: Option<PathBuf>,
    pub(super) size: Option<(u16, u16)>,
}

pub(super) fn open(spec: &ConsoleSpec) -> Result<Link, ConsoleError> {
    match spec {
        ConsoleSpec::Stdio => stdio().map_err(ConsoleError::Stdio),
        ConsoleSpec::Pty => pty().map_err(ConsoleError::Pty),
        ConsoleSpec::File(path) => file(path).map_err(|source| ConsoleError::File {
            path: path.clone(),
            source,
        }),
        ConsoleSpec::Socket(path) => Ok(Link {
            listener: Some(Listener::bind(path)?),
            ..Link::default()
        }),
        ConsoleSpec::Null => Ok(Link::default()),
    }
}

/// A terminal in the background is left alone: no input, no raw mode.
fn stdio() -> io::Result<Link> {
    let typed = terminal::owns_terminal();
    let reads = typed || !rustix::termios::isatty(stdin());
    let open_stdin = || Stream::shared(stdin(), OFlags::RDONLY);
    Ok(Link {
        reader: reads.then(open_stdin).transpose()?,
        writer: Some(Stream::shared(stdout(), OFlags::WRONLY)?),
        raw: typed.then(|| RawMode::enter(stdin())).transpose()?,
        size: terminal::size(stdout()),
        ..Link::default()
    })
}

fn pty() -> io::Result<Link> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = openpt(flags)?;
    grantpt(&host)?;
    unlockpt(&host)?;
    let terminal = ioctl_tiocgptpeer(&host, flags)?;
    let mut mode = tcgetattr(&terminal)?;
    mode.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &mode)?;
    let path = ptsname(&host, vec![])?;
    rustix::io::ioctl_fionbio(&host, true)?;
    Ok(Link {
        reader: Some(Stream::new(fcntl_dupfd_cloexec(&host, 3)?)),
        writer: Some(Stream::new(host)),
        terminal: Some(terminal),
        terminal_path: Some(OsStr::from_bytes(path.to_bytes()).into()),
        ..Link::default()
    })
}

fn file(path: &Path) -> io::Result<Link> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOCTTY;
    // Non-blocking for the sake of FIFOs; files do not care.
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?;
    Ok(Link {
        writer: Some(Stream::new(fd)),
        ..Link::default()
    })
}

/// A listening unix socket, removed when dropped if the path still leads to it.
#[derive(Debug)]
pub(super) struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode.
    identity: Option<(u64, u64)>,
}

impl Listener {
    fn bind(path: &Path) -> Result<Self, ConsoleError> {
        let failed = |source: io::Error| ConsoleError::Socket {
            path: path.to_owned(),
            source,
        };
        match Self::try_bind(path) {
            Err(error) if error.raw_os_error() == Some(Errno::ADDRINUSE.raw_os_error()) => {
                remove_stale(path)?;
                Self::try_bind(path).map_err(failed)
            }
            result => result.map_err(failed),
        }
    }

    /// Only the owner may connect: the mode is set between binding and listening.
    fn try_bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        let listener = Self {
            fd,
            path: path.to_owned(),
            identity: identity(path),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listen(&listener.fd, BACKLOG)?;
        Ok(listener)
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The next client, as reader and writer.
    pub(super) fn accept(&self) -> io::Result<(Stream, Stream)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let client = rustix::net::accept_with(&self.fd, flags)?;
        let twin = fcntl_dupfd_cloexec(client.as_fd(), 3)?;
        Ok((Stream::new(client), Stream::new(twin)))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody listens on any more, what a killed process leaves behind.
fn remove_stale(path: &Path) -> Result<(), ConsoleError> {
    let path_owned = || path.to_owned();
    let socket = |source| ConsoleError::Socket {
        path: path_owned(),
        source,
    };
    let metadata = fs::symlink_metadata(path).map_err(socket)?;
    if !metadata.file_type().is_socket() {
        return Err(ConsoleError::NotSocket { path: path_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(socket)
        }
        _ => Err(ConsoleError::InUse { path: path_owned() }),
    }
}
