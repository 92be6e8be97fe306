//! Why the shim stopped the machine: a number on the wire, words for people.

use core::fmt;

/// A reason for which the shim terminates. [`Reason::code`] travels in the low byte of the termination
/// value on the shim port, as the reason code of a GHCB MSR termination in the shim's own set, or in the low byte
/// of the error code of a TD's fatal error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The entry mode in RDI is none that this shim serves.
    UnknownMode,
    /// The CONFIG page is malformed.
    BadConfig,
    /// The descriptor is malformed.
    BadDescriptor,
    /// RAM tops are misaligned, out of the machine's range, or outside the owner's bounds.
    BadRam,
    /// The number of vCPUs is zero or above the owner's bound.
    BadVcpus,
    /// The staged kernel or initrd has another length than CONFIG names, or lies outside the staging area.
    BadStaging,
    /// Kernel and initrd do not fit in low RAM.
    NoRoom,
    /// The staged kernel differs from the one that CONFIG names.
    KernelMismatch,
    /// The staged initrd differs from the one that CONFIG names.
    InitrdMismatch,
    /// The kernel is no bzImage that can be entered in 64-bit mode at a chosen address.
    BadKernel,
    /// The tables for the kernel outgrew their area.
    TablesFull,
    /// The shim was about to validate memory twice or outside RAM.
    BadValidation,
    /// SEV_STATUS denies SNP or names a feature that the shim does not know.
    SevStatus,
    /// The CPUID page is malformed or names another C-bit position.
    CpuidPage,
    /// The hypervisor speaks no GHCB protocol version 2, or misanswered.
    GhcbProtocol,
    /// The hypervisor lacks the SNP feature bit.
    GhcbFeatures,
    /// The hypervisor refused the GHCB page.
    GhcbRegister,
    /// PVALIDATE failed.
    Pvalidate,
    /// PVALIDATE changed nothing: the host had mapped a validated page here before (double validation).
    DoubleValidation,
    /// The shim hit a bug of its own.
    Bug,
    /// The TD's guest-physical addresses have not 48 bits.
    TdAddressWidth,
    /// The TD's attributes allow debugging, or #VE for memory that is not accepted.
    TdAttributes,
    /// TDG.MEM.PAGE.ACCEPT failed.
    Accept,
    /// TDG.MR.RTMR.EXTEND failed.
    RtmrExtend,
    /// The TDX module or the hypervisor refused a TDG.VP.VMCALL.
    TdVmcall,
    /// A processor exception, by vector (0 to 31).
    Exception(u8),
}

/// Code of exception 0; vectors follow.
const EXCEPTION: u8 = 0x80;
/// Number of architectural vectors.
const VECTORS: u8 = 32;

/// Every reason but exceptions.
const ALL: [Reason; 25] = [
    Reason::UnknownMode,
    Reason::BadConfig,
    Reason::BadDescriptor,
    Reason::BadRam,
    Reason::BadVcpus,
    Reason::BadStaging,
    Reason::NoRoom,
    Reason::KernelMismatch,
    Reason::InitrdMismatch,
    Reason::BadKernel,
    Reason::TablesFull,
    Reason::BadValidation,
    Reason::SevStatus,
    Reason::CpuidPage,
    Reason::GhcbProtocol,
    Reason::GhcbFeatures,
    Reason::GhcbRegister,
    Reason::Pvalidate,
    Reason::DoubleValidation,
    Reason::Bug,
    Reason::TdAddressWidth,
    Reason::TdAttributes,
    Reason::Accept,
    Reason::RtmrExtend,
    Reason::TdVmcall,
];

impl Reason {
    /// The number on the wire, never 0; part of every machine, so none ever changes.
    #[must_use]
    pub fn code(self) -> u8 {
        let vector = if let Reason::Exception(vector) = self {
            vector % VECTORS
        } else {
            0
        };
        self.first_code() | vector
    }

