//! Exits are decoded, segments unpacked.

use super::*;

fn body(fields: &[(usize, u64)]) -> [u8; 256] {
    let mut body = [0; 256];
    for (at, value) in fields {
        body[*at..*at + 8].copy_from_slice(&value.to_ne_bytes());
    }
    body
}

#[test]
fn a_conversion_request_is_decoded_and_answered_in_place() {
    let mut raw = body(&[(0, 12), (8, 0x5000), (16, 3), (24, 1 << 4), (56, 7)]);
    let Some(Exit::Convert {
        gpa,
        pages,
        to,
        reply,
    }) = decode(0, KVM_EXIT_HYPERCALL, &mut raw)
    else {
        panic!("not a conversion");
    };
    assert_eq!((gpa, pages, to), (0x5000, 3, Visibility::Private));
    reply.set(crate::exit::Answer::Invalid);
    assert_eq!(qword(&raw, 56), 22);
}

#[test]
fn exits_are_decoded() {
    let cases: &[(u32, &[(usize, u64)], &str)] = &[
        (
            KVM_EXIT_MMIO,
            &[(0, 0xc000_0000), (16, 4 | 1 << 32)],
            "MmioWrite { gpa: Gpa(3221225472), data: [0, 0, 0, 0] }",
        ),
        (
            KVM_EXIT_MMIO,
            &[(0, 8), (16, 2)],
            "MmioRead { gpa: Gpa(8), data: [0, 0] }",
        ),
        (
            KVM_EXIT_MEMORY_FAULT,
            &[(0, 8), (8, 0x1000), (16, 0x1000)],
            "WrongSide { range: PageRange { start: Gpa(4096), pages: 1 }, wants: Private }",
        ),
        (KVM_EXIT_SHUTDOWN, &[], "Shutdown"),
        (
            KVM_EXIT_FAIL_ENTRY,
            &[(0, u64::MAX)],
            "EntryFailed(18446744073709551615)",
        ),
    ];
    for (reason, fields, expected) in cases {
        let mut raw = body(fields);
        assert_eq!(format!("{:?}", decode(0, *reason, &mut raw).unwrap()), *expected);
    }
    assert!(decode(0, KVM_EXIT_HYPERCALL, &mut body(&[(0, 99)])).is_none());
    assert!(decode(0, 9999, &mut body(&[])).is_none());
}

#[test]
fn segment_attributes_unpack_as_the_vmcb_packs_them() {
    let code = segment(Segment {
        selector: 8,
        attributes: 0xa9b,
        limit: 1,
        base: 2,
    });
    assert_eq!(
        (
            code.type_,
            code.s,
            code.dpl,
            code.present,
            code.l,
            code.db,
            code.g
        ),
        (0xb, 1, 0, 1, 1, 0, 1)
    );
    assert_eq!(
        segment(Segment {
            attributes: 0x60,
            ..Default::default()
        })
        .dpl,
        3
    );
}

/// Else the guest would be blamed for it, after a thousand attempts.
#[test]
fn a_page_that_the_host_cannot_give_is_no_touch_of_the_wrong_side() {
    assert!(is_wrong_side(libc::EFAULT, KVM_EXIT_MEMORY_FAULT));
    for errno in [
        libc::EHWPOISON,
        libc::ENOMEM,
        libc::EIO,
        libc::ENOENT,
        libc::EAGAIN,
    ] {
        assert!(!is_wrong_side(errno, KVM_EXIT_MEMORY_FAULT), "{errno}");
    }
    assert!(!is_wrong_side(libc::EFAULT, uapi::EXIT_UNKNOWN));
}

/// Or a vCPU would never come out of its guest, and cvmm never end.
#[test]
fn kicks_arrive_although_the_caller_had_the_signal_blocked() {
    vmm_sys_util::signal::block_signal(kick_signal()).unwrap();
    let mut flag = 0_u8;
    IMMEDIATE_EXIT.set(&raw mut flag);
    hear_kicks().unwrap();
    // SAFETY: sends this thread a signal, whose handler writes to `flag` and nothing else.
    assert_eq!(unsafe { libc::raise(kick_signal()) }, 0);
    IMMEDIATE_EXIT.set(ptr::null_mut());
    // SAFETY: `flag` is alive, and the handler that wrote to it has returned.
    assert_eq!(unsafe { (&raw const flag).read_volatile() }, 1);
}
