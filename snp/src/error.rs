//! What firmware and kernel answer, in words: cause and remedy for each code that a launch can meet
//! (SEV-SNP Firmware ABI, revision 1.58, "Status Codes"; KVM's `arch/x86/kvm/svm/sev.c`).

use std::fmt;
use std::io;

use arch::addr::Gpa;

use crate::commands::Command;
use crate::cpuid_page::Correction;
use crate::id_block::IdBlockError;
use crate::measure::MeasureError;

/// A status code of the security processor's firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareStatus(pub u32);

/// Code, name, cause, remedy.
type Row = (u32, &'static str, &'static str, &'static str);

const RESTART_HOST: &str = "reboot the host";
const REPORT: &str = "report this as a bug in cvmm, with the output of --log-level debug";
const UPDATE: &str = "update the host's BIOS and SEV firmware";

static TABLE: &[Row] = &[
    (
        0x01,
        "INVALID_PLATFORM_STATE",
        "the security processor is not initialised for SNP",
        "reload kvm_amd and ccp, and look for SEV-SNP lines in the kernel log",
    ),
    (
        0x02,
        "INVALID_GUEST_STATE",
        "the guest is not in the state that this command needs",
        REPORT,
    ),
    (
        0x03,
        "INVALID_CONFIG",
        "the platform configuration is invalid",
        "check the SEV and SNP settings in the BIOS",
    ),
    (0x04, "INVALID_LENGTH", "a buffer was too small", REPORT),
    (
        0x05,
        "ALREADY_OWNED",
        "the platform belongs to another owner",
        "reset the platform owner in the BIOS",
    ),
    (
        0x06,
        "INVALID_CERTIFICATE",
        "a certificate is invalid",
        "give the certificates that belong to this machine",
    ),
    (
        0x07,
        "POLICY_FAILURE",
        "the guest policy asks for what this platform does not have",
        "allow in --policy what the host has (SMT, firmware ABI version), or change the host",
    ),
    (0x08, "INACTIVE", "the guest has no address space", REPORT),
    (
        0x09,
        "INVALID_ADDRESS",
        "an address is not usable by firmware",
        "free host memory and try again; if it persists, check the BIOS's RMP coverage",
    ),
    (
        0x0a,
        "BAD_SIGNATURE",
        "a signature in the ID block does not verify",
        "sign the ID block again with cvmm id-block",
    ),
    (
        0x0b,
        "BAD_MEASUREMENT",
        "the launch digest is not the one in the ID block",
        "make the ID block from the same arguments: cvmm id-block prints the digest that it signs",
    ),
    (
        0x0c,
        "ASID_OWNED",
        "the address space id is still in use",
        "end other confidential guests, or wait until they are gone",
    ),
    (
        0x0d,
        "INVALID_ASID",
        "the address space id is out of range",
        "set more SEV-ES/SNP ASIDs in the BIOS (\"minimum SEV ASID\" above 1)",
    ),
    (
        0x0e,
        "WBINVD_REQUIRED",
        "caches must be written back first",
        "try again",
    ),
    (
        0x0f,
        "DF_FLUSH_REQUIRED",
        "the data fabric must be flushed first",
        "try again",
    ),
    (0x10, "INVALID_GUEST", "the guest handle is invalid", REPORT),
    (
        0x11,
        "INVALID_COMMAND",
        "the firmware does not know this command",
        UPDATE,
    ),
    (0x12, "ACTIVE", "the guest is already active", REPORT),
    (
        0x13,
        "HARDWARE_PLATFORM",
        "the hardware reports a failure that is safe to continue from",
        RESTART_HOST,
    ),
    (
        0x14,
        "HARDWARE_UNSAFE",
        "the hardware reports a failure that makes it unsafe",
        "take this machine out of service",
    ),
    (
        0x15,
        "UNSUPPORTED",
        "the firmware or the CPU lacks a requested feature",
        "leave the feature out, or update the SEV firmware",
    ),
    (
        0x16,
        "INVALID_PARAM",
        "firmware refuses a value in the command",
        REPORT,
    ),
    (
        0x17,
        "RESOURCE_LIMIT",
        "the firmware has no room for another guest",
        "end other confidential guests",
    ),
    (
        0x18,
        "SECURE_DATA_INVALID",
        "the firmware's own data failed an integrity check",
        UPDATE,
    ),
    (
        0x19,
        "INVALID_PAGE_SIZE",
        "a page has the wrong size in the RMP",
        REPORT,
    ),
    (
        0x1a,
        "INVALID_PAGE_STATE",
        "a page is in the wrong state in the RMP",
        "check that nothing else on the host uses this memory; if it persists, reboot the host",
    ),
    (0x1b, "INVALID_MDATA_ENTRY", "a metadata entry is invalid", REPORT),
    (
        0x1c,
        "INVALID_PAGE_OWNER",
        "a page belongs to another guest",
        RESTART_HOST,
    ),
    (
        0x1d,
        "AEAD_OFLOW",
        "a message counter would overflow",
        "start a new guest",
    ),
    (
        0x1f,
        "EXIT_RING_BUFFER",
        "the firmware left ring-buffer mode",
        "try again",
    ),
    (
        0x20,
        "RMP_INIT_REQUIRED",
        "the RMP is not initialised",
        "reboot the host with SNP enabled in the BIOS",
    ),
    (
        0x21,
        "BAD_SVN",
        "the firmware's security version is lower than the committed one",
        UPDATE,
    ),
    (
        0x22,
        "BAD_VERSION",
        "the firmware's version is lower than the committed one",
        UPDATE,
    ),
    (
        0x23,
        "SHUTDOWN_REQUIRED",
        "SNP must be shut down first",
        "reload kvm_amd and ccp",
    ),
    (0x24, "UPDATE_FAILED", "a firmware update failed", UPDATE),
    (
        0x25,
        "RESTORE_REQUIRED",
        "the committed firmware must be installed first",
        UPDATE,
    ),
    (
        0x26,
        "RMP_INIT_FAILED",
        "the RMP could not be initialised",
        RESTART_HOST,
    ),
    (
        0x27,
        "INVALID_KEY",
        "the requested key is not present or not allowed",
        "choose the VCEK, or load a VLEK on this host",
    ),
];

impl FirmwareStatus {
    fn row(self) -> Option<&'static Row> {
        TABLE.iter().find(|row| row.0 == self.0)
    }

    /// Name in the firmware's specification.
    pub fn name(self) -> &'static str {
        self.row().map_or("unknown to this version of cvmm", |row| row.1)
    }

    /// What it means.
    pub fn cause(self) -> &'static str {
        self.row().map_or("firmware refuses the command", |row| row.2)
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        self.row()
            .map_or("look the code up in the SEV-SNP firmware ABI", |row| row.3)
    }
}

