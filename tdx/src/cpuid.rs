//! CPUID of a TD. The module decides most of it; what it leaves to the host goes in with INIT_VM, what it shows in
//! the end is asked back, and KVM is told the same, because it decides by it (Intel TDX Module 1.5 base architecture
//! specification, "CPU Virtualization"; Linux 7.2, arch/x86/kvm/vmx/tdx.c).

use std::fmt;

use arch::x86::cpuid::{CpuidEntry, CpuidTable};

/// Width of guest-physical addresses of every machine as a TD; the top bit makes an address shared.
pub const GPAW: u32 = 48;

const FEATURES: u32 = 1;
const ECX_X2APIC: u32 = 1 << 21;
const EXTENDED_FEATURES: u32 = 7;
/// HLE and RTM, which KVM refuses for TDs.
const EBX_TSX: u32 = 1 << 4 | 1 << 11;
/// WAITPKG, which KVM refuses for TDs.
const ECX_WAITPKG: u32 = 1 << 5;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// What KVM offers that works in a TD and needs no MSR that a TD cannot reach: no delays for port I/O, a switch for
/// halt polling, 15-bit ids in MSIs. The clock, steal time and the like share memory by MSR.
const KVM_FEATURES_OF_TD: u32 = 1 << 1 | 1 << 12 | 1 << 15;
const EXTENDED: u32 = 0x8000_0001;
const EDX_NX: u32 = 1 << 20;
const EDX_1GIB_PAGES: u32 = 1 << 26;
const EDX_LONG_MODE: u32 = 1 << 29;
const SIZES: u32 = 0x8000_0008;
const SIZES_GPAW_SHIFT: u32 = 16;
const SIZES_GPAW: u32 = 0xff << SIZES_GPAW_SHIFT;

/// Changes what the host offers into what TDs may see.
pub fn adapt(table: &mut CpuidTable) {
    for entry in table.leaf_mut(EXTENDED_FEATURES) {
        if entry.subleaf.unwrap_or(0) == 0 {
            entry.ebx &= !EBX_TSX;
            entry.ecx &= !ECX_WAITPKG;
        }
    }
    for entry in table.leaf_mut(KVM_FEATURES) {
        entry.eax &= KVM_FEATURES_OF_TD;
        entry.edx = 0;
    }
    for entry in table.leaf_mut(SIZES) {
        entry.eax = with_gpaw(entry.eax);
    }
    // A TD's topology is configured by this leaf alone.
    let levels: Vec<_> = table.leaf_mut(TOPOLOGY).map(|entry| *entry).collect();
    table.0.retain(|entry| entry.leaf != TOPOLOGY_V2);
    table.0.extend(levels.into_iter().map(|entry| CpuidEntry {
        leaf: TOPOLOGY_V2,
        ..entry
    }));
}

fn with_gpaw(eax: u32) -> u32 {
    eax & !SIZES_GPAW | GPAW << SIZES_GPAW_SHIFT
}

/// The values for INIT_VM: what `table` has of each bit that is `configurable`. The kernel takes no other leaf, takes an
/// entry without a sub-leaf for all of them, and wants the width of guest-physical addresses.
pub fn configure(configurable: &CpuidTable, table: &CpuidTable) -> CpuidTable {
    let values = configurable.0.iter().map(|mask| {
        let subleaf = mask.subleaf.unwrap_or(0);
        let value = table.get(mask.leaf, subleaf).copied().unwrap_or_default();
        CpuidEntry {
            leaf: mask.leaf,
            subleaf: Some(subleaf),
            eax: if mask.leaf == SIZES {
                with_gpaw(value.eax & mask.eax)
            } else {
                value.eax & mask.eax
            },
            ebx: value.ebx & mask.ebx,
            ecx: value.ecx & mask.ecx,
            edx: value.edx & mask.edx,
        }
    });
    CpuidTable(values.collect())
}

/// CPUID for KVM: what the module shows (`effective`), with x2APIC, which every TD has, and KVM's own leaves as the
/// host offers them, without which Linux does not use x2APIC.
pub fn reconcile(effective: &CpuidTable, table: &CpuidTable) -> CpuidTable {
    let mut result = effective.clone();
    for entry in result.leaf_mut(FEATURES) {
        entry.ecx |= ECX_X2APIC;
    }
    for leaf in [KVM_SIGNATURE, KVM_FEATURES] {
        if let Some(entry) = table.get(leaf, 0) {
            result.replace(*entry);
        }
    }
    result
}

