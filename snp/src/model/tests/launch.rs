//! From the first command to the measurement.

use arch::x86::cpuid::{CpuidEntry, CpuidTable};

use super::*;
use crate::cpuid_page;
use crate::id_block::IdBlock;
use crate::measure;
use crate::p384::SigningKey;
use crate::vmsa::SevFeatures;

#[test]
fn case_7_init2_sev_guest_init() {
    let init = |vmsa_features, flags, ghcb_version| RawInit {
        vmsa_features,
        flags,
        ghcb_version,
    };
    let cases = [
        ("plain", 4, init(0, 0, 2), Ok(())),
        ("GHCB version 0 means 2", 4, init(0, 0, 0), Ok(())),
        ("debug swap and secure TSC", 4, init(0x220, 0, 2), Ok(())),
        ("flags", 4, init(0, 1, 2), EINVAL),
        ("SNP bit", 4, init(1, 0, 2), EINVAL),
        ("unknown feature", 4, init(1 << 40, 0, 2), EINVAL),
        ("secure TSC on SEV-ES", 3, init(0x200, 0, 2), EINVAL),
        ("GHCB version 3", 4, init(0, 0, 3), EINVAL),
        ("GHCB version 1 on SNP", 4, init(0, 0, 1), EINVAL),
        ("GHCB version 1 on SEV-ES", 3, init(0, 0, 1), Ok(())),
        ("type 0", 0, init(0, 0, 2), EINVAL),
        ("type 1", 1, init(0, 0, 2), EINVAL),
    ];
    for (name, vm_type, init, expected) in cases {
        assert_eq!(Model::new(vm_type).raw_init2(init), expected, "{name}");
    }
    let ok = init(0, 0, 2);
    for (vm_type, again) in [(2, EINVAL), (3, EINVAL), (4, Err((libc::EPERM, 0)))] {
        let mut model = Model::new(vm_type);
        model.kernel.asids = Some(9);
        model.raw_init2(ok).unwrap();
        assert_eq!(model.raw_init2(ok), again, "twice on type {vm_type}");
    }
    let mut model = Model::new(4);
    model.create_vcpu();
    assert_eq!(model.raw_init2(ok), EINVAL, "after a vCPU");
}

#[test]
fn case_8_asids_probe_and_attributes_sev_asid_new_sev_dev_get_attr() {
    let with = |asids| {
        let mut model = Model::new(4);
        model.kernel.asids = asids;
        model.init2(0).map_err(|e| e.errno())
    };
    assert_eq!(
        [with(Some(1)), with(Some(0)), with(None)],
        [Ok(()), Err(libc::EBUSY), Err(libc::ENOTTY)]
    );
    let mut model = Model::new(4);
    assert_eq!(model.probe(), Ok(()));
    model.kernel.sev = false;
    assert_eq!(model.probe(), Err(libc::ENOTTY));
    assert_eq!(model.init2(0).unwrap_err().errno(), libc::ENOTTY);
    let kernel = Kernel {
        req_certs: None,
        ..Kernel::default()
    };
    let asked = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)].map(|(group, attr)| kernel.attribute(group, attr));
    assert_eq!(
        asked,
        [
            Ok(0x220),
            Ok(0x1b_ffff),
            Err(libc::ENXIO),
            Err(libc::ENXIO),
            Err(libc::ENXIO)
        ]
    );
}

#[test]
fn case_9_start_snp_launch_start() {
    let mut model = Model::new(4);
    assert_eq!(model.raw_start(POLICY, 0), Err((libc::ENOTTY, 0)), "before INIT2");
    model.init2(0).unwrap();
    for (name, policy, flags) in [
        ("bit 17 clear", 0x10000, 0),
        ("bit 18", POLICY | 1 << 18, 0),
        ("not offered", POLICY | 1 << 24, 0),
        ("flags", POLICY, 1),
    ] {
        assert_eq!(model.raw_start(policy, flags), EINVAL, "{name}");
    }
    model.sev_fd_open = false;
    assert_eq!(model.raw_start(POLICY, 0), Err((libc::ENOTTY, 0)), "bad sev_fd");
    model.sev_fd_open = true;
    assert_eq!(
        model.raw_start(POLICY | 0x0200, 0),
        Err((libc::EIO, 7)),
        "ABI 2.0 wanted"
    );
    assert_eq!(model.raw_start(POLICY, 0), Ok(()), "after a failure of firmware");
    assert_eq!(model.raw_start(POLICY, 0), EINVAL, "twice");
}

