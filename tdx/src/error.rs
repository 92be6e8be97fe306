//! What kernel and TDX module answer, in words: cause and remedy for what a launch can meet
//! (Linux 7.2, arch/x86/kvm/vmx/tdx.c).

use std::fmt;
use std::io;

use arch::addr::Gpa;

use crate::attributes::BadAttributes;
use crate::commands::Command;
use crate::cpuid::Conflict;
pub use crate::seam::SeamStatus;

const REPORT: &str = "report this as a bug in cvmm, with the output of --log-level debug";
const SEE_LOG: &str = "see `dmesg | grep -i tdx`; the reason stands there";

/// A command that the kernel or the module refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The command.
    pub command: Command,
    errno: i32,
    /// What the module said, where the kernel passes it on; commands to vCPUs never do.
    pub status: Option<SeamStatus>,
}

impl Refusal {
    /// From what the ioctl left: `hw_error` is zero where the module was not asked or its answer not passed on.
    pub fn new(command: Command, errno: i32, hw_error: u64) -> Self {
        Self {
            command,
            errno,
            status: (hw_error != 0).then_some(SeamStatus(hw_error)),
        }
    }

    /// The kernel's answer.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// Cause and remedy.
    fn words(&self) -> (&'static str, &'static str) {
        if let Some(status) = self.status {
            return status.words();
        }
        match (self.command, self.errno) {
            (_, libc::ENOTTY) => (
                "the kernel knows no TDX commands for this VM",
                "load kvm_intel with tdx=1 on Linux 6.16 or later",
            ),
            (Command::InitVm, libc::ENOSPC) => (
                "all key ids for TDs are in use",
                "end other TDs, or raise the number of TDX key ids in the BIOS",
            ),
            (Command::InitVm, libc::EBUSY) => (
                "the cgroup's limit of TDs is reached (misc controller, \"tdx\")",
                "end other TDs of this cgroup, or raise \"tdx\" in its misc.max",
            ),
            (Command::InitVm, libc::EAGAIN) => (
                "the processor's random number generator stayed exhausted",
                "try again; see what else on the host draws so much entropy",
            ),
            (Command::InitVm, libc::EINVAL) => (
                "the kernel does not allow this combination of attributes, XFAM and CPUID",
                "compare with what `cvmm doctor` lists for TDX; --log-level debug lists the values",
            ),
            (Command::InitVm, libc::EIO) => (
                "the TDX module cannot create a TD, or a processor package has no CPU online",
                SEE_LOG,
            ),
            (Command::InitVcpu, libc::EINVAL) => (
                "the vCPU's CPUID lacks x2APIC, or the vCPU is initialised already",
                REPORT,
            ),
            (Command::InitMemRegion, libc::EIO) => (
                "the page is in the TD already, or the TDX module refuses it",
                SEE_LOG,
            ),
            (Command::InitMemRegion, libc::EINVAL) => {
                ("the memory is not private, or the TD is sealed already", REPORT)
            }
            (Command::InitMemRegion, libc::EAGAIN) => (
                "the kernel could not take hold of the page for a long time",
                "try again when the host has less to do",
            ),
            (Command::FinalizeVm, libc::EBUSY) => (
                "the TDX module stayed busy",
                "try again when the host has less to do",
            ),
            (_, libc::ENOMEM) => (
                "the host has no memory left for it",
                "give a smaller --memory, or raise the cgroup's memory limit",
            ),
            (_, libc::EINTR) => ("signals kept interrupting it", "see what sends cvmm signals"),
            (_, libc::EIO) => ("the TDX module fails", SEE_LOG),
            _ => ("the kernel refuses it", REPORT),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cause, remedy) = self.words();
        write!(f, "{} was refused: {cause} (", self.command)?;
        if let Some(status) = self.status {
            write!(f, "{status}, ")?;
        }
        let kernel = io::Error::from_raw_os_error(self.errno);
        write!(f, "{kernel}); {remedy}")
    }
}

impl std::error::Error for Refusal {}

/// A launch that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum TdxError {
    /// Module or kernel refused a command.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host allows no such attributes.
    #[error(transparent)]
    Attributes(#[from] BadAttributes),
    /// The TD would not see the CPUID that it needs.
    #[error(
        "this host's TDX module shows TDs a CPUID that no machine can have: {}; update the TDX module and the kernel",
        Conflict::list(.0)
    )]
    Cpuid(Vec<Conflict>),
    /// The host has no TDs with the width of guest-physical addresses that the machine has.
    #[error(
        "the TD has guest-physical addresses of {found} bits, but machines have {}; report this as a bug in cvmm",
        crate::cpuid::GPAW
    )]
    Gpaw {
        /// The width.
        found: u32,
    },
    /// Contents that do not fill their range.
    #[error("contents of {bytes} bytes for {:#x} do not fill their range; report this as a bug in cvmm", gpa.0)]
    Contents {
        /// The range's start.
        gpa: Gpa,
        /// Bytes given.
        bytes: usize,
    },
    /// A kind of page that TDs do not have.
    #[error("a TD has no pages of the kind of {name:?}; report this as a bug in cvmm")]
    PageKind {
        /// The page.
        name: &'static str,
    },
    /// A command that reports success without getting on would repeat for ever.
    #[error("the kernel reports success for pages at {:#x} but loads none; report this as a bug in cvmm", gpa.0)]
    NoProgress {
        /// The page.
        gpa: Gpa,
    },
    /// Pages that were never loaded, because there is no vCPU to load them by.
    #[error("the plan has no vCPU; report this as a bug in cvmm")]
    NoVcpu,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_command_cause_and_remedy() {
        let cases = [
            (Command::InitVm, libc::ENOSPC, 0, "key ids for TDs are in use"),
            (Command::InitVm, libc::EBUSY, 0, "misc.max"),
            (Command::InitVm, libc::EINVAL, 0, "attributes, XFAM and CPUID"),
            (
                Command::InitVm,
                libc::EINVAL,
                0xc000_0100_0000_0045,
                "OPERAND_INVALID, operand CPUID_CONFIG",
            ),
            (Command::Capabilities, libc::ENOTTY, 0, "tdx=1"),
            (Command::InitVcpu, libc::EINVAL, 0, "x2APIC"),
            (Command::InitMemRegion, libc::EIO, 0, "in the TD already"),
            (
                Command::FinalizeVm,
                libc::EBUSY,
                0x8000_0200_0000_0080,
                "operand TDR",
            ),
            (Command::SetCpuid, libc::EPERM, 0, "Operation not permitted"),
        ];
        for (command, errno, hw_error, says) in cases {
            let text = Refusal::new(command, errno, hw_error).to_string();
            assert!(text.contains(says), "{text}");
            assert!(text.starts_with(&format!("{command} was refused: ")), "{text}");
        }
    }
}
