//! The exits that only SNP guests make: termination requests and requests for certificates
//! (Linux 7.2, include/uapi/linux/kvm.h; GHCB specification, revision 2.04, "Termination Request").

use std::fmt;

use arch::addr::Gpa;
use arch::exit::PlatformExit;

use crate::bytes::{le32, le64, put};

const EXIT_SYSTEM_EVENT: u32 = 24;
const EXIT_SNP_REQ_CERTS: u32 = 43;
const SYSTEM_EVENT_SEV_TERM: u32 = 6;
/// Code of a termination request in the low 12 bits of the GHCB MSR.
const MSR_TERMINATE: u64 = 0x100;

/// Words for a reason code in the set of the measured firmware; `None` if it is none of its codes.
pub type OwnReasons = fn(u8) -> Option<String>;

/// How the guest asked to be terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Termination {
    /// By the GHCB MSR, with a reason.
    Reason {
        /// Who defines the code: 0 the GHCB specification, 1 Linux, 2 cvmm's shim, 3 to 15 others.
        set: u8,
        /// The code.
        code: u8,
    },
    /// By an exit from the GHCB page, which KVM passes on without the reason.
    Ghcb {
        /// Where the page is.
        gpa: Gpa,
    },
}

impl Termination {
    /// Decodes what KVM passes on.
    pub fn decode(data: u64) -> Self {
        if data & 0xfff != MSR_TERMINATE {
            return Self::Ghcb { gpa: Gpa(data) };
        }
        let [_, set, code, ..] = data.to_le_bytes();
        Self::Reason { set: set >> 4, code }
    }

    /// What it means; `own` knows the codes of set 2.
    pub fn words(self, own: OwnReasons) -> String {
        let Self::Reason { set, code } = self else {
            return self.to_string();
        };
        let known = match set {
            0 => GHCB_REASONS.get(usize::from(code)).map(ToString::to_string),
            1 => LINUX_REASONS.get(usize::from(code)).map(ToString::to_string),
            2 => own(code),
            _ => None,
        };
        let by = match set {
            0 => "the guest",
            1 => "the guest's Linux kernel",
            2 => "the shim",
            _ => "the guest's firmware",
        };
        known.map_or_else(|| self.to_string(), |words| format!("{by} terminated: {words}"))
    }
}

impl fmt::Display for Termination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reason { set, code } => {
                write!(
                    f,
                    "the guest terminated with code {code:#x} of reason set {set}, which cvmm does not know"
                )
            }
            Self::Ghcb { gpa } => write!(
                f,
                "the guest terminated through its GHCB at {:#x}; the reason is in the host's kernel log",
                gpa.0
            ),
        }
    }
}

/// Reason set 0.
const GHCB_REASONS: [&str; 3] = [
    "general termination request",
    "the host speaks no GHCB protocol version that the guest does",
    "the host does not support the SNP features that the guest needs",
];

/// Reason set 1 (Linux 7.2, arch/x86/include/asm/sev-common.h).
const LINUX_REASONS: [&str; 13] = [
    "the host did not accept the GHCB page",
    "a page state change failed: the host refused a conversion or answered wrongly",
    "PVALIDATE failed: a page was swapped, or was validated before",
    "not running at VMPL0",
    "the CPUID page could not be used, or lacks a leaf",
    "the host gave no CPUID answer",
    "the secrets page could not be used",
    "running below VMPL0 without an SVSM",
    "an SVSM is announced although the guest is at VMPL0",
    "the SVSM's calling area could not be used",
    "Secure TSC could not be set up",
    "the SVSM's calling area could not be mapped again",
    "Secure AVIC could not be set up",
];

/// An exit of an SNP guest.
#[derive(Debug)]
pub enum SnpExit<'a> {
    /// The guest wants to end.
    Terminated(Termination),
    /// The guest wants the certificates for its reports.
    Certificates(CertRequest<'a>),
}

impl<'a> SnpExit<'a> {
    /// Decodes `exit`; `None` if it is none of an SNP guest's.
    pub fn decode(exit: PlatformExit<'a>) -> Option<Self> {
        match exit.reason {
            EXIT_SYSTEM_EVENT if le32(exit.body, 0) == Some(SYSTEM_EVENT_SEV_TERM) => {
                Some(Self::Terminated(Termination::decode(le64(exit.body, 8)?)))
            }
            EXIT_SNP_REQ_CERTS => Some(Self::Certificates(CertRequest { body: exit.body })),
            _ => None,
        }
    }
}