#[test]
fn case_10_malformed_updates_snp_launch_update() {
    let mut fresh = Model::new(4);
    fresh.init2(0).unwrap();
    fresh.slot(0..64, true);
    assert_eq!(update(&mut fresh, |_| {}).0, EINVAL, "before START");
    let mut model = started();
    model.slot(64..128, false);
    type Change = fn(&mut RawUpdate<'_>);
    let changes: [(&str, Change); 8] = [
        ("type 2", |u| u.kind = 2),
        ("type 0", |u| u.kind = 0),
        ("type 7", |u| u.kind = 7),
        ("length 1", |u| u.len = 1),
        ("length 0", |u| u.len = 0),
        ("flags", |u| u.flags = 1),
        ("unaligned source", |u| u.uaddr = 0x7001),
        ("no gmem slot", |u| u.gfn_start = 64),
    ];
    for (name, change) in changes {
        assert_eq!(update(&mut model, change).0, EINVAL, "{name}");
    }
    let zero = |u: &mut RawUpdate<'_>| (u.kind, u.uaddr, u.source) = (3, 1, None);
    assert_eq!(update(&mut model, zero).0, Ok(()), "ZERO ignores its source");
}

#[test]
fn case_11_first_page_fails_kvm_gmem_populate() {
    let mut model = started();
    model.slot(64..128, true);
    assert_eq!(update(&mut model, |u| u.gfn_start = 64).0, EIO, "shared");
    assert_eq!(update(&mut model, |_| {}).0, Ok(()));
    assert_eq!(update(&mut model, |_| {}).0, EIO, "already added");
    assert_eq!(
        update(&mut model, |u| (u.gfn_start, u.source) = (2, None)).0,
        EIO,
        "unmapped source"
    );
    assert_eq!(
        update(&mut model, |u| (u.gfn_start, u.uaddr) = (2, 0)).0,
        EIO,
        "null source"
    );
    model.signals = 1;
    assert_eq!(update(&mut model, |u| u.gfn_start = 2).0, EIO, "signal");
    assert_eq!(update(&mut model, |u| u.gfn_start = 2).0, Ok(()), "no signal");
    model.firmware.fail_next = Some(FirmwareStatus(0x1a));
    assert_eq!(
        update(&mut model, |u| u.gfn_start = 3).0,
        Err((libc::EIO, 0x1a)),
        "firmware"
    );
    model.sev_fd_open = false;
    assert_eq!(update(&mut model, |u| u.gfn_start = 3).0, EIO, "closed sev_fd");
}

#[test]
fn case_12_partial_updates_kvm_gmem_populate() {
    let mut model = started();
    model.slot(64..128, true);
    model.set_private(64..128);
    let two = |gfn| move |u: &mut RawUpdate<'_>| (u.gfn_start, u.len) = (gfn, 2 * PAGE_SIZE);
    assert_eq!(
        update(&mut model, two(63)),
        (Ok(()), 64, PAGE_SIZE),
        "cut at the end of the slot"
    );
    assert_eq!(update(&mut model, |u| u.gfn_start = 11).0, Ok(()));
    assert_eq!(
        update(&mut model, two(10)),
        (Ok(()), 11, PAGE_SIZE),
        "stopped at the page that fails"
    );
    assert_eq!(
        update(&mut model, |u| u.gfn_start = 11).0,
        EIO,
        "which fails the next time"
    );
}

/// A correction that firmware makes: bit 24 of ECX in leaf 1 goes.
pub(crate) const RULE: CpuidRule = CpuidRule {
    leaf: 1,
    subleaf: 0,
    clear: [0, 0, 1 << 24, 0],
};

/// A CPUID page that [`RULE`] corrects.
pub(crate) fn cpuid_bytes() -> Vec<u8> {
    let leaf1 = CpuidEntry {
        leaf: 1,
        ecx: 1 << 24 | 1,
        ..CpuidEntry::default()
    };
    cpuid_page::build(&CpuidTable(vec![leaf1])).unwrap()
}

#[test]
fn case_13_cpuid_correction_sev_gmem_post_populate() {
    let mut model = started();
    model.firmware.cpuid.push(RULE);
    let sent = cpuid_bytes();
    let mut bytes = sent.clone();
    let send = |model: &mut Model, bytes: &mut Vec<u8>, writable| {
        let len = PAGE_SIZE;
        let uaddr = 0x7000;
        let source = Some(bytes.as_mut_slice());
        model.raw_update(&mut RawUpdate {
            gfn_start: 5,
            uaddr,
            len,
            kind: 6,
            flags: 0,
            source,
            writable,
        })
    };
    assert_eq!(send(&mut model, &mut bytes, false), EIO, "read-only source");
    assert_eq!(bytes, sent, "and no write-back");
    assert_eq!(send(&mut model, &mut bytes, true), Err((libc::EIO, 0x16)));
    assert_ne!(bytes, sent, "rewritten with what is accepted");
    assert_eq!(send(&mut model, &mut bytes, true), Ok(()), "on the same frame");
}

#[test]
fn case_14_finish_measures_in_order_and_only_once_snp_launch_finish() {
    let digest = |vcpus: u64| {
        let mut model = started();
        update(&mut model, |_| {}).0.unwrap();
        for index in 0..vcpus {
            model.create_vcpu().state.general.rip = index << 12;
        }
        model.launch_finish(&Identity::default()).unwrap();
        model.digest()
    };
    assert_ne!(digest(1), digest(2));
    let mut expected = measure::Chain::new();
    let range = PageRange::new(Gpa(0x1000), 0x1000).unwrap();
    expected.range(PageType::Normal, range, &[7; PAGE]).unwrap();
    for rip in [0, 0x1000] {
        let state = BootState::long_mode(
            General {
                rip,
                ..General::default()
            },
            0,
        );
        expected.vmsa(&crate::vmsa::Vmsa::new(&state, SevFeatures::SNP));
    }
    assert_eq!(digest(2), expected.digest());

    let mut model = started();
    model.create_vcpu();
    let block = block(Measurement([1; 48]));
    let identity = Identity {
        id_block: Some((block, auth(&block))),
        ..Identity::default()
    };
    let refused = model.launch_finish(&identity).unwrap_err();
    assert_eq!(
        (refused.errno(), refused.firmware),
        (libc::EIO, Some(FirmwareStatus(0xb)))
    );
    assert_eq!(
        model.launch_finish(&Identity::default()).unwrap_err().errno(),
        libc::EINVAL,
        "no second try"
    );
    let mut unmeasured = Model::new(4);
    assert_eq!(
        unmeasured.raw_finish(&Identity::default(), 0),
        Err((libc::ENOTTY, 0)),
        "before INIT2"
    );
    unmeasured.init2(0).unwrap();
    assert_eq!(
        unmeasured.raw_finish(&Identity::default(), 0),
        EINVAL,
        "before START"
    );
    assert_eq!(started().raw_finish(&Identity::default(), 1), EINVAL, "flags");
}

fn block(measurement: Measurement) -> IdBlock {
    let policy = Policy::default();
    IdBlock {
        measurement,
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        policy,
    }
}

fn auth(block: &IdBlock) -> Box<crate::id_block::IdAuth> {
    block.sign(&SigningKey::generated(), None).unwrap()
}
