//! vCPUs before and after the launch.

use super::*;

#[test]
fn case_15_finish_refuses_debugged_vcpus_and_waits_for_running_ones_sev_es_sync_vmsa() {
    type Change = fn(&mut Vcpu);
    let changes: [(&str, Change, i32); 3] = [
        ("DR7", |v| v.state.control.dr7 = 0x401, libc::EINVAL),
        ("guest debug", |v| v.guest_debug = true, libc::EINVAL),
        ("in KVM_RUN, and killed", |v| v.running = true, libc::EINTR),
    ];
    for (name, change, errno) in changes {
        let mut model = started();
        change(model.create_vcpu());
        assert_eq!(
            model.launch_finish(&Identity::default()).unwrap_err().errno(),
            errno,
            "{name}"
        );
    }
    let mut model = started();
    model.create_vcpu().running = true;
    model.launch_finish(&Identity::default()).unwrap_err();
    model.vcpus[0].running = false;
    model.launch_finish(&Identity::default()).unwrap();
}

#[test]
fn case_16_registers_are_out_of_reach_after_finish_sev_es_prevent_msr_access() {
    use VcpuIoctl::{Fpu, GuestDebug, Lapic, Msrs, Registers, RunWithValidRegs, Smi};
    let all = [Registers, Fpu, Msrs, Lapic, Smi, GuestDebug, RunWithValidRegs];
    let mut model = started();
    model.create_vcpu();
    let ask = |model: &Model| all.map(|ioctl| model.vcpu_ioctl(0, ioctl));
    let (invalid, none) = (Err(libc::EINVAL), Err(libc::ENOTTY));
    assert_eq!(ask(&model), [Ok(0), Ok(0), Ok(2), Ok(0), none, Ok(0), invalid]);
    model.launch_finish(&Identity::default()).unwrap();
    assert_eq!(
        ask(&model),
        [invalid, Ok(0), Ok(0), Ok(0), none, invalid, invalid]
    );
}

#[test]
fn case_17_entering_vcpus_svm_vcpu_pre_run_pre_sev_run() {
    let mut model = Model::new(4);
    model.create_vcpu();
    assert_eq!(model.run(0), Entry::Errno(libc::EINVAL), "before INIT2");
    let mut model = started();
    for _ in 0..3 {
        model.create_vcpu();
    }
    assert_eq!(model.run(0), Entry::FailEntry, "before FINISH");
    model.vcpus[2].mp_state = MpState::Halted;
    model.launch_finish(&Identity::default()).unwrap();
    assert_eq!(model.run(0), Entry::Runs);
    model.ap_create(1);
    model.ap_create(2);
    assert_eq!(
        model.run(1),
        Entry::Errno(libc::EAGAIN),
        "nobody parked it as halted"
    );
    assert_eq!(model.run(2), Entry::Runs);
    model.ap_destroy(2);
    model.vcpus[2].mp_state = MpState::Runnable;
    assert_eq!(
        model.run(2),
        Entry::FailEntry,
        "forced to run without a save area"
    );
}

#[test]
fn certificates_are_enabled_between_init2_and_the_first_vcpu_snp_enable_certs() {
    let mut model = Model::new(4);
    assert_eq!(
        model.enable_req_certs().unwrap_err().errno(),
        libc::EINVAL,
        "before INIT2"
    );
    model.init2(0).unwrap();
    model.enable_req_certs().unwrap();
    assert!(model.requests_certificates());
    model.create_vcpu();
    assert_eq!(
        model.enable_req_certs().unwrap_err().errno(),
        libc::EINVAL,
        "after a vCPU"
    );
}
