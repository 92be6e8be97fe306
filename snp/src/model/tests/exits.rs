//! What a running guest asks for, and what memory does.

use super::*;

fn psc(entries: &[(u64, PscOperation, bool)]) -> Vec<PscEntry> {
    let entry = |&(gfn, operation, large): &(u64, PscOperation, bool)| PscEntry {
        done: 0,
        gfn,
        operation,
        large,
    };
    entries.iter().map(entry).collect()
}

const MAP_GPA_RANGE: u64 = 1 << 12;

#[test]
fn case_18_page_state_changes_snp_do_psc_snp_complete_one_psc() {
    use PscOperation::{Other, Private, Shared};
    let model = started();
    let list = psc(&[
        (16, Shared, false),
        (17, Shared, false),
        (18, Private, false),
        (512, Private, true),
        (1024, Private, true),
        (30, Other, false),
        (40, Private, false),
    ]);
    let (mut change, first) = model.page_state_change(list.clone(), MAP_GPA_RANGE);
    assert_eq!(first, Step::Exit([16 << 12, 2, 0]), "two of a kind");
    assert_eq!(
        change.complete(0),
        Step::Exit([18 << 12, 1, 1 << 4]),
        "another operation"
    );
    assert_eq!(
        change.complete(0),
        Step::Exit([512 << 12, 1024, 1 << 4 | 1]),
        "another size"
    );
    assert_eq!(
        change.complete(0),
        Step::Exit([40 << 12, 1, 1 << 4]),
        "nobody hears of PSMASH"
    );
    assert_eq!(change.complete(0), Step::Guest(0));
    for (ret, expected) in [
        (11, Step::Guest(0x100 << 32)),
        (22, Step::Guest(0x100 << 32)),
        (1, Step::Errno(libc::EINVAL)),
        (u64::MAX, Step::Errno(libc::EINVAL)),
    ] {
        let (mut change, _) = model.page_state_change(list.clone(), MAP_GPA_RANGE);
        assert_eq!(change.complete(ret), expected, "{ret}");
    }
    let answer = |entries, capability| model.page_state_change(entries, capability).1;
    assert_eq!(
        answer(list, 0),
        Step::Guest(0x100 << 32),
        "capability not enabled"
    );
    assert_eq!(
        answer(psc(&[(1, Shared, false); 254]), MAP_GPA_RANGE),
        Step::Guest(1 << 32 | 1)
    );
    assert_eq!(
        answer(psc(&[(7, Shared, true)]), MAP_GPA_RANGE),
        Step::Guest(1 << 32 | 2)
    );
    let mut half = psc(&[(512, Private, true), (1024, Private, true)]);
    half[0].done = 510;
    assert_eq!(
        answer(half.clone(), MAP_GPA_RANGE),
        Step::Exit([1022 << 12, 2, 1 << 4 | 1]),
        "alone"
    );
    half[0].done = 513;
    assert_eq!(answer(half, MAP_GPA_RANGE), Step::Guest(1 << 32 | 2));
}

#[test]
fn case_19_memory_faults_kvm_mmu_faultin_pfn() {
    let mut model = started();
    model.slot(64..128, false);
    model.set_private(64..96);
    model.set_shared(8..16);
    model.set_private(200..201);
    let fault = |errno, flags, gfn: u64| Access::Fault {
        errno,
        flags,
        gpa: gfn << 12,
    };
    for (name, gfn, private, broken, expected) in [
        ("private", 1, true, None, Access::Served),
        ("shared", 8, false, None, Access::Served),
        (
            "private access to a shared page",
            8,
            true,
            None,
            fault(libc::EFAULT, 8, 8),
        ),
        (
            "shared access to a private page",
            1,
            false,
            None,
            fault(libc::EFAULT, 0, 1),
        ),
        ("private without gmem", 64, true, None, fault(libc::EFAULT, 8, 64)),
        (
            "private without a slot",
            200,
            true,
            None,
            fault(libc::EFAULT, 8, 200),
        ),
        ("shared without a slot", 201, false, None, Access::Mmio),
        (
            "poisoned",
            1,
            true,
            Some(libc::EHWPOISON),
            fault(libc::EHWPOISON, 8, 1),
        ),
        (
            "out of memory",
            1,
            true,
            Some(libc::ENOMEM),
            fault(libc::ENOMEM, 8, 1),
        ),
        (
            "closed file",
            1,
            true,
            Some(libc::EFAULT),
            fault(libc::EFAULT, 8, 1),
        ),
    ] {
        assert_eq!(model.access((gfn << 12) + 5, private, broken), expected, "{name}");
    }
}

#[test]
fn case_20_certificates_snp_handle_ext_guest_req_snp_complete_req_certs() {
    let mut model = Model::new(4);
    model.init2(0).unwrap();
    assert_eq!(
        model.extended_request(0x5000, 4),
        None,
        "not enabled: KVM leaves the table empty"
    );
    model.enable_req_certs().unwrap();
    let asked = CertExit {
        gpa: 0x5000,
        pages: 4,
    };
    assert_eq!(model.extended_request(0x5000, 4), Some(asked));
    for (ret, immediate, expected) in [
        (0, false, CertOutcome::Report { interrupted: false }),
        (0, true, CertOutcome::Report { interrupted: true }),
        (28, false, CertOutcome::TooSmall(9)),
        (11, false, CertOutcome::Busy),
        (5, false, CertOutcome::Failed),
        (1, false, CertOutcome::Errno(libc::EINVAL)),
        (u32::MAX, false, CertOutcome::Errno(libc::EINVAL)),
    ] {
        assert_eq!(model.certificates(ret, 9, immediate), expected, "{ret}");
    }
    model.sev_fd_open = false;
    assert_eq!(
        model.certificates(0, 9, false),
        CertOutcome::Errno(libc::EBADF),
        "closed sev_fd"
    );
}

#[test]
fn case_30_what_outlives_a_slot_and_what_a_hole_takes_sev_gmem_invalidate() {
    let mut model = started();
    update(&mut model, |_| {}).0.unwrap();
    model.remove_slots(&(0..64));
    assert_eq!(
        update(&mut model, |u| u.gfn_start = 2).0,
        EINVAL,
        "no slot any more"
    );
    model.slot(0..64, true);
    assert!(
        model.is_assigned(1),
        "deleting a slot and making it again keeps what the guest has"
    );
    assert_eq!(update(&mut model, |_| {}).0, EIO, "so it cannot be added twice");
    model.punch(0..64);
    assert!(!model.is_assigned(1), "a hole takes it away");
    assert_eq!(update(&mut model, |_| {}).0, Ok(()));
}
