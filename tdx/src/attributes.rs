//! ATTRIBUTES and XFAM of a TD (Intel TDX Module 1.5 ABI specification, "ATTRIBUTES" and "XFAM").

use arch::x86::cpuid::CpuidTable;

/// Bit by which an access to memory that the TD has not accepted ends it instead of raising an exception in it. Linux
/// does not run as a TD without it.
pub const SEPT_VE_DISABLE: u64 = 1 << 28;

/// Named bits of ATTRIBUTES.
static NAMES: &[(u32, &str)] = &[
    (0, "DEBUG"),
    (4, "HGS_PLUS_PROF"),
    (5, "PERF_PROF"),
    (6, "PMT_PROF"),
    (16, "ICSSD"),
    (27, "LASS"),
    (28, "SEPT_VE_DISABLE"),
    (29, "MIGRATABLE"),
    (30, "PKS"),
    (31, "KL"),
    (62, "TPA"),
    (63, "PERFMON"),
];

/// Attributes that a TD cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAttributes {
    /// The host does not allow them.
    #[error(
        "the host does not let a TD have the attributes {refused:#x}{}; it allows {allowed:#x}: leave the others out",
        names(*refused)
    )]
    Forbidden {
        /// The bits that it does not allow.
        refused: u64,
        /// Those that it does.
        allowed: u64,
    },
    /// Without it a host could make the guest's own exception handler run at any access.
    #[error(
        "td-attributes: without SEPT_VE_DISABLE ({SEPT_VE_DISABLE:#x}) Linux does not run as a TD; add it"
    )]
    NoSeptVeDisable,
}

/// The names of `bits`, in parentheses; empty if none has one.
fn names(bits: u64) -> String {
    let known: Vec<_> = NAMES
        .iter()
        .filter(|(bit, _)| bits >> bit & 1 != 0)
        .map(|(_, name)| *name)
        .collect();
    if known.is_empty() {
        String::new()
    } else {
        format!(" ({})", known.join(", "))
    }
}

/// Checks `wanted` against what the host allows.
///
/// # Errors
/// The bits that it does not.
pub fn check(wanted: u64, allowed: u64) -> Result<(), BadAttributes> {
    let refused = wanted & !allowed;
    if refused != 0 {
        return Err(BadAttributes::Forbidden { refused, allowed });
    }
    if wanted & SEPT_VE_DISABLE == 0 {
        return Err(BadAttributes::NoSeptVeDisable);
    }
    Ok(())
}

/// x87 and SSE, which every TD has.
const LEGACY: u64 = 0b11;
/// State that a TD gets all of or none: AVX; AVX-512; protection keys; AMX.
const GROUPS: [u64; 4] = [1 << 2, 0b111 << 5, 1 << 9, 0b11 << 17];

/// The extended state that a TD gets: what module and KVM allow (`allowed`) of what the host's CPUID offers to guests.
pub fn xfam(allowed: u64, cpuid: &CpuidTable) -> u64 {
    let offered = cpuid
        .get(0xd, 0)
        .map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    let has = allowed & offered;
    GROUPS
        .iter()
        .filter(|group| has & **group == **group)
        .fold(LEGACY, |all, group| all | group)
}

#[cfg(test)]
mod tests {
    use arch::x86::cpuid::CpuidEntry;

    use super::*;

    #[test]
    fn attributes_that_the_host_forbids_are_named() {
        assert_eq!(check(SEPT_VE_DISABLE, SEPT_VE_DISABLE), Ok(()));
        let error = check(SEPT_VE_DISABLE | 1 | 1 << 63 | 1 << 20, SEPT_VE_DISABLE).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("0x8000000000100001 (DEBUG, PERFMON); it allows 0x10000000"),
            "{text}"
        );
        assert_eq!(check(0, SEPT_VE_DISABLE), Err(BadAttributes::NoSeptVeDisable));
        let unnamed = check(1 << 50 | SEPT_VE_DISABLE, SEPT_VE_DISABLE).unwrap_err();
        assert!(
            unnamed.to_string().contains("0x4000000000000; it allows"),
            "{unnamed}"
        );
    }

    #[test]
    fn extended_state_comes_in_whole_groups_that_both_sides_have() {
        let cpuid = |eax| {
            CpuidTable(vec![CpuidEntry {
                leaf: 0xd,
                subleaf: Some(0),
                eax,
                ..CpuidEntry::default()
            }])
        };
        let cases = [
            (0x207, 0x207, 0x207),
            (u64::MAX, 0x7, 0x7),
            (0x3, 0x207, 0x3),
            (u64::MAX, 0x2e7, 0x2e7),
            (0x67, 0xe7, 0x7),
            (u64::MAX, 0x6_0007, 0x6_0007),
            (0x2_0007, 0x6_0007, 0x7),
            (u64::MAX, 0x1_0d07, 0x7),
            (0, 0, 0x3),
        ];
        for (allowed, eax, expected) in cases {
            assert_eq!(xfam(allowed, &cpuid(eax)), expected, "{allowed:#x} {eax:#x}");
        }
        assert_eq!(xfam(u64::MAX, &CpuidTable::default()), LEGACY);
    }
}
