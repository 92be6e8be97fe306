//! Conversions on a real VM: an SNP one where the host has SNP (the emulated host of `scripts/rig --snp`), an ordinary
//! one elsewhere. Without /dev/kvm it fails: there is no machine for cvmm to test on.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use arch::addr::{Gpa, PageRange};
use arch::kvm::gmem::Gmem;
use arch::kvm::system::Host;
use arch::kvm::vm::Vm;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use vm_memory::{Bytes, GuestAddress};
use vmm::ram::{GuestRam, KvmBacking, ranges};

const BYTES: u64 = 64 << 20;
const SNP_VM: u64 = 4;

/// What must not grow: descriptors, mappings, and pages of guest RAM on either side.
fn footprint(host: &HostRam) -> (usize, usize, u64) {
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    let mappings = fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let all = PageRange::new(Gpa(0), BYTES).unwrap();
    (descriptors, mappings, host.resident_bytes(all).unwrap())
}

fn page(frame: u64) -> PageRange {
    PageRange::new(Gpa(frame.checked_mul(0x1000).unwrap()), 0x1000).unwrap()
}

/// C52 and C55 of the list of hostile cases.
#[test]
fn a_thousand_conversions_leave_memory_mappings_and_descriptors_where_they_were() {
    let kvm = Host::open(Path::new("/dev/kvm")).unwrap();
    let private = kvm.capabilities().vm_types & (1 << SNP_VM) != 0;
    let vm_type = if private { SNP_VM } else { 0 };
    println!("VM type {vm_type}, private memory: {private}");
    let vm = Arc::new(Vm::create(&kvm, vm_type).unwrap());
    let ram_ranges = ranges(BYTES).unwrap();
    let host = HostRam::allocate(&ram_ranges).unwrap();
    let gmem = private.then(|| Gmem::new(&vm, BYTES).unwrap());
    let visible = Arc::new(VisibilityMap::new(&ram_ranges, Visibility::Shared));
    let shared = SharedMem::new(Arc::clone(host.map()), Arc::clone(&visible));
    let backing = KvmBacking::new(vm, host.clone(), gmem).unwrap();
    let ram = GuestRam::new(shared, visible, Box::new(backing));

    let mut before = None;
    for round in 0..1000_u64 {
        // Alternating pages, so that no two neighbours are ever on the same side.
        for frame in (round % 2..64).step_by(2) {
            let at = page(frame);
            ram.convert(at, Visibility::Private).unwrap();
            assert_eq!(host.resident_bytes(at).unwrap(), 0, "the shared side is gone");
            assert!(ram.shared().write_obj(1_u8, GuestAddress(at.start().0)).is_err());
            ram.convert(at, Visibility::Shared).unwrap();
            ram.shared().write_obj(1_u8, GuestAddress(at.start().0)).unwrap();
        }
        if round == 1 {
            before = Some(footprint(&host));
        }
    }
    assert_eq!(Some(footprint(&host)), before);
    assert_eq!(ram.gauges().private_bytes, 0);
    assert_eq!(ram.gauges().conversions, 1000 * 32 * 2);
}
