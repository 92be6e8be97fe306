//! The launch over the model of KVM and the TDX module, for the cases of the kernel's contract that it can meet.

use arch::addr::PageRange;
use arch::platform::LaunchPlan;
use arch::x86::cpuid::CpuidEntry;

use super::*;
use crate::attributes::SEPT_VE_DISABLE;
use crate::measure::{self, Order};
use crate::model::{Entry, Kernel, Model};

const FIRST: u64 = 0x100;

fn host() -> CpuidTable {
    let entry = |leaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
        leaf,
        subleaf: None,
        eax,
        ebx,
        ecx,
        edx,
    };
    let mut table = CpuidTable(vec![
        entry(1, [0x806f8, 4 << 16, 1 << 21 | 1 << 24 | 1 << 31, 1 << 28]),
        CpuidEntry {
            subleaf: Some(0),
            ..entry(7, [1, u32::MAX, u32::MAX, u32::MAX])
        },
        CpuidEntry {
            subleaf: Some(0),
            ..entry(0xb, [0, 1, 0x100, 0])
        },
        CpuidEntry {
            subleaf: Some(1),
            ..entry(0xb, [2, 4, 0x201, 0])
        },
        CpuidEntry {
            subleaf: Some(0),
            ..entry(0xd, [7, 0x340, 0x340, 0])
        },
        entry(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0008, [0x3934, 0, 0, 0]),
    ]);
    cpuid::adapt(&mut table);
    table
}

fn page(kind: PageKind, frame: u64, pages: u64) -> LaunchPage {
    let bytes = match kind {
        PageKind::Zero => Vec::new(),
        _ => (0..pages << 12)
            .map(|i| (i >> 8 ^ frame).to_le_bytes()[0])
            .collect(),
    };
    LaunchPage {
        name: "test",
        range: PageRange::new(Gpa(frame << 12), pages << 12).unwrap(),
        kind,
        bytes,
    }
}

fn plan() -> Vec<LaunchPage> {
    vec![
        page(PageKind::Measured, FIRST, 12),
        page(PageKind::Unmeasured, FIRST + 12, 1),
        page(PageKind::Zero, FIRST + 15, 4),
        page(PageKind::Measured, 0xf_ffff, 1),
    ]
}

/// A new TD-to-be, with what a test changes.
fn model(change: impl FnOnce(&mut Model)) -> Model {
    let mut model = Model::create(Kernel::default(), 5).unwrap();
    model.split_irqchip(0).unwrap();
    model.exit_hypercall(1 << 12).unwrap();
    change(&mut model);
    model
}

/// Launches as the machine does; the model comes back whatever happens.
fn launch(model: &mut Model, pages: &[LaunchPage], cpus: u32) -> Result<Measurement, TdxError> {
    let mut launching = Launching::begin(&mut *model, &LaunchConfig::default(), host())?;
    let vm = launching.commands();
    for frames in [0..0x1000, 0xf_ffff..0x10_0000] {
        vm.slot(frames.clone(), true).unwrap();
        vm.set_private(frames);
    }
    for index in 0..cpus {
        vm.create_vcpu(index).unwrap();
    }
    for page in pages {
        launching.add(page)?;
    }
    for index in 0..cpus {
        launching.add_vcpu(&mut usize::try_from(index).unwrap(), index)?;
    }
    launching.finish().map(|(_, mrtd)| mrtd)
}

#[test]
fn the_module_measures_what_was_predicted_and_every_vcpu_runs() {
    for cpus in [1, 4] {
        let mut vm = model(|_| ());
        let mrtd = launch(&mut vm, &plan(), cpus).unwrap();
        let plan = LaunchPlan {
            pages: plan(),
            vcpus: vec![],
        };
        assert_eq!(vm.module.mrtd(), Some(mrtd.0));
        assert_eq!(mrtd, measure::mrtd(&plan, Order::SinglePass).unwrap());
        for index in 0..cpus as usize {
            assert_eq!(vm.run(index), Entry::Runs);
            assert_eq!(vm.vcpus[index].rcx, Some(0));
            let own = vm.vcpus[index].cpuid.get(1, 0).unwrap();
            assert_eq!((own.ebx >> 24, own.ecx & 1 << 21), (index as u32, 1 << 21));
        }
        assert_eq!(vm.width(), 48);
    }
}