/// A request for certificates. Guest-chosen: the address may be anything, private or no memory at all.
#[derive(Debug)]
pub struct CertRequest<'a> {
    body: &'a mut [u8; 256],
}

/// Answers that KVM takes; any other number makes the next `KVM_RUN` fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertAnswer {
    /// The table is in the guest's memory.
    Written,
    /// The table needs this many pages.
    TooSmall {
        /// Pages needed.
        pages: u64,
    },
    /// Certificates are being replaced; the guest tries again.
    Busy,
    /// Certificates cannot be had.
    Failed,
}

impl CertRequest<'_> {
    /// Where the guest wants the table.
    pub fn gpa(&self) -> Gpa {
        Gpa(le64(self.body, 0).unwrap_or(u64::MAX))
    }

    /// Pages that the guest has for it.
    pub fn pages(&self) -> u64 {
        le64(self.body, 8).unwrap_or(0)
    }

    /// Leaves the answer for KVM.
    pub fn answer(self, answer: CertAnswer) {
        let code = match answer {
            CertAnswer::Written => 0,
            CertAnswer::TooSmall { pages } => {
                put(self.body, 8, &pages.to_ne_bytes());
                libc::ENOSPC
            }
            CertAnswer::Busy => libc::EAGAIN,
            CertAnswer::Failed => libc::EIO,
        };
        put(self.body, 16, &u64::from(code.unsigned_abs()).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(code: u8) -> Option<String> {
        (code == 8).then(|| "the kernel is not the measured one".to_string())
    }

    #[test]
    fn terminations_are_told_in_words() {
        let cases = [
            (0x0000_0100, "the guest terminated: general termination request"),
            (
                0x0002_0100,
                "the guest terminated: the host does not support the SNP features that the guest needs",
            ),
            (
                0x0002_1100,
                "the guest's Linux kernel terminated: PVALIDATE failed: a page was swapped, or was validated before",
            ),
            (
                0x0008_2100,
                "the shim terminated: the kernel is not the measured one",
            ),
            (
                0x00ff_2100,
                "the guest terminated with code 0xff of reason set 2, which cvmm does not know",
            ),
            (
                0x00ff_1100,
                "the guest terminated with code 0xff of reason set 1, which cvmm does not know",
            ),
            (
                0x0001_f100,
                "the guest terminated with code 0x1 of reason set 15, which cvmm does not know",
            ),
            (
                0x0011_e000,
                "the guest terminated through its GHCB at 0x11e000; the reason is in the host's kernel log",
            ),
        ];
        for (data, words) in cases {
            assert_eq!(Termination::decode(data).words(own), words);
        }
    }

    #[test]
    fn exits_are_decoded() {
        let mut body = [0; 256];
        put(&mut body, 0, &6u32.to_ne_bytes());
        put(&mut body, 8, &0x0001_0100_u64.to_ne_bytes());
        let exit = PlatformExit {
            vcpu: 0,
            reason: 24,
            body: &mut body,
        };
        let Some(SnpExit::Terminated(t)) = SnpExit::decode(exit) else {
            panic!("not a termination")
        };
        assert_eq!(t, Termination::Reason { set: 0, code: 1 });
        put(&mut body, 0, &7u32.to_ne_bytes());
        assert!(
            SnpExit::decode(PlatformExit {
                vcpu: 0,
                reason: 24,
                body: &mut body
            })
            .is_none()
        );
        assert!(
            SnpExit::decode(PlatformExit {
                vcpu: 0,
                reason: 40,
                body: &mut body
            })
            .is_none()
        );
    }

    #[test]
    fn certificate_answers_are_those_that_kvm_takes() {
        let cases = [
            (CertAnswer::Written, 2, 0),
            (CertAnswer::TooSmall { pages: 5 }, 5, 28),
            (CertAnswer::Busy, 2, 11),
            (CertAnswer::Failed, 2, 5),
        ];
        for (answer, pages, code) in cases {
            let mut body = [0; 256];
            put(&mut body, 0, &0x7000_u64.to_ne_bytes());
            put(&mut body, 8, &2_u64.to_ne_bytes());
            let exit = PlatformExit {
                vcpu: 0,
                reason: 43,
                body: &mut body,
            };
            let Some(SnpExit::Certificates(request)) = SnpExit::decode(exit) else {
                panic!("not a request")
            };
            assert_eq!((request.gpa(), request.pages()), (Gpa(0x7000), 2));
            request.answer(answer);
            assert_eq!(
                (le64(&body, 8), le64(&body, 16)),
                (Some(pages), Some(code)),
                "{answer:?}"
            );
        }
    }
}
