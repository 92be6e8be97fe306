//! The console's host side.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::file::{describe, reason};
use super::socket::{self, Listener, SocketError};
use crate::config::Console;

/// Where the console goes, opened.
#[derive(Debug)]
pub enum ConsoleSpec {
    /// Standard input and output.
    Stdio,
    /// The master side of a new pseudo-terminal.
    Pty {
        /// Master side.
        master: File,
        /// What a terminal program opens.
        path: PathBuf,
    },
    /// Output only.
    File(File),
    /// One client at a time.
    Socket(Listener),
    /// Nowhere.
    None,
}

/// A console that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The socket cannot be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The file cannot be created.
    #[error("console {}: {}; give a path in a directory that exists and that this user may write to", path.display(), reason(cause))]
    File {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Something that is no file lies there.
    #[error("console {}: is a {found}; give a file, or socket=PATH for a socket", path.display())]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// No pseudo-terminal to be had.
    #[error("console pty: {}; mount devpts, or give --console socket=PATH", reason(cause))]
    Pty {
        /// The kernel's answer.
        cause: io::Error,
    },
}

impl ConsoleSpec {
    /// Looks for what would make [`open`](Self::open) fail, without creating anything.
    pub(super) fn check(console: &Console) -> Result<(), ConsoleError> {
        match console {
            Console::Stdio | Console::Pty | Console::None => Ok(()),
            Console::Socket(path) => Ok(socket::check_free("console", path)?),
            Console::File(path) => match path.metadata() {
                Ok(m) if m.is_dir() || describe(m.file_type()) == "socket" => Err(ConsoleError::WrongKind {
                    path: path.clone(),
                    found: describe(m.file_type()),
                }),
                _ => Ok(()),
            },
        }
    }

    /// Opens or creates it.
    pub(super) fn open(console: &Console) -> Result<Self, ConsoleError> {
        Ok(match console {
            Console::Stdio => Self::Stdio,
            Console::None => Self::None,
            Console::Socket(path) => Self::Socket(Listener::bind("console", path)?),
            Console::Pty => {
                let opened = arch::host::open_pty().map_err(|cause| ConsoleError::Pty { cause });
                let (master, path) = opened?;
                Self::Pty { master, path }
            }
            Console::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path);
                Self::File(file.map_err(|cause| ConsoleError::File {
                    path: path.clone(),
                    cause,
                })?)
            }
        })
    }
}
