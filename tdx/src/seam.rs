//! Completion status of a SEAMCALL, in words (Intel TDX Module 1.5 ABI specification, "Function Completion Status
//! Operand IDs" and "Function Completion Status Codes").

use std::fmt;

/// Completion status of a SEAMCALL, as KVM passes it on: the upper half says what happened, the lower half where, for
/// most codes as the id of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeamStatus(pub u64);

const REPORT: &str = "report this as a bug in cvmm, with the output of --log-level debug";
const AGAIN: &str = "try again";
const SEE_LOG: &str = "see `dmesg | grep -i tdx`; reboot the host if it persists";

/// Upper half, name, cause, remedy.
type Row = (u32, &'static str, &'static str, &'static str);

static STATUS: &[Row] = &[
    (
        0x4000_0001,
        "NON_RECOVERABLE_VCPU",
        "the vCPU cannot run any more",
        SEE_LOG,
    ),
    (
        0x4000_0002,
        "NON_RECOVERABLE_TD",
        "the TD cannot run any more",
        SEE_LOG,
    ),
    (
        0x6000_0005,
        "NON_RECOVERABLE_TD_NON_ACCESSIBLE",
        "the TD's memory failed an integrity check",
        "take the machine out of service if it persists: memory may be faulty or tampered with",
    ),
    (
        0x6000_0007,
        "NON_RECOVERABLE_TD_WRONG_APIC_MODE",
        "the host's local APIC is not in x2APIC mode",
        "enable x2APIC in the BIOS and boot the host without nox2apic",
    ),
    (
        0x8000_0003,
        "INTERRUPTED_RESUMABLE",
        "the module was interrupted",
        AGAIN,
    ),
    (
        0x8000_0200,
        "OPERAND_BUSY",
        "another processor is using what the command needs",
        AGAIN,
    ),
    (
        0x8000_0201,
        "PREVIOUS_TLB_EPOCH_BUSY",
        "a processor still runs with old translations",
        AGAIN,
    ),
    (0x8000_0202, "SYS_BUSY", "the module is busy", AGAIN),
    (
        0x8000_0203,
        "RND_NO_ENTROPY",
        "the processor's random number generator is exhausted",
        AGAIN,
    ),
    (
        0x8000_0500,
        "SYS_SHUTDOWN",
        "the module has been shut down",
        SEE_LOG,
    ),
    (
        0x8000_0600,
        "TD_ASSOCIATED_PAGES_EXIST",
        "pages still belong to the TD",
        SEE_LOG,
    ),
    (
        0x8000_0702,
        "VCPU_NOT_ASSOCIATED",
        "the vCPU is on no processor",
        REPORT,
    ),
    (
        0x8000_0800,
        "KEY_GENERATION_FAILED",
        "the processor could not make a key",
        AGAIN,
    ),
    (
        0x8000_0824,
        "FLUSHVP_NOT_DONE",
        "a vCPU is still on some processor",
        SEE_LOG,
    ),
    (
        0xc000_0100,
        "OPERAND_INVALID",
        "the module refuses a value",
        REPORT,
    ),
    (
        0xc000_0300,
        "PAGE_METADATA_INCORRECT",
        "a page of the host is in use by another TD or by the module",
        SEE_LOG,
    ),
    (
        0xc000_0500,
        "SYS_INIT_NOT_DONE",
        "the module is not initialised",
        SEE_LOG,
    ),
    (
        0xc000_0605,
        "OP_STATE_INCORRECT",
        "the TD is not in the state that the command needs",
        REPORT,
    ),
    (0xc000_0606, "NO_VCPUS", "the TD has no vCPU", REPORT),
    (
        0xc000_0700,
        "VCPU_STATE_INCORRECT",
        "the vCPU is not in the state that the command needs",
        REPORT,
    ),
    (
        0xc000_0705,
        "MAX_VCPUS_EXCEEDED",
        "the TD has more vCPUs than it may",
        "give fewer --cpus",
    ),
    (
        0xc000_0811,
        "KEY_STATE_INCORRECT",
        "a key id is not in the state that the command needs",
        SEE_LOG,
    ),
    (
        0xc000_0b00,
        "EPT_WALK_FAILED",
        "the TD's page tables lead to no such page",
        REPORT,
    ),
    (
        0xc000_0b0a,
        "EPT_ENTRY_NOT_FREE",
        "the TD has a page at this address already",
        REPORT,
    ),
    (
        0xc000_0b0d,
        "EPT_ENTRY_STATE_INCORRECT",
        "the page is not in the state that the command needs",
        REPORT,
    ),
    (
        0xc000_0c02,
        "METADATA_FIELD_NOT_READABLE",
        "the module keeps a field to itself",
        "update the TDX module (BIOS, or the host's intel-tdx-module package)",
    ),
];

/// Operands by id.
static OPERANDS: &[(u32, &str)] = &[
    (0, "RAX"),
    (1, "RCX"),
    (2, "RDX"),
    (3, "RBX"),
    (5, "RBP"),
    (6, "RSI"),
    (7, "RDI"),
    (8, "R8"),
    (9, "R9"),
    (10, "R10"),
    (11, "R11"),
    (12, "R12"),
    (13, "R13"),
    (14, "R14"),
    (15, "R15"),
    (64, "ATTRIBUTES"),
    (65, "XFAM"),
    (66, "EXEC_CONTROLS"),
    (67, "EPTP_CONTROLS"),
    (68, "MAX_VCPUS"),
    (69, "CPUID_CONFIG"),
    (70, "TSC_FREQUENCY"),
    (71, "NUM_L2_VMS"),
    (72, "IA32_ARCH_CAPABILITIES_CONFIG"),
    (95, "PAGE"),
    (128, "TDR"),
    (129, "TDCX"),
    (130, "TDVPR"),
    (144, "TDCS"),
    (145, "TDVPS"),
    (146, "SEPT"),
    (147, "SEPT_ENTRY"),
    (168, "RTMR"),
    (169, "TD_EPOCH"),
    (172, "OP_STATE"),
    (176, "METADATA_FIELD"),
    (177, "NUM_VCPUS"),
];

/// What to do about an operand that the module refuses, where it is the user's.
static REFUSED: &[(u32, &str, &str)] = &[
    (
        64,
        "the module does not allow these attributes",
        "give --td-attributes that `cvmm doctor` lists",
    ),
    (
        65,
        "the module does not allow this combination of extended state",
        "update the TDX module, and report this as a bug in cvmm",
    ),
    (
        68,
        "the module does not allow this many vCPUs",
        "give fewer --cpus",
    ),
    (
        69,
        "the module refuses a CPUID value that KVM lists as configurable",
        "update kernel and TDX module to versions that go together; --log-level debug lists the values",
    ),
    (
        70,
        "the module refuses the frequency of the time-stamp counter: it takes 100 MHz to 10 GHz",
        "check that the host's kernel has measured its TSC: `dmesg | grep -i tsc`",
    ),
];

impl SeamStatus {
    fn halves(self) -> (u32, u32) {
        let [a, b, c, d, e, f, g, h] = self.0.to_le_bytes();
        (u32::from_le_bytes([e, f, g, h]), u32::from_le_bytes([a, b, c, d]))
    }

    fn row(self) -> Option<&'static Row> {
        let (code, _) = self.halves();
        STATUS.iter().find(|row| row.0 == code)
    }

    /// Name in the module's specification.
    pub fn name(self) -> &'static str {
        self.row().map_or("unknown to this version of cvmm", |row| row.1)
    }

    /// The operand that the status is about.
    pub fn operand(self) -> Option<&'static str> {
        const WITH_OPERAND: [u32; 3] = [0xc000_0100, 0x8000_0200, 0xc000_0300];
        let (code, id) = self.halves();
        if !WITH_OPERAND.contains(&code) {
            return None;
        }
        OPERANDS
            .iter()
            .find(|(known, _)| *known == id)
            .map(|(_, name)| *name)
    }

    /// Cause and remedy.
    pub(crate) fn words(self) -> (&'static str, &'static str) {
        let (code, id) = self.halves();
        let refused = REFUSED.iter().find(|row| code == 0xc000_0100 && row.0 == id);
        if let Some((_, cause, remedy)) = refused {
            return (cause, remedy);
        }
        self.row()
            .map_or(("the TDX module fails", SEE_LOG), |(_, _, cause, remedy)| {
                (*cause, *remedy)
            })
    }
}

