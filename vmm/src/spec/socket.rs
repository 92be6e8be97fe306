//! Unix sockets that cvmm listens on.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::file::{describe, reason};

/// Longest path of a Unix socket: 108 bytes with the NUL (unix(7)).
const PATH_MAX: usize = 107;

/// A socket that cvmm listens on. Dropping it removes the path, if that is still this socket.
#[derive(Debug)]
pub struct Listener {
    /// The listening socket.
    pub socket: UnixListener,
    path: PathBuf,
    inode: u64,
}

/// A socket path that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Longer than the kernel takes.
    #[error("{role} {}: {} bytes are more than the {PATH_MAX} of a socket path; give a shorter one", path.display(), path.as_os_str().len())]
    LongPath {
        /// What it is for.
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("{role} {}: in use by another process; stop that one or give another path", path.display())]
    Busy {
        /// What it is for.
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket lies there.
    #[error("{role} {}: is a {found}; give another path or remove it", path.display())]
    Occupied {
        /// What it is for.
        role: &'static str,
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The kernel refuses to listen there.
    #[error("{role} {}: {}; give a path in a directory that exists and that this user may write to", path.display(), reason(cause))]
    Unusable {
        /// What it is for.
        role: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// Refuses a path that is too long.
pub(super) fn check_path(role: &'static str, path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(SocketError::LongPath {
            role,
            path: path.into(),
        });
    }
    Ok(())
}

/// Refuses what somebody listens on and what is no socket, without changing anything.
pub(super) fn check_free(role: &'static str, path: &Path) -> Result<(), SocketError> {
    check_path(role, path)?;
    let found = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(_) => return Ok(()),
    };
    if !found.is_socket() {
        return Err(SocketError::Occupied {
            role,
            path: path.into(),
            found: describe(found),
        });
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(()),
        _ => Err(SocketError::Busy {
            role,
            path: path.into(),
        }),
    }
}

impl Listener {
    /// Listens at `path`. A socket that nobody listens on any more, as a killed process leaves it, is replaced.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(role: &'static str, path: &Path) -> Result<Self, SocketError> {
        check_free(role, path)?;
        let unusable = |cause| SocketError::Unusable {
            role,
            path: path.into(),
            cause,
        };
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(unusable(e)),
            _ => {}
        }
        let socket = UnixListener::bind(path).map_err(|cause| {
            if cause.kind() == ErrorKind::AddrInUse {
                SocketError::Busy {
                    role,
                    path: path.into(),
                }
            } else {
                unusable(cause)
            }
        })?;
        let inode = fs::symlink_metadata(path).map_err(unusable)?.ino();
        Ok(Self {
            socket,
            path: path.into(),
            inode,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            log::warn!("socket {}: left behind: {e}", self.path.display());
        }
    }
}