/// Width of guest-physical addresses that `effective` states.
pub fn gpaw(effective: &CpuidTable) -> u32 {
    let sizes = effective.get(SIZES, 0).map_or(0, |entry| entry.eax);
    (sizes & SIZES_GPAW) >> SIZES_GPAW_SHIFT
}

/// Bits that a TD needs and that the module does not show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf, 0 where the leaf has none.
    pub subleaf: u32,
    /// Register.
    pub register: &'static str,
    /// The bits.
    pub missing: u32,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leaf,
            subleaf,
            register,
            missing,
        } = self;
        write!(f, "leaf {leaf:#x}")?;
        if *subleaf != 0 {
            write!(f, ".{subleaf}")?;
        }
        write!(f, " {register} lacks {missing:#010x}")?;
        let known = NAMES
            .iter()
            .filter(|(at, in_register, bits, _)| (at, in_register) == (leaf, register) && bits & missing != 0)
            .map(|(_, _, _, name)| *name);
        let known: Vec<_> = known.collect();
        if known.is_empty() {
            Ok(())
        } else {
            write!(f, " ({})", known.join(", "))
        }
    }
}

/// What the boot shim cannot do without.
static NAMES: &[(u32, &str, u32, &str)] = &[
    (EXTENDED, "EDX", EDX_LONG_MODE, "long mode"),
    (EXTENDED, "EDX", EDX_NX, "no-execute pages"),
    (EXTENDED, "EDX", EDX_1GIB_PAGES, "1 GiB pages"),
];

impl Conflict {
    /// Several of them, for messages.
    pub(crate) fn list(conflicts: &[Self]) -> String {
        let words: Vec<_> = conflicts.iter().map(ToString::to_string).collect();
        words.join("; ")
    }
}

/// Bits of `wanted` that `effective` does not have.
pub fn differences(wanted: &CpuidTable, effective: &CpuidTable) -> Vec<Conflict> {
    let mut found = Vec::new();
    for want in &wanted.0 {
        let subleaf = want.subleaf.unwrap_or(0);
        let has = effective.get(want.leaf, subleaf).copied().unwrap_or_default();
        for (register, want_bits, has_bits) in [
            ("EAX", want.eax, has.eax),
            ("EBX", want.ebx, has.ebx),
            ("ECX", want.ecx, has.ecx),
            ("EDX", want.edx, has.edx),
        ] {
            let missing = want_bits & !has_bits;
            if missing != 0 {
                found.push(Conflict {
                    leaf: want.leaf,
                    subleaf,
                    register,
                    missing,
                });
            }
        }
    }
    found
}