impl fmt::Display for SeamStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SEAMCALL status {:#018x} {}", self.0, self.name())?;
        match self.operand() {
            Some(operand) => write!(f, ", operand {operand}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_operand_are_named() {
        let cases = [
            (
                0xc000_0100_0000_0045,
                "SEAMCALL status 0xc000010000000045 OPERAND_INVALID, operand CPUID_CONFIG",
                "CPUID value",
            ),
            (
                0xc000_0100_0000_0040,
                "SEAMCALL status 0xc000010000000040 OPERAND_INVALID, operand ATTRIBUTES",
                "attributes",
            ),
            (
                0x8000_0200_0000_0080,
                "SEAMCALL status 0x8000020000000080 OPERAND_BUSY, operand TDR",
                "another processor",
            ),
            (
                0xc000_0100_0000_00ff,
                "SEAMCALL status 0xc0000100000000ff OPERAND_INVALID",
                "refuses a value",
            ),
            (
                0x8000_0203_0000_0000,
                "SEAMCALL status 0x8000020300000000 RND_NO_ENTROPY",
                "random number",
            ),
            (
                0xdead_beef_0000_0000,
                "SEAMCALL status 0xdeadbeef00000000 unknown to this version of cvmm",
                "module fails",
            ),
        ];
        for (raw, text, cause) in cases {
            let status = SeamStatus(raw);
            assert_eq!(status.to_string(), text);
            assert!(status.words().0.contains(cause), "{:?}", status.words());
        }
    }

    #[test]
    fn tables_are_sorted_and_without_doubles() {
        assert!(STATUS.is_sorted_by(|a, b| a.0 < b.0));
        assert!(OPERANDS.is_sorted_by(|a, b| a.0 < b.0));
    }
}
