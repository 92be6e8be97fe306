//! The file or block device behind a disk, and the system calls on it.
// UNSAFETY: ioctl, fstatfs and vectored I/O on a descriptor that the caller keeps open.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::flight::{Flight, Work};
use super::pool::{Crew, Place, Pool};
use super::uring::Uring;
use super::{Engine, Enter};

/// Sizes of a disk, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Length when it was opened.
    pub bytes: u64,
    /// Smallest unit that the host addresses; a power of two, at least 512.
    pub logical_block: u32,
    /// Smallest unit that the host writes without reading first; at least `logical_block`.
    pub physical_block: u32,
    /// Unit in which space can be freed.
    pub discard_block: u32,
}

/// An open disk, from which each queue gets its engine.
#[derive(Debug)]
pub struct Disk {
    file: Arc<File>,
    geometry: Geometry,
    in_memory: bool,
    notify: Arc<EventFd>,
    crew: Arc<Crew>,
}

impl Disk {
    /// Takes `file`, a regular file or a block device.
    ///
    /// # Errors
    /// It is something else, or the host does not answer.
    pub fn open(file: File) -> io::Result<Self> {
        let geometry = Geometry::of(&file)?;
        let file = Arc::new(file);
        Ok(Self {
            in_memory: in_memory(&file)?,
            geometry,
            notify: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            crew: Arc::new(Crew::new(Arc::clone(&file))),
            file,
        })
    }

    /// The disk's sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Readable while an engine of this disk has something to return.
    pub fn notifier(&self) -> BorrowedFd<'_> {
        // SAFETY: the event descriptor is open as long as `self.notify`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.notify.as_raw_fd()) }
    }

    /// Makes the notifier readable, so that whoever watches it calls again.
    pub fn wake(&self) {
        // The counter is full only if it is readable already.
        let _full = self.notify.write(1);
    }

    /// Takes note that the notifier was seen; call it before the engines run.
    pub fn acknowledge(&self) {
        let _empty = self.notify.read();
    }

    /// One engine for each of `queues`, the fastest that this host and file allow, for at most `depth`
    /// operations in flight each. A file in memory is copied on the spot; else the kernel's `io_uring` is used
    /// if this process may, else threads, which call `enter` first.
    pub fn engines(&self, queues: u16, depth: u16, enter: &Enter) -> Vec<Box<dyn Engine>> {
        if self.in_memory {
            return (0..queues).map(|_| self.inline_engine(depth)).collect();
        }
        let rings: io::Result<_> = (0..queues).map(|_| self.uring_engine(depth)).collect();
        rings.unwrap_or_else(|e| {
            log::info!("disk I/O uses threads, because io_uring is not available: {e}");
            (0..queues).map(|_| self.thread_engine(depth, enter)).collect()
        })
    }

    /// An engine on `io_uring` (Linux 5.18 or later), confined to this file and to what disks need.
    ///
    /// # Errors
    /// The kernel, `kernel.io_uring_disabled` or a seccomp filter forbids it.
    pub fn uring_engine(&self, depth: u16) -> io::Result<Box<dyn Engine>> {
        let uring = Uring::new(&self.file, Arc::clone(&self.notify), depth)?;
        Ok(Box::new(uring))
    }

    /// An engine on a few threads, which all engines of the disk share. They start here and call `enter` first.
    pub fn thread_engine(&self, depth: u16, enter: &Enter) -> Box<dyn Engine> {
        self.crew.staff(enter);
        let (crew, notify) = (Arc::clone(&self.crew), Arc::clone(&self.notify));
        Box::new(Pool::new(crew, notify, depth, Place::Threads))
    }

    /// An engine that does everything in the calling thread.
    pub fn inline_engine(&self, depth: u16) -> Box<dyn Engine> {
        let (crew, notify) = (Arc::clone(&self.crew), Arc::clone(&self.notify));
        Box::new(Pool::new(crew, notify, depth, Place::Caller))
    }
}

