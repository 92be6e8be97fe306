//! Kernel, initrd and command line, and whether they fit the memory.

use std::path::PathBuf;

use shim::layout;

use super::bzimage::{BadKernel, HEAD_BYTES, Header};
use super::file::{FileError, InputFile};
use crate::config::{Boot, Size};

/// What the guest boots.
#[derive(Debug)]
pub struct Payload {
    /// The kernel image.
    pub kernel: InputFile,
    /// What its header says.
    pub header: Header,
    /// The initial RAM disk.
    pub initrd: Option<InputFile>,
    /// Command line without NUL.
    pub cmdline: String,
}

/// Why the payload cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// No kernel given.
    #[error("no kernel given; add --kernel PATH, for example --kernel /boot/vmlinuz-$(uname -r)")]
    NoKernel,
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel is not one that cvmm boots.
    #[error("kernel {}: {cause}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: BadKernel,
    },
    /// The command line is too long.
    #[error("cmdline: {bytes} bytes are more than the {limit} that the kernel takes; shorten it")]
    LongCmdline {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The command line contains a NUL.
    #[error("cmdline: contains a NUL byte; remove it")]
    NulInCmdline,
    /// The kernel and the initrd need more memory than the guest gets.
    #[error(
        "memory: {given} cannot hold the kernel and an initrd of {} MiB; give at least --memory {needed}",
        initrd_bytes.div_ceil(1 << 20)
    )]
    DoesNotFit {
        /// Memory asked for.
        given: Size,
        /// Length of the initrd.
        initrd_bytes: u64,
        /// The least memory that holds everything.
        needed: Size,
    },
    /// The kernel and the initrd fit no memory size.
    #[error("initrd {}: {} MiB cannot be placed below 3 GiB; give a smaller one", path.display(), bytes >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
}

/// Most bytes of a command line: the kernel's `COMMAND_LINE_SIZE` of 2048 less the NUL.
const CMDLINE_MAX: usize = 2047;
/// Memory beside the images without which no kernel gets to unpacking its initrd.
const RESERVE_BYTES: u64 = 16 << 20;

impl Payload {
    pub(crate) fn check(boot: &Boot, memory: Size) -> Result<Self, PayloadError> {
        let path = boot.kernel.as_deref().ok_or(PayloadError::NoKernel)?;
        let kernel = InputFile::open("kernel", path)?;
        let head = kernel.read_start("kernel", HEAD_BYTES)?;
        let header = Header::parse(&head, kernel.bytes).map_err(|cause| PayloadError::Kernel {
            path: path.into(),
            cause,
        })?;
        let initrd = boot.initrd.as_deref();
        let payload = Self {
            kernel,
            header,
            initrd: initrd.map(|path| InputFile::open("initrd", path)).transpose()?,
            cmdline: boot.cmdline.clone().unwrap_or_default(),
        };
        payload.check_cmdline()?;
        payload.check_fit(memory)?;
        Ok(payload)
    }

    fn check_cmdline(&self) -> Result<(), PayloadError> {
        let limit = CMDLINE_MAX.min(usize::try_from(self.header.cmdline_bytes).unwrap_or(CMDLINE_MAX));
        let bytes = self.cmdline.len();
        if bytes > limit {
            return Err(PayloadError::LongCmdline { bytes, limit });
        }
        if self.cmdline.contains('\0') {
            return Err(PayloadError::NulInCmdline);
        }
        Ok(())
    }

    /// Kernel and initrd both end up in low RAM, wherever the rest of the memory lies.
    fn check_fit(&self, given: Size) -> Result<(), PayloadError> {
        let initrd_bytes = self.initrd.as_ref().map_or(0, |file| file.bytes);
        let kernel = u64::from(self.header.init_bytes).max(self.kernel.bytes);
        let needed = layout::KERNEL
            .saturating_add(kernel)
            .saturating_add(initrd_bytes)
            .saturating_add(RESERVE_BYTES)
            .checked_next_multiple_of(layout::UNIT)
            .unwrap_or(u64::MAX);
        if needed <= given.0.min(layout::LOW_RAM_MAX) {
            return Ok(());
        }
        match &self.initrd {
            Some(initrd) if needed > layout::LOW_RAM_MAX => Err(PayloadError::TooLarge {
                path: initrd.path.clone(),
                bytes: initrd.bytes,
            }),
            _ => Err(PayloadError::DoesNotFit {
                given,
                initrd_bytes,
                needed: Size(needed),
            }),
        }
    }
}
