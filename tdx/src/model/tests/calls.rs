//! What a running TD asks for.

use super::*;

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
        guest(1, SHARED | (at + (2 << 20))),
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
