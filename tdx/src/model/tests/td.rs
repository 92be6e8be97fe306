//! What KVM and the module can do, and a TD made of it.

use super::*;

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
