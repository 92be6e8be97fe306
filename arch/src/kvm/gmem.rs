//! guest_memfd: memory that the host can give to a guest and take back, but never map.
// UNSAFETY: fallocate on the descriptor, and taking ownership of the number that kvm-ioctls returns.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::kvm_create_guest_memfd;

use super::vm::Vm;

/// One guest_memfd file. Private RAM of all slots lies in one file, packed.
#[derive(Debug)]
pub struct Gmem {
    fd: OwnedFd,
}

impl Gmem {
    /// Creates a file of `bytes`, a multiple of the page size, that no process can map.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` where the VM type has no private memory.
    pub fn new(vm: &Vm, bytes: u64) -> io::Result<Self> {
        let raw = vm.fd.create_guest_memfd(kvm_create_guest_memfd {
            size: bytes,
            flags: 0,
            ..Default::default()
        })?;
        // SAFETY: the kernel has just returned `raw` as a new descriptor, and nobody else knows its number.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // The kernel creates the file without O_CLOEXEC, unlike every other KVM descriptor.
        // SAFETY: F_SETFD takes no pointer.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd })
    }

    /// Frees the pages of `[offset, offset + bytes)`; the guest's next private access finds new, zeroed ones.
    ///
    /// # Errors
    /// The kernel's.
    pub fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let file_range = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, bytes) = (file_range(offset)?, file_range(bytes)?);
        // SAFETY: fallocate takes no pointer, and no process has these pages mapped.
        let rc = unsafe { libc::fallocate(self.fd.as_raw_fd(), mode, offset, bytes) };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Bytes that are allocated now (`st_blocks`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let file = std::fs::File::from(self.fd.try_clone()?);
        Ok(file.metadata()?.blocks().saturating_mul(512))
    }

    pub(super) fn number(&self) -> u32 {
        u32::try_from(self.fd.as_raw_fd()).unwrap_or(u32::MAX)
    }
}
