//! Disks: opened once, locked, and of a size that a disk can have.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::rate::Rates;

use super::file::{describe, reason};
use crate::config::Disk;

/// An opened and locked disk. The lock is on the open file, so it lasts as long as `file` does.
#[derive(Debug)]
pub struct DiskSpec {
    /// Open for reading, and for writing unless `readonly`.
    pub file: File,
    /// Where it came from, for messages.
    pub path: PathBuf,
    /// Its size, a multiple of [`SECTOR_BYTES`].
    pub bytes: u64,
    /// The guest may only read.
    pub readonly: bool,
    /// Request queues, 1 to [`MOST_QUEUES`].
    pub queues: u16,
    /// Rates to keep.
    pub rates: Rates,
}

/// Size of a virtio-blk sector.
pub const SECTOR_BYTES: u64 = 512;
/// Most request queues of a disk.
pub const MOST_QUEUES: u16 = 16;

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("disk {}: {}; {}", path.display(), reason(cause), remedy(cause, *readonly))]
    Unusable {
        /// The disk.
        path: PathBuf,
        /// It was to be opened for reading only.
        readonly: bool,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// It is a directory or the like.
    #[error("disk {}: is a {found}; give a raw image or a block device", path.display())]
    WrongKind {
        /// The disk.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It has no sectors.
    #[error("disk {}: is empty; make it larger, for example `truncate -s 1G {}`", path.display(), path.display())]
    Empty {
        /// The disk.
        path: PathBuf,
    },
    /// Its size is no multiple of the sector size.
    #[error(
        "disk {}: {bytes} bytes are not a multiple of 512; if it is a raw image, pad it with `truncate -s %512 {}`",
        path.display(), path.display()
    )]
    OddSize {
        /// The disk.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The same disk twice, at least once for writing.
    #[error("disk {}: given twice and not read-only both times; remove one or add ,ro to both", path.display())]
    Twice {
        /// The disk.
        path: PathBuf,
    },
    /// Another process has it.
    #[error("disk {}: in use by another process; stop that one, or give every user of it ,ro", path.display())]
    Busy {
        /// The disk.
        path: PathBuf,
    },
    /// A number of queues that a disk cannot have.
    #[error("disk {}: {queues} queues are not between 1 and {MOST_QUEUES}; give queues=N in that range", path.display())]
    Queues {
        /// The disk.
        path: PathBuf,
        /// Queues asked for.
        queues: u16,
    },
}

fn remedy(cause: &io::Error, readonly: bool) -> &'static str {
    if cause.kind() == io::ErrorKind::NotFound {
        "check the path, or create it with `truncate -s SIZE`"
    } else if readonly {
        "give this user access to it"
    } else {
        "give this user access to it, or add ,ro"
    }
}

/// Opens every disk, in order.
pub(super) fn check_all(disks: &[Disk]) -> Result<Vec<DiskSpec>, DiskError> {
    let mut opened: Vec<(Identity, DiskSpec)> = Vec::new();
    for disk in disks {
        let (identity, spec) = open(disk)?;
        let clash =
            |(other, spec2): &&(Identity, DiskSpec)| *other == identity && !(spec.readonly && spec2.readonly);
        if opened.iter().find(clash).is_some() {
            return Err(DiskError::Twice { path: spec.path });
        }
        lock(&spec)?;
        opened.push((identity, spec));
    }
    Ok(opened.into_iter().map(|(_, spec)| spec).collect())
}

/// What makes two paths the same disk: the device number of a block device, else file system and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    Block(u64),
    File(u64, u64),
}

fn open(disk: &Disk) -> Result<(Identity, DiskSpec), DiskError> {
    let path = &disk.path;
    let queues = disk.queues.unwrap_or(1);
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(DiskError::Queues {
            path: path.clone(),
            queues,
        });
    }
    let unusable = |cause| DiskError::Unusable {
        path: path.clone(),
        readonly: disk.readonly,
        cause,
    };
    let is_block = is_block_or_file(path).map_err(unusable)?.map_err(|found| {
        let path = path.clone();
        DiskError::WrongKind { path, found }
    })?;
    // On a block device O_EXCL refuses one that is mounted or part of a volume.
    let exclusive = if is_block && !disk.readonly {
        libc::O_EXCL
    } else {
        0
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(!disk.readonly)
        .custom_flags(libc::O_NONBLOCK | exclusive)
        .open(path)
        .map_err(|cause| {
            if cause.kind() == io::ErrorKind::ResourceBusy {
                DiskError::Busy { path: path.clone() }
            } else {
                unusable(cause)
            }
        })?;
    let metadata = file.metadata().map_err(unusable)?;
    let identity = if is_block {
        Identity::Block(metadata.rdev())
    } else {
        Identity::File(metadata.dev(), metadata.ino())
    };
    let bytes = file.seek(SeekFrom::End(0)).map_err(unusable)?;
    if bytes == 0 {
        return Err(DiskError::Empty { path: path.clone() });
    }
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(DiskError::OddSize {
            path: path.clone(),
            bytes,
        });
    }
    let spec = DiskSpec {
        file,
        path: path.clone(),
        bytes,
        readonly: disk.readonly,
        queues,
        rates: disk.limit.into(),
    };
    Ok((identity, spec))
}

/// Looks before opening, because opening some devices does something. True for a block device.
fn is_block_or_file(path: &Path) -> io::Result<Result<bool, &'static str>> {
    let kind = path.metadata()?.file_type();
    Ok(if kind.is_block_device() || kind.is_file() {
        Ok(kind.is_block_device())
    } else {
        Err(describe(kind))
    })
}

/// How long a disk may stay locked after its user is dead: the kernel takes io_uring's and KVM's references to files back
/// some time after SIGKILL (4 to 32 ms seen), and a supervisor restarts at once.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// Keeps two processes from writing one disk (`flock`: exclusive for writers, shared for readers).
fn lock(spec: &DiskSpec) -> Result<(), DiskError> {
    let until = Instant::now().checked_add(LOCK_PATIENCE);
    loop {
        let outcome = if spec.readonly {
            spec.file.try_lock_shared()
        } else {
            spec.file.try_lock()
        };
        match outcome {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if until.is_some_and(|until| Instant::now() < until) => {
                thread::sleep(LOCK_INTERVAL);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(DiskError::Busy {
                    path: spec.path.clone(),
                });
            }
            Err(TryLockError::Error(cause)) => {
                return Err(DiskError::Unusable {
                    path: spec.path.clone(),
                    readonly: spec.readonly,
                    cause,
                });
            }
        }
    }
}
