//! CPUID policy of every machine version: what KVM offers, minus what this machine does not have, plus topology.

use arch::x86::cpuid::{CpuidEntry, CpuidTable};

/// CPUID.1:ECX bits.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:EDX.HTT: more than one logical processor in the package.
const EDX_HTT: u32 = 1 << 28;

const LEAF_CACHE: u32 = 4;
const LEAF_PERFMON: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;

const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Bits of an APIC id that number `cpus` processors.
fn id_bits(cpus: u32) -> u32 {
    cpus.max(1).next_power_of_two().trailing_zeros()
}

/// The table for vCPU 0 of a machine with `cpus` vCPUs, from what KVM supports: one package, one thread per
/// core, no performance counters, no MONITOR.
pub fn adapt(mut table: CpuidTable, cpus: u32) -> CpuidTable {
    for entry in table.leaf_mut(1) {
        entry.ecx = entry.ecx & !ECX_MONITOR | ECX_X2APIC | ECX_HYPERVISOR | ECX_TSC_DEADLINE;
        entry.ebx = entry.ebx & 0xff00_ffff | cpus.min(255) << 16;
        entry.edx = if cpus > 1 {
            entry.edx | EDX_HTT
        } else {
            entry.edx & !EDX_HTT
        };
    }
    for entry in table.leaf_mut(LEAF_CACHE) {
        // Bits 31:26: cores in the package, minus one; bits 25:14: processors sharing the cache, minus one.
        let cores = cpus.min(64).saturating_sub(1) << 26;
        if entry.eax & 0x1f != 0 {
            entry.eax = entry.eax & 0x3fff | cores;
        }
    }
    for entry in table.leaf_mut(LEAF_AMD_SIZES) {
        entry.ecx = id_bits(cpus) << 12 | cpus.min(256).saturating_sub(1);
    }
    for leaf in [LEAF_PERFMON, LEAF_TOPOLOGY_V2] {
        table.0.retain(|e| e.leaf != leaf);
    }
    table.replace(CpuidEntry {
        leaf: LEAF_TOPOLOGY,
        subleaf: Some(0),
        ebx: 1,
        ecx: LEVEL_THREAD,
        ..Default::default()
    });
    table.0.push(CpuidEntry {
        leaf: LEAF_TOPOLOGY,
        subleaf: Some(1),
        eax: id_bits(cpus),
        ebx: cpus,
        ecx: LEVEL_CORE | 1,
        edx: 0,
    });
    table
}

/// True if the guest's page tables may have 1 GiB pages (CPUID 0x80000001 EDX bit 26).
pub fn has_gib_pages(table: &CpuidTable) -> bool {
    table.get(0x8000_0001, 0).is_some_and(|e| e.edx & 1 << 26 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_sees_its_own_id_and_all_see_the_same_package() {
        let host = CpuidTable(vec![
            CpuidEntry {
                leaf: 1,
                ebx: 0x0510_0800,
                ecx: ECX_MONITOR,
                ..Default::default()
            },
            CpuidEntry {
                leaf: LEAF_PERFMON,
                eax: 7,
                ..Default::default()
            },
            CpuidEntry {
                leaf: LEAF_TOPOLOGY_V2,
                subleaf: Some(0),
                ..Default::default()
            },
        ]);
        let table = adapt(host, 6).for_vcpu(5);
        let one = table.get(1, 0).unwrap();
        assert_eq!(
            (one.ebx, one.ecx & ECX_MONITOR, one.edx & EDX_HTT),
            (0x0506_0800, 0, EDX_HTT)
        );
        let core = table.get(LEAF_TOPOLOGY, 1).unwrap();
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert!(table.get(LEAF_PERFMON, 0).is_none() && table.get(LEAF_TOPOLOGY_V2, 0).is_none());
    }

    #[test]
    fn id_bits_number_every_processor() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (65, 7)] {
            assert_eq!(id_bits(cpus), bits, "{cpus}");
        }
    }
}
