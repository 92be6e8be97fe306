//! Pages added, measured, and lost.

use sha2::{Digest, Sha384};

use super::*;

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
