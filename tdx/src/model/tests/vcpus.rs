//! vCPUs of a TD, and what they see.

use super::*;

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
