//! Cases 21 to 28 of `kernel-contract.md` §16, each named after what the kernel does.

use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use sha2::{Digest, Sha384};

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

#[test]
fn case_1_types_kvm_is_vm_type_supported() {
    for (types, vm_type, expected) in [
        (0x21, 5, Ok(())),
        (0x21, 0, Ok(())),
        (0x01, 5, EINVAL),
        (0x21, 1, EINVAL),
        (u32::MAX, 31, Ok(())),
        (u32::MAX, 32, EINVAL),
    ] {
        let kernel = Kernel {
            vm_types: types,
            ..Kernel::default()
        };
        assert_eq!(
            Model::create(kernel, vm_type).map(|_| ()),
            expected,
            "{vm_type} of {types:#x}"
        );
    }
}

#[test]
fn case_21_capabilities_tdx_get_capabilities() {
    let mut model = model();
    let entries = model.module.configurable.0.len();
    let ask = |model: &Model, cmd, room| model.raw_capabilities(cmd, room).map(|c| c.cpuid.0.len());
    assert_eq!(ask(&model, CMD, entries - 1), Err((libc::E2BIG, 0)));
    for cmd in [RawCmd { flags: 1, ..CMD }, RawCmd { hw_error: 9, ..CMD }] {
        let errno = ask(&model, cmd, 99).unwrap_err().0;
        assert_eq!(errno, libc::EINVAL, "{cmd:?}");
    }
    assert_eq!(ask(&model, CMD, entries), Ok(entries));
    let init = raw(parameters(&model));
    model.raw_init_vm(CMD, &init).unwrap();
    let offered = model.raw_capabilities(CMD, entries).unwrap();
    assert_eq!((offered.attributes, offered.user_calls), (1 << 28, 2));
    let row = |leaf| *offered.cpuid.get(leaf, 0).unwrap();
    assert_eq!(
        row(0x8000_0008).eax & 0x00ff_0000,
        0x00ff_0000,
        "the address width"
    );
    assert_eq!(
        (row(7).ebx & 0x810, row(7).ecx & 0x20),
        (0, 0),
        "TSX and WAITPKG are left out"
    );
    model.creating_vcpu = true;
    assert!(model.raw_capabilities(CMD, entries).is_ok(), "without a lock");
    let ordinary = Model::create(Kernel::default(), 0).unwrap();
    assert_eq!(ask(&ordinary, CMD, 99), Err((libc::ENOTTY, 0)));
}

#[test]
fn case_22_init_vm_tdx_td_init_setup_tdparams() {
    type Change = fn(&mut RawInit);
    fn entry(init: &mut RawInit, leaf: u32) -> &mut CpuidEntry {
        init.init.cpuid.leaf_mut(leaf).next().unwrap()
    }
    let cases: [(&str, Change, Result<(), Failure>); 14] = [
        ("as offered", |_| {}, Ok(())),
        ("GPAW 52", |r| entry(r, 0x8000_0008).eax = 52 << 16, Ok(())),
        (
            "GPAW 47",
            |r| entry(r, 0x8000_0008).eax = 47 << 16,
            Err((libc::EINVAL, 0)),
        ),
        (
            "no address sizes",
            |r| r.init.cpuid.0.retain(|e| e.leaf != 0x8000_0008),
            Err((libc::EINVAL, 0)),
        ),
        (
            "not a configurable leaf",
            |r| entry(r, 1).leaf = 2,
            Err((libc::EINVAL, 0)),
        ),
        (
            "a leaf twice",
            |r| {
                let e = *entry(r, 1);
                r.init.cpuid.0.push(e)
            },
            Err((libc::EINVAL, 0)),
        ),
        ("WAITPKG", |r| entry(r, 7).ecx = 1 << 5, Err((libc::EINVAL, 0))),
        ("TSX", |r| entry(r, 7).ebx = 1 << 11, Err((libc::EINVAL, 0))),
        ("reserved", |r| r.reserved = true, Err((libc::EINVAL, 0))),
        ("padding", |r| r.padding = 1, Err((libc::EINVAL, 0))),
        (
            "attribute DEBUG",
            |r| r.init.attributes |= 1,
            Err((libc::EINVAL, 0)),
        ),
        ("XFAM", |r| r.init.xfam |= 1 << 17, Err((libc::EINVAL, 0))),
        (
            "too many entries",
            |r| {
                let e = *entry(r, 1);
                r.init.cpuid.0.resize(257, e)
            },
            Err((libc::E2BIG, 0)),
        ),
        (
            "a fixed CPUID bit",
            |r| entry(r, 1).edx = 1,
            Err((libc::EINVAL, 0xc000_0100_0000_0045)),
        ),
    ];
    for (name, change, expected) in cases {
        let mut model = model();
        let mut init = raw(parameters(&model));
        change(&mut init);
        assert_eq!(model.raw_init_vm(CMD, &init), expected, "{name}");
    }
    let mut model = model();
    let init = raw(parameters(&model));
    model.kernel.five_levels = false;
    let mut wide = init.clone();
    entry(&mut wide, 0x8000_0008).eax = 52 << 16;
    assert_eq!(
        model.raw_init_vm(CMD, &wide),
        Err((libc::EINVAL, 0)),
        "52 on four levels"
    );
    assert_eq!(
        model.raw_init_vm(RawCmd { flags: 1, ..CMD }, &init),
        Err((libc::EINVAL, 0))
    );
}

