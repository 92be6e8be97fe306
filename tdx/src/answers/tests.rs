//! Exits as the model of KVM makes them for a TD that runs.

use std::sync::mpsc::{Receiver, channel};

use arch::addr::{Gpa, PageRange};
use arch::mem::{Visibility, VisibilityMap};
use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::get_quote::Status;
use crate::launch::{LaunchConfig, Launching};
use crate::model::{Call, Completion, Kernel, Model};

const SHARED: u64 = 1 << 47;
const RAM: u64 = 0x40_0000;
const INVALID: u64 = ReplyCode::InvalidOperand as u64;
const RETURN: usize = 16;

struct Td {
    vm: Model,
    answers: Answers,
    shared: SharedMem,
    interrupts: Receiver<(u32, u8)>,
}

fn offered() -> CpuidTable {
    CpuidTable(vec![CpuidEntry {
        leaf: 1,
        ecx: 1 << 21,
        ..CpuidEntry::default()
    }])
}

impl Td {
    /// Two vCPUs; all RAM is shared.
    fn new() -> Self {
        let mut vm = Model::create(Kernel::default(), 5).unwrap();
        vm.split_irqchip(0).unwrap();
        vm.exit_hypercall(1 << 12).unwrap();
        let mut launching = Launching::begin(vm, &LaunchConfig::default(), offered()).unwrap();
        for index in 0..2 {
            launching.commands().create_vcpu(index).unwrap();
            launching.add_vcpu(&mut (index as usize), index).unwrap();
        }
        let user_calls = launching.user_calls();
        let (vm, _) = launching.finish().unwrap();
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let ranges = [PageRange::new(Gpa(0), RAM).unwrap()];
        let visible = Arc::new(VisibilityMap::new(&ranges, Visibility::Shared));
        let shared = SharedMem::new(Arc::new(map), visible);
        let (send, interrupts) = channel();
        let send = Mutex::new(send);
        let terms = Terms {
            reasons: |code| (code == 0x6376_6d08).then(|| "kernel mismatch".into()),
            user_calls,
            quotes: None,
        };
        let interrupt = move |vcpu, vector| send.lock().unwrap().send((vcpu, vector)).unwrap();
        let answers = Answers::new(shared.clone(), terms, Box::new(interrupt)).unwrap();
        Self {
            vm,
            answers,
            shared,
            interrupts,
        }
    }

    /// The guest on `vcpu` makes a call that leaves the kernel; `kvm_run`'s union afterwards, and what the guest gets
    /// in R10.
    fn call(&mut self, vcpu: u32, call: Call) -> ([u8; 256], u64) {
        let mut body = [0; 256];
        let Completion::Exit(crate::model::TdxExit::Tdx { nr, body: words }) =
            self.vm.call(vcpu as usize, call)
        else {
            panic!("{call:?} does not leave the kernel");
        };
        for (slot, word) in body[8..].chunks_mut(8).zip([nr].into_iter().chain(words)) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        let exit = PlatformExit {
            vcpu,
            reason: 40,
            body: &mut body,
        };
        assert!(matches!(self.answers.serve(exit), Some(PlatformFlow::Resume)));
        let ret = u64::from_ne_bytes(body[RETURN..][..8].try_into().unwrap());
        match self.vm.complete(vcpu as usize, ret, false) {
            Completion::Guest { r10, .. } => (body, r10),
            other => panic!("{other:?}"),
        }
    }

    fn ask(&self, gpa: u64) {
        let mut bytes = vec![0; 24];
        bytes[0] = 1;
        bytes[16..20].copy_from_slice(&1024_u32.to_le_bytes());
        bytes.extend([9; 1024]);
        self.shared.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }
}

#[test]
fn a_guest_is_told_of_the_calls_that_are_served_and_of_no_other() {
    let mut td = Td::new();
    let (body, r10) = td.call(0, Call::Info { leaf: 1 });
    let word = |at: usize| u64::from_ne_bytes(body[at..][..8].try_into().unwrap());
    assert_eq!(r10, 0);
    assert_eq!((word(32), word(40), word(48), word(56)), (1 << 1, 0, 0, 0));
    td.answers.calls = 0;
    let (body, _) = td.call(0, Call::Info { leaf: 1 });
    assert_eq!(body[32..40], [0; 8], "KVM lets user space claim nothing");
}

