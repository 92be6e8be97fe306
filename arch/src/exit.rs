//! What a vCPU asks of userspace, free of KVM types so that tests can script it.

use crate::addr::{Gpa, PageRange};
use crate::mem::Visibility;

/// One exit from guest mode. Buffers borrow the `kvm_run` page.
#[derive(Debug)]
#[expect(missing_docs, reason = "each variant documents its fields")]
pub enum Exit<'a> {
    /// IN from `port`, `size` bytes at a time (1, 2 or 4); fill `data`, a multiple of `size` long.
    PioIn {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// OUT of `data` to `port`, `size` bytes at a time.
    PioOut { port: u16, size: usize, data: &'a [u8] },
    /// Read from `gpa`, which has no RAM behind it as far as KVM knows; fill `data`, 1 to 8 bytes.
    MmioRead { gpa: Gpa, data: &'a mut [u8] },
    /// Write of `data` to `gpa`, which has no RAM behind it as far as KVM knows.
    MmioWrite { gpa: Gpa, data: &'a [u8] },
    /// The guest asks to move `pages` pages at `gpa` to side `to` (`KVM_HC_MAP_GPA_RANGE`); nothing checked.
    Convert {
        gpa: u64,
        pages: u64,
        to: Visibility,
        reply: Reply<'a>,
    },
    /// The guest touched `range` as if it were on side `wants` (`KVM_EXIT_MEMORY_FAULT`).
    WrongSide { range: PageRange, wants: Visibility },
    /// A request only one platform understands, e.g. a TDX quote (`KVM_EXIT_TDX`).
    Platform(PlatformExit<'a>),
    /// A kick from another thread, or KVM asks to enter again; no guest request.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// The CPU refused to enter the guest; `hardware_entry_failure_reason`.
    EntryFailed(u64),
    /// KVM gave up (`KVM_EXIT_INTERNAL_ERROR`).
    Internal { suberror: u32, data: [u64; 4] },
}

/// Exit that is opaque to everyone but its platform.
#[derive(Debug)]
pub struct PlatformExit<'a> {
    /// Index of the vCPU.
    pub vcpu: u32,
    /// Raw `kvm_run.exit_reason`.
    pub reason: u32,
    /// The union behind it in `kvm_run` (offset 32), where the platform reads arguments and leaves answers.
    pub body: &'a mut [u8; 256],
}

/// Answers KVM accepts to a conversion request; any other number makes the next `KVM_RUN` fail. Positive
/// errno values, unlike ordinary hypercalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Answer {
    /// Converted.
    Done = 0,
    /// Not now (`EAGAIN`): a TDX guest tries again, an SNP guest takes it as refusal.
    Retry = 11,
    /// Not a range that can be converted (`EINVAL`).
    Invalid = 22,
}

/// Where the answer goes: the bytes of `kvm_run.hypercall.ret`.
#[derive(Debug)]
pub struct Reply<'a>(pub &'a mut [u8; 8]);

impl Reply<'_> {
    /// Answers the guest.
    pub fn set(self, answer: Answer) {
        *self.0 = (answer as u64).to_ne_bytes();
    }
}