/// What no machine can do without: long mode, and what the boot page tables use.
pub fn needed() -> CpuidTable {
    CpuidTable(vec![CpuidEntry {
        leaf: EXTENDED,
        edx: EDX_LONG_MODE | EDX_NX | EDX_1GIB_PAGES,
        ..CpuidEntry::default()
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_td_may_see_is_taken_out() {
        let mut table = CpuidTable(vec![
            CpuidEntry::new(7, Some(0), [1, u32::MAX, u32::MAX, 0]),
            CpuidEntry::new(7, Some(1), [0, 0x810, 0x20, 0]),
            CpuidEntry::new(0xb, Some(0), [0, 1, 0x100, 0]),
            CpuidEntry::new(0xb, Some(1), [2, 4, 0x201, 0]),
            CpuidEntry::new(0x1f, Some(0), [9; 4]),
            CpuidEntry::new(0x4000_0001, None, [0x0100_7efb, 0, 0, 3]),
            CpuidEntry::new(0x8000_0008, None, [0x0030_3934, 0, 0, 0]),
        ]);
        adapt(&mut table);
        let get = |leaf, subleaf| *table.get(leaf, subleaf).unwrap();
        assert_eq!((get(7, 0).ebx, get(7, 0).ecx), (!0x810, !0x20));
        assert_eq!(get(7, 1), CpuidEntry::new(7, Some(1), [0, 0x810, 0x20, 0]));
        assert_eq!(
            get(0x4000_0001, 0),
            CpuidEntry::new(0x4000_0001, None, [0x1002, 0, 0, 0])
        );
        assert_eq!(get(0x8000_0008, 0).eax, 0x0030_3934);
        assert_eq!(get(0x1f, 1), CpuidEntry::new(0x1f, Some(1), [2, 4, 0x201, 0]));
        assert_eq!(table.0.iter().filter(|e| e.leaf == 0x1f).count(), 2);
    }

    #[test]
    fn init_vm_gets_configurable_leaves_and_bits_and_nothing_else() {
        let configurable = CpuidTable(vec![
            CpuidEntry::new(1, Some(0), [0x0fff_3fff, 0x00ff_0000, 1 << 24, 1 << 28]),
            CpuidEntry::new(7, Some(1), [0x10, 0, 0, 0]),
            CpuidEntry::new(0x1f, Some(2), [0x1f, 0xffff, 0xff00, 0]),
            CpuidEntry::new(0x8000_0008, Some(0), [0x00ff_0000, 0x200, 0, 0]),
        ]);
        let table = CpuidTable(vec![
            CpuidEntry::new(1, None, [u32::MAX; 4]),
            CpuidEntry::new(7, Some(0), [u32::MAX; 4]),
            CpuidEntry::new(7, Some(1), [0x30, 1, 1, 1]),
            CpuidEntry::new(0xd, Some(0), [7, 0, 0, 0]),
            CpuidEntry::new(0x8000_0008, None, [0x0034_3034, 0x2ff, 5, 0]),
        ]);
        let expected = CpuidTable(vec![
            CpuidEntry::new(1, Some(0), [0x0fff_3fff, 0x00ff_0000, 1 << 24, 1 << 28]),
            CpuidEntry::new(7, Some(1), [0x10, 0, 0, 0]),
            CpuidEntry::new(0x1f, Some(2), [0; 4]),
            CpuidEntry::new(0x8000_0008, Some(0), [0x0030_0000, 0x200, 0, 0]),
        ]);
        assert_eq!(configure(&configurable, &table), expected);
    }

    #[test]
    fn kvm_is_told_what_the_td_sees_and_its_own_leaves() {
        let effective = CpuidTable(vec![
            CpuidEntry::new(1, None, [1, 2, 4, 8]),
            CpuidEntry::new(0x8000_0008, None, [0x0030_3034, 0, 0, 0]),
        ]);
        let host = CpuidTable(vec![
            CpuidEntry::new(1, None, [u32::MAX; 4]),
            CpuidEntry::new(0x4000_0000, None, [0x4000_0001, 1, 2, 3]),
            CpuidEntry::new(0x4000_0001, None, [0x1002, 0, 0, 0]),
        ]);
        let expected = CpuidTable(vec![
            CpuidEntry::new(1, None, [1, 2, 4 | 1 << 21, 8]),
            CpuidEntry::new(0x8000_0008, None, [0x0030_3034, 0, 0, 0]),
            CpuidEntry::new(0x4000_0000, None, [0x4000_0001, 1, 2, 3]),
            CpuidEntry::new(0x4000_0001, None, [0x1002, 0, 0, 0]),
        ]);
        assert_eq!(reconcile(&effective, &host), expected);
        assert_eq!((gpaw(&effective), gpaw(&CpuidTable::default())), (48, 0));
    }

    #[test]
    fn what_is_missing_is_named_bit_by_bit() {
        let shown = CpuidTable(vec![CpuidEntry::new(0x8000_0001, None, [0, 0, 0, 1 << 29])]);
        let conflicts = differences(&needed(), &shown);
        assert_eq!(
            Conflict::list(&conflicts),
            "leaf 0x80000001 EDX lacks 0x04100000 (no-execute pages, 1 GiB pages)"
        );
        let wanted = CpuidTable(vec![CpuidEntry::new(7, Some(1), [0x10, 0, 2, 0])]);
        assert_eq!(
            Conflict::list(&differences(&wanted, &shown)),
            "leaf 0x7.1 EAX lacks 0x00000010; leaf 0x7.1 ECX lacks 0x00000002"
        );
    }
}