impl fmt::Display for FirmwareStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "firmware status {:#x} {}", self.0, self.name())
    }
}

/// A launch command that was not carried out.
#[derive(Debug)]
pub struct Refusal {
    /// Which.
    pub command: Command,
    /// Firmware's status; `None` if firmware was not reached.
    pub firmware: Option<FirmwareStatus>,
    /// The kernel's answer.
    pub kernel: io::Error,
}

impl Refusal {
    /// A refusal with this errno and firmware status (0 = firmware not reached).
    pub fn new(command: Command, errno: i32, firmware: u32) -> Self {
        let firmware = (firmware != 0).then_some(FirmwareStatus(firmware));
        Self {
            command,
            firmware,
            kernel: io::Error::from_raw_os_error(errno),
        }
    }

    /// The kernel's error number.
    pub fn errno(&self) -> i32 {
        self.kernel.raw_os_error().unwrap_or(0)
    }

    /// Cause and remedy, in words.
    fn words(&self) -> (&'static str, &'static str) {
        if let Some(status) = self.firmware {
            return (status.cause(), status.remedy());
        }
        match (self.command, self.errno()) {
            (Command::Init2, libc::EPERM) => ("the VM is initialised already", REPORT),
            (Command::Init2, libc::EBUSY) => (
                "all address space ids for SNP guests are in use, or their cgroup limit (misc, sev_es) is reached",
                "end other confidential guests, or raise the limit",
            ),
            (Command::Init2, libc::ENODEV) => (
                "there is no security processor",
                "load the ccp module and enable SEV in the BIOS",
            ),
            (Command::Init2, libc::ENOTTY) => (
                "SEV or its range of ids for SNP guests is off",
                "load kvm_amd with sev_snp=1 and set the minimum SEV ASID above 1 in the BIOS",
            ),
            (Command::Init2, libc::EINVAL) => (
                "the kernel does not offer a requested VMSA feature",
                "leave debug-swap or secure-tsc out",
            ),
            (Command::Start, libc::EINVAL) => (
                "the kernel does not offer a policy bit",
                "leave out of --policy what the host does not offer",
            ),
            (Command::Start, libc::ENOTTY) => (
                "the guest context could not be created",
                "check that /dev/sev is usable and firmware is initialised",
            ),
            (Command::Update, libc::EIO) => (
                "the kernel could not load a page (it was not private, already added, or unreadable)",
                REPORT,
            ),
            (_, libc::EBUSY | libc::ETIMEDOUT) => ("the security processor does not answer", RESTART_HOST),
            (_, libc::EBADF) => ("/dev/sev was closed", REPORT),
            _ => ("the kernel refuses the command", REPORT),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cause, remedy) = self.words();
        write!(f, "{} was refused: {cause}", self.command)?;
        if let Some(status) = self.firmware {
            write!(f, " ({status})")?;
        }
        write!(f, "; {remedy}")
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.kernel)
    }
}