#[test]
fn case_22_init_vm_has_causes_outside_the_caller_tdx_td_init() {
    type Fault = fn(&mut Model);
    let faults: [(&str, Fault, Fault, Failure); 5] = [
        (
            "no key id",
            |m| m.kernel.key_ids = 0,
            |m| m.kernel.key_ids = 1,
            (libc::ENOSPC, 0),
        ),
        (
            "control group",
            |m| m.kernel.group_full = true,
            |m| m.kernel.group_full = false,
            (libc::EBUSY, 0),
        ),
        (
            "vCPU in the making",
            |m| m.creating_vcpu = true,
            |m| m.creating_vcpu = false,
            (libc::EBUSY, 0),
        ),
        (
            "no entropy",
            |m| m.module.without_entropy = 1,
            |_| {},
            (libc::EAGAIN, 0),
        ),
        (
            "an operand",
            |m| m.module.refuses = Some(70),
            |m| m.module.refuses = None,
            (libc::EINVAL, 0xc000_0100_0000_0046),
        ),
    ];
    for (name, fault, cure, expected) in faults {
        let mut model = model();
        let init = raw(parameters(&model));
        fault(&mut model);
        assert_eq!(model.raw_init_vm(CMD, &init), Err(expected), "{name}");
        cure(&mut model);
        let left = RawCmd {
            hw_error: expected.1.max(1),
            ..CMD
        };
        assert_eq!(
            model.raw_init_vm(left, &init),
            Err((libc::EINVAL, left.hw_error)),
            "{name}: hw_error left set"
        );
        assert_eq!(model.raw_init_vm(CMD, &init), Ok(()), "{name}: again");
        assert_eq!(
            model.raw_init_vm(CMD, &init),
            Err((libc::EINVAL, 0)),
            "{name}: twice"
        );
    }
    let mut model = model();
    let init = raw(parameters(&model));
    model.module.fails_after = Some(0);
    assert_eq!(model.raw_init_vm(CMD, &init), Err((libc::EIO, 0)));
    assert!(model.dead());
    assert_eq!(model.create_vcpu(0), Err(libc::EIO), "and so is everything else");
}

#[test]
fn case_23_creating_vcpus_tdx_vcpu_create_kvm_vm_ioctl_create_vcpu() {
    let mut early = model();
    assert_eq!(early.create_vcpu(0), Err(libc::EIO), "before INIT_VM");
    let mut whole = Model::create(Kernel::default(), 5).unwrap();
    assert_eq!(whole.create_irqchip(), Err(libc::ENOTTY));
    assert_eq!(whole.bus_cycles(40), Err(libc::ENXIO), "before the irqchip");
    assert_eq!(whole.exit_hypercall(1 << 13), EINVAL);
    let init = raw(parameters(&whole));
    whole.raw_init_vm(CMD, &init).unwrap();
    assert_eq!(whole.create_vcpu(0), Err(libc::EINVAL), "irqchip not split");
    assert_eq!(whole.split_irqchip(4097), EINVAL);
    assert_eq!(whole.split_irqchip(0), Ok(()));
    assert_eq!(whole.split_irqchip(0), Err(libc::EEXIST));
    assert_eq!(whole.create_irqchip(), Err(libc::EEXIST));
    assert_eq!(
        [
            whole.bus_cycles(0),
            whole.bus_cycles(u64::MAX),
            whole.bus_cycles(40)
        ],
        [EINVAL, EINVAL, Ok(())]
    );
    whole.kernel.max_vcpus = 2;
    assert_eq!(
        [0, 0, 1, 2].map(|id| whole.create_vcpu(id)),
        [Ok(0), Err(libc::EEXIST), Ok(1), Err(libc::EINVAL)]
    );
    assert_eq!(whole.bus_cycles(40), EINVAL, "after a vCPU");
    whole.raw_finalize(CMD).unwrap();
    whole.kernel.max_vcpus = 9;
    assert_eq!(whole.create_vcpu(2), Err(libc::EIO), "after FINALIZE");
}