#[test]
fn what_passes_by_itself_only_delays_the_launch() {
    type Change = fn(&mut Model);
    let cases: &[Change] = &[
        |vm| vm.module.without_entropy = 20,
        |vm| vm.module.busy = 20,
        |vm| {
            vm.interruptions.extend([
                (0, libc::EINTR),
                (3, libc::EINTR),
                (0, libc::EAGAIN),
                (1, libc::EINTR),
            ])
        },
        |vm| vm.interruptions.extend([(0, libc::EAGAIN); 20]),
        |vm| {
            let more = (0..300).map(|n| CpuidEntry {
                leaf: 0x4d,
                subleaf: Some(n),
                ..CpuidEntry::default()
            });
            // More than there is room for at first; KVM could not take so many back.
            vm.module.configurable.0.extend(more.take(200));
        },
    ];
    let plain = launch(&mut model(|_| ()), &plan(), 2).unwrap();
    for change in cases {
        let mut vm = model(change);
        assert_eq!(launch(&mut vm, &plan(), 2).unwrap(), plain);
        assert_eq!(vm.module.mrtd(), Some(plain.0));
    }
}

#[test]
fn what_does_not_pass_ends_the_launch_with_one_message() {
    type Change = fn(&mut Model);
    let cases: &[(Change, &str)] = &[
        (|vm| vm.kernel.key_ids = 0, "all key ids for TDs are in use"),
        (|vm| vm.kernel.group_full = true, "raise \"tdx\" in its misc.max"),
        (
            |vm| vm.module.attributes = 0,
            "attributes 0x10000000 (SEPT_VE_DISABLE); it allows 0x0",
        ),
        (|vm| vm.module.refuses = Some(65), "OPERAND_INVALID, operand XFAM"),
        (
            |vm| vm.module.refuses = Some(69),
            "refuses a CPUID value that KVM lists as configurable",
        ),
        (|vm| vm.module.refuses = Some(70), "100 MHz to 10 GHz"),
        (
            |vm| vm.module.without_entropy = u32::MAX,
            "random number generator stayed exhausted",
        ),
        (|vm| vm.module.busy = u32::MAX, "KVM_TDX_FINALIZE_VM was refused"),
        (
            |vm| vm.module.cpuid_unreadable = true,
            "KVM_TDX_GET_CPUID was refused",
        ),
        (
            |vm| vm.module.native.leaf_mut(0x8000_0001).for_each(|e| e.edx = 0),
            "EDX lacks 0x24100000 (long mode, no-execute pages, 1 GiB pages)",
        ),
        (
            |vm| vm.interruptions.extend([(0, libc::EAGAIN); 1000]),
            "KVM_TDX_INIT_MEM_REGION was refused: the kernel could not take hold",
        ),
        (
            |vm| vm.interruptions.push_back((2, libc::ENOMEM)),
            "no memory left",
        ),
    ];
    for (change, says) in cases {
        let error = launch(&mut model(change), &plan(), 2).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn pages_that_the_kernel_refuses_are_named_by_cause() {
    let twice = [
        page(PageKind::Measured, FIRST, 2),
        page(PageKind::Measured, FIRST + 1, 2),
    ];
    let outside = [page(PageKind::Zero, 0x2000, 1)];
    for (pages, says) in [(&twice[..], "in the TD already"), (&outside[..], "not private")] {
        let error = launch(&mut model(|_| ()), pages, 1).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn any_seamcall_may_fail_and_never_hangs_the_launch() {
    let mut successes = 0;
    for after in 0..80 {
        let mut vm = model(|vm| vm.module.fails_after = Some(after));
        match launch(&mut vm, &plan(), 2) {
            Ok(_) => successes += 1,
            Err(TdxError::Refused(refusal)) => {
                assert_eq!(refusal.errno(), libc::EIO, "{refusal}");
                assert!(refusal.to_string().contains("dmesg"), "{refusal}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!((1..80).contains(&successes), "{successes}");
}

#[test]
fn the_td_gets_no_attribute_or_state_that_was_not_asked_for() {
    let mut vm = model(|vm| vm.module.attributes = SEPT_VE_DISABLE | 1 | 1 << 63);
    launch(&mut vm, &plan(), 1).unwrap();
    let config = LaunchConfig {
        attributes: SEPT_VE_DISABLE | 1 << 29,
        ..LaunchConfig::default()
    };
    let mut refused = model(|_| ());
    let error = Launching::begin(&mut refused, &config, host()).unwrap_err();
    assert!(error.to_string().contains("MIGRATABLE"), "{error}");
}