#[test]
fn a_leaf_that_the_kernel_should_have_kept_is_refused() {
    let td = Td::new();
    let mut body = [0; 256];
    body[8..16].copy_from_slice(&0x1_0000_u64.to_ne_bytes());
    body[24..32].copy_from_slice(&7_u64.to_ne_bytes());
    let exit = PlatformExit {
        vcpu: 0,
        reason: 40,
        body: &mut body,
    };
    assert!(matches!(td.answers.serve(exit), Some(PlatformFlow::Resume)));
    assert_eq!(body[RETURN..][..8], INVALID.to_ne_bytes());
}

#[test]
fn a_quote_that_nobody_can_make_is_reported_to_the_vcpu_that_asked_to_be_told() {
    let mut td = Td::new();
    td.ask(0x4000);
    let quote = Call::GetQuote {
        gpa: SHARED | 0x4000,
        bytes: 0x2000,
    };
    assert_eq!(td.call(0, quote).1, 0);
    let status: u64 = td.shared.read_obj(GuestAddress(0x4008)).unwrap();
    assert_eq!(status, Status::Unavailable as u64);
    assert!(td.interrupts.try_recv().is_err(), "nobody asked to be told");

    assert_eq!(td.call(1, Call::SetupNotify { vector: 0x51 }).1, 0);
    assert_eq!(td.call(0, Call::SetupNotify { vector: 0xff }).1, 0);
    assert_eq!(td.call(1, Call::SetupNotify { vector: 32 }).1, 0);
    td.ask(0x4000);
    assert_eq!(td.call(0, quote).1, 0);
    assert_eq!(td.interrupts.try_recv(), Ok((1, 32)), "the last one that asked");
}

#[test]
fn a_buffer_that_is_none_is_an_invalid_operand() {
    let mut td = Td::new();
    td.ask(0x4000);
    let cases = [
        (0x4001, 0x2000),
        (0x4000, 0),
        (0x4000, 0x1001),
        (0x4000, !0xfff),
        (RAM, 0x2000),
        (RAM - 0x1000, 0x2000),
        (0x8000, 0x2000),
    ];
    for (gpa, bytes) in cases {
        let (_, r10) = td.call(
            0,
            Call::GetQuote {
                gpa: SHARED | gpa,
                bytes,
            },
        );
        assert_eq!(r10, INVALID, "{gpa:#x} {bytes:#x}");
    }
}

#[test]
fn calls_of_later_kernels_keep_the_answer_that_the_kernel_put_down() {
    let td = Td::new();
    for number in [0_u64, 0x1_0001, 0x1_0005, u64::MAX] {
        let mut body = [0x5a; 256];
        body[8..16].copy_from_slice(&number.to_ne_bytes());
        let before = body;
        let exit = PlatformExit {
            vcpu: 0,
            reason: 40,
            body: &mut body,
        };
        assert!(matches!(td.answers.serve(exit), Some(PlatformFlow::Resume)));
        assert_eq!(body, before, "{number:#x}");
    }
}

#[test]
fn a_guest_that_gives_up_ends_the_machine_with_its_own_words() {
    let mut td = Td::new();
    let mut registers = [0; 16];
    registers[12] = 0x6376_6d08;
    let Completion::Exit(crate::model::TdxExit::Fatal(data)) = td.vm.call(0, Call::FatalError { registers })
    else {
        panic!("no exit");
    };
    let mut body = [0; 256];
    body[..8].copy_from_slice(&[7, 0, 0, 0, 16, 0, 0, 0]);
    for (slot, word) in body[8..].chunks_mut(8).zip(data) {
        slot.copy_from_slice(&word.to_ne_bytes());
    }
    let exit = PlatformExit {
        vcpu: 1,
        reason: 24,
        body: &mut body,
    };
    match td.answers.serve(exit) {
        Some(PlatformFlow::Terminated(why)) => {
            assert_eq!(why, "the boot shim stopped: kernel mismatch");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn exits_of_other_guests_are_not_served() {
    let td = Td::new();
    for (reason, event) in [(43, 0), (24, 6), (24, 1), (29, 0), (30, 0), (26, 0)] {
        let mut body = [0; 256];
        body[0] = event;
        let exit = PlatformExit {
            vcpu: 0,
            reason,
            body: &mut body,
        };
        assert!(td.answers.serve(exit).is_none(), "{reason} {event}");
    }
}