impl Geometry {
    fn of(mut file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let kind = meta.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let why = "a disk is a regular file or a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let bytes = file.seek(SeekFrom::End(0))?;
        if kind.is_file() {
            let discard_block = u32::try_from(meta.blksize()).unwrap_or(4096);
            return Ok(Self {
                bytes,
                logical_block: 512,
                physical_block: 512,
                discard_block: discard_block.clamp(512, 1 << 20),
            });
        }
        let logical_block = block_size(file, libc::BLKSSZGET)?;
        let physical_block = block_size(file, libc::BLKPBSZGET)?.max(logical_block);
        Ok(Self {
            bytes,
            logical_block,
            physical_block,
            discard_block: physical_block,
        })
    }
}

fn block_size(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: both requests write one int through the pointer, during the call only.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut size) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let size = u32::try_from(size).unwrap_or(0);
    if size < 512 || !size.is_power_of_two() {
        return Err(io::Error::other("the block device has an impossible block size"));
    }
    Ok(size)
}

/// True if the content of `file` is host memory, so that I/O is a copy and does not wait for a device.
fn in_memory(file: &File) -> io::Result<bool> {
    // The file system of a device's node, which is in memory, says nothing about the device.
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills the structure during the call only.
    let rc = unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all-zero is valid for this plain structure, and the kernel wrote it.
    let stat = unsafe { stat.assume_init() };
    Ok(matches!(
        u32::try_from(stat.f_type),
        Ok(TMPFS_MAGIC | RAMFS_MAGIC | HUGETLBFS_MAGIC)
    ))
}

const TMPFS_MAGIC: u32 = 0x0102_1994;
const RAMFS_MAGIC: u32 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Bytes of a file that are freed or zeroed in the time in which one is copied, at the least.
const FREED_FOR_ONE: u64 = 16;

/// Runs the next system call of `flight` in this thread, for as long as `limit` bytes take to copy, if it is not shorter
/// than a piece: bytes, zero for all, or a negative errno.
pub(super) fn call(file: &File, flight: &Flight, limit: u64) -> i32 {
    let fd = file.as_raw_fd();
    let pieces = flight.front(limit);
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    let rc = match flight.work() {
        Work::Read { offset } => {
            let Ok(offset) = libc::off_t::try_from(offset) else {
                return -libc::EINVAL;
            };
            // SAFETY: `pieces` is borrowed for the call and names guest memory that the flight keeps
            // mapped and pinned; the kernel writes there during the call only.
            unsafe { libc::preadv2(fd, pieces.as_ptr(), count, offset, 0) }
        }
        Work::Write { offset, flags } => {
            let Ok(offset) = libc::off_t::try_from(offset) else {
                return -libc::EINVAL;
            };
            // SAFETY: as above; the kernel reads.
            unsafe { libc::pwritev2(fd, pieces.as_ptr(), count, offset, flags) }
        }
        Work::Flush => return file.sync_data().map_or_else(|e| errno(&e), |()| 0),
        Work::Allocate {
            offset, bytes, mode, ..
        } => {
            let part = bytes.min(limit.saturating_mul(FREED_FOR_ONE));
            let (Ok(offset), Ok(length)) = (libc::off_t::try_from(offset), libc::off_t::try_from(part))
            else {
                return -libc::EINVAL;
            };
            // SAFETY: no memory is named.
            match unsafe { libc::fallocate(fd, mode, offset, length) } {
                0 if part < bytes => libc::ssize_t::try_from(part).unwrap_or(libc::ssize_t::MAX),
                rc => libc::ssize_t::try_from(rc).unwrap_or(-1),
            }
        }
    };
    if rc < 0 {
        return errno(&io::Error::last_os_error());
    }
    i32::try_from(rc).unwrap_or(i32::MAX)
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO).saturating_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_not_in_memory_because_its_node_is() {
        assert!(!in_memory(&File::open("/dev/null").unwrap()).unwrap());
        let name = format!("/dev/shm/cvmm-in-memory-{}", std::process::id());
        let file = File::create(&name).unwrap();
        std::fs::remove_file(name).unwrap();
        assert!(in_memory(&file).unwrap());
    }
}