    /// The code, for an exception that of vector 0: constants alone, which compile to an addition.
    fn first_code(self) -> u8 {
        match self {
            Reason::UnknownMode => 0x01,
            Reason::BadConfig => 0x02,
            Reason::BadDescriptor => 0x03,
            Reason::BadRam => 0x04,
            Reason::BadVcpus => 0x05,
            Reason::BadStaging => 0x06,
            Reason::NoRoom => 0x07,
            Reason::KernelMismatch => 0x08,
            Reason::InitrdMismatch => 0x09,
            Reason::BadKernel => 0x0a,
            Reason::TablesFull => 0x0b,
            Reason::BadValidation => 0x0c,
            Reason::SevStatus => 0x0d,
            Reason::CpuidPage => 0x0e,
            Reason::GhcbProtocol => 0x0f,
            Reason::GhcbFeatures => 0x10,
            Reason::GhcbRegister => 0x11,
            Reason::Pvalidate => 0x12,
            Reason::DoubleValidation => 0x13,
            Reason::Bug => 0x14,
            Reason::TdAddressWidth => 0x15,
            Reason::TdAttributes => 0x16,
            Reason::Accept => 0x17,
            Reason::RtmrExtend => 0x18,
            Reason::TdVmcall => 0x19,
            Reason::Exception(_) => EXCEPTION,
        }
    }

    /// The reason behind a number, if it is one of the shim's.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        match code.checked_sub(EXCEPTION) {
            Some(vector) => (vector < VECTORS).then_some(Reason::Exception(vector)),
            None => ALL.into_iter().find(|reason| reason.code() == code),
        }
    }

    /// Words for people; of an exception without its vector.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Reason::UnknownMode => "the shim was entered in an unknown mode",
            Reason::BadConfig => "the measured parameter page is malformed",
            Reason::BadDescriptor => "the machine descriptor is malformed",
            Reason::BadRam => "the amount of memory is outside the bounds in the measured parameters",
            Reason::BadVcpus => "the number of vCPUs is outside the bounds in the measured parameters",
            Reason::BadStaging => "the length of the kernel or initrd differs from the measured parameters",
            Reason::NoRoom => "kernel and initrd do not fit in memory below 3 GiB",
            Reason::KernelMismatch => "the kernel is not the measured one (SHA-256 differs)",
            Reason::InitrdMismatch => "the initrd is not the measured one (SHA-256 differs)",
            Reason::BadKernel => "the kernel is not a relocatable bzImage with a 64-bit entry point",
            Reason::TablesFull => "the boot tables outgrew their area",
            Reason::BadValidation => "the shim refused to validate memory twice or outside RAM",
            Reason::SevStatus => "the processor reports no SNP or an unknown SEV feature",
            Reason::CpuidPage => "the CPUID page is malformed or names another C-bit",
            Reason::GhcbProtocol => "the hypervisor does not speak GHCB protocol version 2",
            Reason::GhcbFeatures => "the hypervisor does not offer SNP over the GHCB",
            Reason::GhcbRegister => "the hypervisor refused to register the GHCB",
            Reason::Pvalidate => "PVALIDATE failed",
            Reason::DoubleValidation => "a page was validated before: the host replayed memory",
            Reason::Bug => "the shim hit a bug of its own",
            Reason::TdAddressWidth => "the trust domain's guest-physical addresses have not 48 bits",
            Reason::TdAttributes => "the trust domain's attributes have DEBUG set or SEPT_VE_DISABLE clear",
            Reason::Accept => "the TDX module refused to accept a page",
            Reason::RtmrExtend => "the TDX module refused to extend a measurement register",
            Reason::TdVmcall => "the hypervisor refused a call of the trust domain",
            Reason::Exception(_) => "the shim took a processor exception",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())?;
        if let Reason::Exception(vector) = self {
            write!(f, " (vector {vector})")?;
        }
        Ok(())
    }
}

impl core::error::Error for Reason {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::string::ToString;

    #[test]
    fn every_code_leads_back_to_its_reason() {
        let mut codes = BTreeSet::new();
        let exceptions = (0..32).map(Reason::Exception);
        for reason in ALL.into_iter().chain(exceptions) {
            assert_eq!(Reason::from_code(reason.code()), Some(reason));
            assert!(codes.insert(reason.code()), "{reason:?} shares its code");
        }
        assert!(!codes.contains(&0));
    }

    #[test]
    fn unknown_codes_have_no_reason() {
        for code in [0, 0x1a, 0x7f, 0xa0, 0xff] {
            assert_eq!(Reason::from_code(code), None, "{code:#x}");
        }
    }

    #[test]
    fn an_exception_names_its_vector() {
        assert!(Reason::Exception(14).to_string().ends_with("(vector 14)"));
    }
}