#[test]
fn case_24_vcpu_commands_tdx_vcpu_init_tdx_vcpu_get_cpuid() {
    let mut model = initialised();
    model.create_vcpu(0).unwrap();
    assert_eq!(model.raw_init_vcpu(0, CMD, 0), EINVAL, "no CPUID");
    model.vcpu_set_cpuid(0, &x2apic(false)).unwrap();
    assert_eq!(model.raw_init_vcpu(0, CMD, 0), EINVAL, "no x2APIC");
    model.vcpu_set_cpuid(0, &x2apic(true)).unwrap();
    assert_eq!(
        model.raw_init_vcpu(0, RawCmd { flags: 1, ..CMD }, 0),
        EINVAL,
        "flags"
    );
    assert_eq!(
        model.raw_init_vcpu(0, RawCmd { hw_error: 1, ..CMD }, 0),
        EINVAL,
        "hw_error"
    );
    let entries = model.module.native.0.len();
    let count = |answer: Result<CpuidTable, (i32, usize)>| answer.map(|table| table.0.len());
    assert_eq!(count(model.raw_get_cpuid(0, CMD, 1)), Err((libc::E2BIG, entries)));
    assert_eq!(
        count(model.raw_get_cpuid(0, RawCmd { flags: 7, ..CMD }, entries)),
        Ok(entries),
        "flags do not matter"
    );
    model.creating_vcpu = true;
    assert_eq!(model.raw_init_vcpu(0, CMD, 0), Err(libc::EBUSY));
    model.creating_vcpu = false;
    assert_eq!(model.raw_init_vcpu(0, CMD, 7), Ok(()));
    assert_eq!(model.raw_init_vcpu(0, CMD, 7), EINVAL, "twice");
    assert_eq!(model.vcpus[0].rcx, Some(7));
    model.module.cpuid_unreadable = true;
    assert_eq!(count(model.raw_get_cpuid(0, CMD, 99)), Err((libc::EIO, 99)));
    assert_eq!(
        model.registers(),
        EINVAL,
        "registers are out of reach from the start"
    );
    model.raw_finalize(CMD).unwrap();
    assert_eq!(
        count(model.raw_get_cpuid(0, CMD, 99)),
        Err((libc::EINVAL, 99)),
        "after FINALIZE"
    );
    assert_eq!(model.raw_init_vcpu(0, CMD, 0), EINVAL, "after FINALIZE");
    assert_eq!(
        model.vcpu_set_cpuid(0, &CpuidTable(vec![CpuidEntry::default(); 257])),
        Err(libc::E2BIG)
    );
}

