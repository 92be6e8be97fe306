//! Unix sockets that cvmm listens on.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::file::{describe, reason};

/// Longest path of a Unix socket: 108 bytes with the NUL (unix(7)).
const PATH_MAX: usize = 107;

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

/// Refuses what somebody listens on, what is no socket, and a directory where none can be made, without changing
/// anything.
pub(super) fn check_free(role: &'static str, path: &Path) -> Result<(), SocketError> {
    check_path(role, path)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    access(directory, Access::WRITE_OK | Access::EXEC_OK).map_err(|cause| SocketError::Unusable {
        role,
        path: path.into(),
        cause: cause.into(),
    })?;
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
