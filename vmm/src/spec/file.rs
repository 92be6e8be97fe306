//! Opening input files once, without hanging on FIFOs or touching devices.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// An opened, non-empty regular file.
#[derive(Debug)]
pub struct InputFile {
    /// Open for reading.
    pub file: File,
    /// Where it came from, for messages.
    pub path: PathBuf,
    /// Its length when it was opened.
    pub bytes: u64,
}

/// A file that cannot be what it is named for.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("{role} {}: {}; {}", path.display(), reason(cause), remedy(cause))]
    Unusable {
        /// "kernel", "initrd", ….
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// It is a directory, a FIFO or the like.
    #[error("{role} {}: is a {found}; give a file", path.display())]
    NotAFile {
        /// "kernel", "initrd", ….
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It has no content.
    #[error("{role} {}: is empty; copy it again", path.display())]
    Empty {
        /// "kernel", "initrd", ….
        role: &'static str,
        /// The file.
        path: PathBuf,
    },
}

/// What the kernel answered, in short words.
pub(super) fn reason(cause: &io::Error) -> String {
    let known = [
        (ErrorKind::NotFound, "not found"),
        (ErrorKind::PermissionDenied, "permission denied"),
        (ErrorKind::ReadOnlyFilesystem, "the file system is read-only"),
        (ErrorKind::NotADirectory, "a part of the path is no directory"),
        (ErrorKind::IsADirectory, "is a directory"),
        (ErrorKind::ConnectionRefused, "nobody listens there"),
    ];
    match known.iter().find(|(kind, _)| *kind == cause.kind()) {
        Some((_, words)) => (*words).into(),
        None => cause.to_string(),
    }
}

fn remedy(cause: &io::Error) -> &'static str {
    if cause.kind() == ErrorKind::PermissionDenied {
        "give this user access to it"
    } else {
        "check the path"
    }
}

/// Opens `path` for reading. Without `O_NONBLOCK` a FIFO would block here until somebody writes to it.
pub(crate) fn open_at_once(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// A file type in words.
pub(crate) fn describe(kind: FileType) -> &'static str {
    match kind {
        k if k.is_dir() => "directory",
        k if k.is_fifo() => "FIFO",
        k if k.is_socket() => "socket",
        k if k.is_char_device() => "character device",
        k if k.is_block_device() => "block device",
        _ => "regular file",
    }
}

impl InputFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn open(role: &'static str, path: &Path) -> Result<Self, FileError> {
        let unusable = |cause| FileError::Unusable {
            role,
            path: path.into(),
            cause,
        };
        let file = open_at_once(path).map_err(unusable)?;
        let metadata = file.metadata().map_err(unusable)?;
        if !metadata.is_file() {
            return Err(FileError::NotAFile {
                role,
                path: path.into(),
                found: describe(metadata.file_type()),
            });
        }
        if metadata.len() == 0 {
            return Err(FileError::Empty {
                role,
                path: path.into(),
            });
        }
        Ok(Self {
            file,
            path: path.into(),
            bytes: metadata.len(),
        })
    }

    /// Reads the first `most` bytes, or all if there are fewer.
    pub(crate) fn read_start(&self, role: &'static str, most: usize) -> Result<Vec<u8>, FileError> {
        let bytes = usize::try_from(self.bytes).unwrap_or(most).min(most);
        let mut content = vec![0; bytes];
        match self.file.read_exact_at(&mut content, 0) {
            Ok(()) => Ok(content),
            Err(cause) => Err(FileError::Unusable {
                role,
                path: self.path.clone(),
                cause,
            }),
        }
    }
}
