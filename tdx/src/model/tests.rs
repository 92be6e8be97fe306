//! Cases 21 to 28 of `kernel-contract.md` §16, each named after what the kernel does.

mod calls;
mod memory;
mod td;
mod vcpus;

use arch::x86::cpuid::{CpuidEntry, CpuidTable};

use super::*;
use crate::commands::{Command, MemRegion, Page, TdxCommands};

const CMD: RawCmd = RawCmd {
    flags: 0,
    hw_error: 0,
};
const EINVAL: Result<(), i32> = Err(libc::EINVAL);
const SHARED: u64 = 1 << 47;

fn model() -> Model {
    let mut model = Model::create(Kernel::default(), 5).unwrap();
    model.split_irqchip(24).unwrap();
    model.exit_hypercall(1 << 12).unwrap();
    model
}

/// Every configurable leaf with nothing set, and 48 bits of address.
fn cpuid(model: &Model) -> CpuidTable {
    let mut table = model.module.capabilities().cpuid;
    for entry in &mut table.0 {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        if entry.leaf == 0x8000_0008 {
            entry.eax = 48 << 16;
        }
    }
    table
}

fn parameters(model: &Model) -> InitVm {
    InitVm {
        attributes: 1 << 28,
        xfam: 7,
        mrconfigid: [1; 48],
        mrowner: [2; 48],
        mrownerconfig: [3; 48],
        cpuid: cpuid(model),
    }
}

fn raw(init: InitVm) -> RawInit {
    RawInit {
        init,
        reserved: false,
        padding: 0,
    }
}

fn x2apic(set: bool) -> CpuidTable {
    CpuidTable(vec![CpuidEntry {
        leaf: 1,
        ecx: u32::from(set) << 21,
        ..CpuidEntry::default()
    }])
}

/// A TD with frames 0..64 in a slot and private.
fn initialised() -> Model {
    let mut model = model();
    let init = raw(parameters(&model));
    model.raw_init_vm(CMD, &init).unwrap();
    model.slot(0..64, true).unwrap();
    model.set_private(0..64);
    model
}

/// The same with a vCPU that is initialised.
fn with_vcpu() -> Model {
    let mut model = initialised();
    model.create_vcpu(0).unwrap();
    model.vcpu_set_cpuid(0, &x2apic(true)).unwrap();
    model.raw_init_vcpu(0, CMD, 0x1234).unwrap();
    model
}

/// Adds `pages` pages from `gpa` on; the answer, and how many were added.
fn add(model: &mut Model, change: impl FnOnce(&mut RawRegion<'_>, &mut RawCmd)) -> (Result<(), i32>, u64) {
    let bytes = vec![7; 8 * 4096];
    let mut cmd = RawCmd { flags: 1, ..CMD };
    let mut region = RawRegion {
        source_addr: 0x7000_0000,
        gpa: 0x1000,
        nr_pages: 1,
        source: &bytes,
    };
    change(&mut region, &mut cmd);
    let asked = region.nr_pages;
    let answer = model.raw_init_mem_region(0, cmd, &mut region);
    (answer, asked - region.nr_pages)
}

#[test]
fn refusals_pass_the_seam_with_their_command_and_status() {
    let mut model = model();
    let mut init = parameters(&model);
    init.cpuid.leaf_mut(1).next().unwrap().edx = 1;
    let refusal = model.init_vm(&init).unwrap_err();
    assert_eq!(
        (refusal.command, refusal.errno()),
        (Command::InitVm, libc::EINVAL)
    );
    assert_eq!(refusal.status.unwrap().0, 0xc000_0100_0000_0045);
    let refusal = model.init_vcpu(&mut 0, 0).unwrap_err();
    assert_eq!(
        (refusal.command, refusal.errno(), refusal.status),
        (Command::InitVcpu, libc::EINVAL, None)
    );
}