/// A launch that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum SnpError {
    /// Firmware or kernel refused a command.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Firmware wants other CPUID values; the page that was passed now holds them.
    #[error(
        "firmware refuses the CPUID page at {:#x}: {}; hide these features from the guest, or accept the corrections",
        gpa.0,
        Correction::list(corrections)
    )]
    CpuidRejected {
        /// The page.
        gpa: Gpa,
        /// What firmware changed.
        corrections: Vec<Correction>,
    },
    /// Contents that do not fill their range.
    #[error(transparent)]
    Contents(#[from] MeasureError),
    /// A command that reports success without getting on would repeat for ever.
    #[error("the kernel reports success for pages at {:#x} but loads none; report this as a bug", gpa.0)]
    NoProgress {
        /// The page.
        gpa: Gpa,
    },
    /// The ID block cannot match, so firmware is not asked.
    #[error(transparent)]
    IdBlock(#[from] IdBlockError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_cause_and_remedy() {
        let cases = [
            (Command::Finish, libc::EIO, 0xb, "BAD_MEASUREMENT"),
            (Command::Start, libc::EIO, 7, "--policy"),
            (Command::Init2, libc::EBUSY, 0, "end other confidential guests"),
            (Command::Init2, libc::EINVAL, 0, "debug-swap"),
            (Command::Update, libc::EIO, 0x999, "0x999 unknown"),
        ];
        for (command, errno, firmware, says) in cases {
            let text = Refusal::new(command, errno, firmware).to_string();
            assert!(text.contains(says), "{text}");
            assert!(text.starts_with(&command.to_string()), "{text}");
        }
    }

    #[test]
    fn the_table_is_sorted_and_complete_up_to_the_last_code() {
        assert!(TABLE.is_sorted_by(|a, b| a.0 < b.0));
        let missing: Vec<u32> = (1..=0x27)
            .filter(|code| FirmwareStatus(*code).row().is_none())
            .collect();
        assert_eq!(missing, [0x1e], "0x1e is not a code");
    }
}