#[test]
fn case_24_the_td_sees_what_init_vm_configured_tdx_read_cpuid() {
    let mut model = model();
    let mut init = parameters(&model);
    init.cpuid.leaf_mut(1).next().unwrap().eax = 0x806f8;
    model.raw_init_vm(CMD, &raw(init)).unwrap();
    model.create_vcpu(0).unwrap();
    let table = model.raw_get_cpuid(0, CMD, 99).unwrap();
    assert_eq!(table.get(1, 0).unwrap().eax, 0x806f8);
    assert_eq!(table.get(0x8000_0008, 0).unwrap().eax, 0x30_3934);
    assert_ne!(
        table.get(1, 0).unwrap().ecx & 1 << 21,
        0,
        "x2APIC is not configurable"
    );
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
fn case_25_malformed_regions_tdx_vcpu_init_mem_region() {
    type Change = fn(&mut RawRegion<'_>, &mut RawCmd);
    let cases: [(&str, Change, Result<(), i32>); 13] = [
        ("as it should be", |_, _| {}, Ok(())),
        ("shared bit", |r, _| r.gpa |= SHARED, EINVAL),
        (
            "reaching into the shared half",
            |r, _| (r.gpa, r.nr_pages) = (SHARED - 4096, 2),
            EINVAL,
        ),
        ("no pages", |r, _| r.nr_pages = 0, EINVAL),
        ("too many pages", |r, _| r.nr_pages = u64::MAX, EINVAL),
        ("unaligned address", |r, _| r.gpa += 1, EINVAL),
        ("unaligned source", |r, _| r.source_addr += 1, EINVAL),
        ("flag 2", |_, c| c.flags = 2, EINVAL),
        ("hw_error", |_, c| c.hw_error = 2, EINVAL),
        ("source 0", |r, _| r.source_addr = 0, Err(libc::EOPNOTSUPP)),
        ("source not mapped", |r, _| r.source = &[], Err(libc::EFAULT)),
        ("not private", |r, _| r.gpa = 64 << 12, EINVAL),
        ("no gmem", |r, _| r.gpa = 128 << 12, EINVAL),
    ];
    for (name, change, expected) in cases {
        let mut model = with_vcpu();
        model.slot(64..128, true).unwrap();
        model.slot(128..192, false).unwrap();
        model.set_private(128..192);
        assert_eq!(add(&mut model, change).0, expected, "{name}");
    }
    let mut model = initialised();
    model.create_vcpu(0).unwrap();
    assert_eq!(add(&mut model, |_, _| {}).0, EINVAL, "vCPU not initialised");
    assert_eq!(
        model.slot(0..SHARED / 4096 + 1, true),
        EINVAL,
        "a slot over the shared bit"
    );
}

#[test]
fn case_25_regions_stop_half_way_tdx_vcpu_init_mem_region_kvm_tdp_mmu_map_private_pfn() {
    let mut model = with_vcpu();
    model
        .interruptions
        .extend([(2, libc::EINTR), (0, libc::EINTR), (0, libc::EAGAIN)]);
    let four = |r: &mut RawRegion<'_>, _: &mut RawCmd| r.nr_pages = 4;
    assert_eq!(
        add(&mut model, four),
        (Err(libc::EINTR), 2),
        "a signal after two pages"
    );
    let rest = |r: &mut RawRegion<'_>, _: &mut RawCmd| (r.gpa, r.nr_pages) = (0x3000, 2);
    assert_eq!(add(&mut model, rest), (Err(libc::EINTR), 0));
    assert_eq!(add(&mut model, rest), (Err(libc::EAGAIN), 0));
    assert_eq!(add(&mut model, rest), (Ok(()), 2));
    assert_eq!(add(&mut model, four), (Err(libc::EIO), 0), "there already");
    assert!(!model.dead(), "which kills nothing");
    assert_eq!(
        add(&mut model, |r, _| (r.gpa, r.nr_pages) = (63 << 12, 2)),
        (EINVAL, 1),
        "to the end of the slot"
    );
    model.module.fails_after = Some(1);
    assert_eq!(
        add(&mut model, |r, _| (r.gpa, r.nr_pages) = (8 << 12, 4)),
        (Err(libc::EIO), 1)
    );
    assert!(model.dead(), "a SEAMCALL failed");
}

#[test]
fn case_25_mrtd_is_page_adds_and_extends_in_order_tdx_gmem_post_populate() {
    let mut model = with_vcpu();
    let source = vec![Page([9; 4096]); 2];
    for (gpa, measured) in [(0x5000, true), (0x1000, false)] {
        let mut region = MemRegion {
            gpa,
            source: &source[..1],
            measured,
        };
        model.init_mem_region(&mut 0, &mut region).unwrap();
        assert_eq!((region.gpa, region.source.len()), (gpa + 0x1000, 0));
    }
    model.finalize_vm().unwrap();
    let mut stream = Vec::new();
    let mut record = |name: &str, gpa: u64, data: &[u8]| {
        let mut head = [0; 128];
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[16..24].copy_from_slice(&gpa.to_le_bytes());
        stream.extend(head);
        stream.extend(data);
    };
    record("MEM.PAGE.ADD", 0x5000, &[]);
    for chunk in 0..16 {
        record("MR.EXTEND", 0x5000 + 256 * chunk, &[9; 256]);
    }
    record("MEM.PAGE.ADD", 0x1000, &[]);
    assert_eq!(model.module.mrtd().unwrap()[..], Sha384::digest(&stream)[..]);
}

#[test]
fn case_26_finalize_tdx_td_finalize_and_what_it_opens_kvm_arch_vcpu_pre_fault_memory() {
    let mut fresh = model();
    assert_eq!(fresh.raw_finalize(CMD), Err((libc::EINVAL, 0)), "before INIT_VM");
    let mut model = with_vcpu();
    model.create_vcpu(1).unwrap();
    assert_eq!(model.run(0), Entry::Errno(libc::EINVAL), "before FINALIZE");
    assert_eq!(model.run(1), Entry::Blocks, "a further vCPU without INIT_VCPU");
    assert_eq!(
        model.pre_fault(0, 4096, 0),
        Err(libc::EOPNOTSUPP),
        "before FINALIZE"
    );
    model.module.busy = 2;
    let answers = [0; 4].map(|_| model.raw_finalize(RawCmd { flags: 9, ..CMD }));
    assert_eq!(
        answers,
        [
            Err((libc::EBUSY, 0)),
            Err((libc::EBUSY, 0)),
            Ok(()),
            Err((libc::EINVAL, 0))
        ]
    );
    assert!(model.finalised());
    for (name, gpa, bytes, flags, expected) in [
        ("in the slot", 0, 4096, 0, Ok(())),
        ("flags", 0, 4096, 1, EINVAL),
        ("nothing", 0, 0, 0, EINVAL),
        ("unaligned", 1, 4096, 0, EINVAL),
        ("shared bit", SHARED, 4096, 0, EINVAL),
        ("wrap", u64::MAX - 4095, 8192, 0, EINVAL),
        ("no slot", 1 << 30, 4096, 0, Err(libc::ENOENT)),
    ] {
        assert_eq!(model.pre_fault(gpa, bytes, flags), expected, "{name}");
    }
    assert_eq!(model.run(0), Entry::Runs);
    assert_eq!(
        model.vcpu_set_cpuid(0, &x2apic(false)),
        EINVAL,
        "other CPUID after it ran"
    );
    assert_eq!(model.vcpu_set_cpuid(0, &x2apic(true)), Ok(()), "the same");
    assert_eq!(add(&mut model, |_, _| {}).0, EINVAL, "a late page");
    model.vcpus[0].init_received = true;
    assert_eq!(model.run(0), Entry::Errno(libc::EINVAL));
    let mut broken = with_vcpu();
    broken.module.fails_after = Some(0);
    assert_eq!(broken.raw_finalize(CMD), Err((libc::EIO, 0)));
}

fn exit(gpa: u64, pages: u64, private: bool) -> Completion {
    let attributes = u64::from(private) << 4;
    Completion::Exit(TdxExit::MapGpaRange {
        gpa,
        pages,
        attributes,
    })
}

fn guest(r10: u64, r11: u64) -> Completion {
    Completion::Guest { r10, r11 }
}

const INVALID: u64 = 0x8000_0000_0000_0000;

#[test]
fn case_27_map_gpa_in_chunks_tdx_map_gpa_tdx_complete_vmcall_map_gpa() {
    let mut model = with_vcpu();
    let (at, bytes) = (0x1000, (5 << 20) + 4096);
    let call = Call::MapGpa {
        gpa: SHARED | at,
        bytes,
    };
    assert_eq!(model.call(0, call), exit(at, 512, false));
    assert_eq!(model.complete(0, 0, false), exit(at + (2 << 20), 512, false));
    assert_eq!(model.complete(0, 0, false), exit(at + (4 << 20), 257, false));
    assert_eq!(model.complete(0, 0, false), guest(0, 0));
    assert_eq!(
        model.complete(0, 0, false),
        Completion::Errno(libc::EINVAL),
        "nothing waits"
    );

    model.call(0, call);
    assert_eq!(
        model.complete(0, 0, true),
        guest(1, SHARED | at + (2 << 20)),
        "an interrupt is pending"
    );
    for (ret, expected) in [
        (11, guest(1, SHARED | at)),
        (22, guest(INVALID, SHARED | at)),
        (1, Completion::Errno(libc::EINVAL)),
        (u64::MAX, Completion::Errno(libc::EINVAL)),
    ] {
        model.call(0, call);
        assert_eq!(model.complete(0, ret, false), expected, "{ret}");
    }
    for (name, gpa, bytes, status) in [
        ("unaligned", 0x1001, 4096, 0x8000_0000_0000_0002),
        ("unaligned size", 0x1000, 4095, 0x8000_0000_0000_0002),
        ("nothing", 0x1000, 0, INVALID),
        ("wrap", u64::MAX - 4095, 8192, INVALID),
        ("from private to shared", SHARED - 4096, 8192, INVALID),
        ("beyond the address width", 1 << 48, 4096, INVALID),
    ] {
        assert_eq!(
            model.call(0, Call::MapGpa { gpa, bytes }),
            guest(status, gpa),
            "{name}"
        );
    }
    model.exit_hypercall(0).unwrap();
    assert_eq!(
        model.call(0, call),
        guest(0x8000_0000_0000_0003, SHARED | at),
        "capability not enabled"
    );
}

#[test]
fn case_28_other_calls_tdx_get_quote_tdx_get_td_vm_call_info_tdx_report_fatal_error() {
    let mut model = with_vcpu();
    let quote = |gpa| Call::GetQuote { gpa, bytes: 0x2000 };
    assert_eq!(
        model.call(0, quote(0x5000)),
        guest(INVALID, 0),
        "a private buffer"
    );
    let preset = 0x8000_0000_0000_0003;
    let tdx = |nr, body| Completion::Exit(TdxExit::Tdx { nr, body });
    assert_eq!(
        model.call(0, quote(SHARED | 0x5001)),
        tdx(0x10002, [preset, 0x5001, 0x2000, 0, 0, 0]),
        "unchecked"
    );
    assert_eq!(model.complete(0, 0, false), guest(0, 0));
    assert_eq!(model.call(0, Call::Info { leaf: 0 }), guest(0, 0));
    assert_eq!(
        model.call(0, Call::Info { leaf: 1 }),
        tdx(0x10000, [0, 1, 0, 0, 0, 0])
    );
    assert_eq!(model.call(0, Call::Info { leaf: 2 }), guest(INVALID, 0));
    for vector in [31, 256] {
        assert_eq!(
            model.call(0, Call::SetupNotify { vector }),
            guest(INVALID, 0),
            "{vector}"
        );
    }
    for vector in [32, 255] {
        let expected = tdx(0x10004, [preset, vector, 0, 0, 0, 0]);
        assert_eq!(model.call(0, Call::SetupNotify { vector }), expected);
    }
    let registers = std::array::from_fn(|n| 100 + n as u64);
    let Completion::Exit(TdxExit::Fatal(data)) = model.call(0, Call::FatalError { registers }) else {
        panic!("no exit");
    };
    assert_eq!(
        (data[3], data[4], data[5], data[6], data[15]),
        (103, 0, 0, 106, 115)
    );
}

#[test]
fn case_28_unaccepted_memory_kills_the_td_tdx_handle_ept_violation() {
    let mut model = with_vcpu();
    add(&mut model, |_, _| {}).0.unwrap();
    model.raw_finalize(CMD).unwrap();
    assert_eq!(model.touch(0x1fff), Ok(()));
    assert_eq!(model.touch(0x2000), Err(libc::EIO));
    assert_eq!(model.run(0), Entry::Errno(libc::EIO));
    assert_eq!(model.raw_capabilities(CMD, 99), Err((libc::EIO, 0)));
    assert_eq!(model.slot(64..65, true), Err(libc::EIO));
}

#[test]
fn case_30_a_conversion_loses_what_was_private_tdx_sept_remove_leaf_spte() {
    let mut model = with_vcpu();
    add(&mut model, |_, _| {}).0.unwrap();
    model.raw_finalize(CMD).unwrap();
    model.set_shared(1..2);
    model.set_private(1..2);
    assert_eq!(
        model.touch(0x1000),
        Err(libc::EIO),
        "the TD would have to accept it again"
    );
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
