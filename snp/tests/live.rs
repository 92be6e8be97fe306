//! On a host with SNP (the emulated one of `scripts/rig --snp` will do): launches a guest of six instructions, and
//! asks kernel and firmware the questions that the model answers, to see that the answers are the same.
//! Elsewhere it says what is missing and skips.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test stops at the first surprise"
)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arch::addr::{Gpa, PageRange};
use arch::exit::Exit;
use arch::kvm::gmem::Gmem;
use arch::kvm::system::Host;
use arch::kvm::vcpu::Vcpu;
use arch::kvm::vm::Vm;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use arch::platform::{Foundation, LaunchPage, LaunchPlan, PageKind, Platform, PlatformFlow};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::{BootState, General};
use snp::commands::{Identity, SevCommands};
use snp::error::Refusal;
use snp::host::{self, Offered, PlatformStatus};
use snp::id_block::{IdAuth, IdBlock};
use snp::ioctl::KvmSev;
use snp::launch::LaunchConfig;
use snp::measure::{self, Measurement, PageType};
use snp::model::Model;
use snp::p384::SigningKey;
use snp::platform::Snp;
use snp::policy::{Policy, PolicyBit};
use snp::vmsa::SevFeatures;

const C_BIT: u64 = 1 << 51;
const RAM_BYTES: u64 = 2 << 20;
/// mov ecx, GHCB MSR; mov eax, termination with code 8 of set 2; xor edx, edx; wrmsr; vmgexit; hlt.
const CODE: [u8; 19] = [
    0xb9, 0x30, 0x01, 0x01, 0xc0, 0xb8, 0x00, 0x21, 0x08, 0x00, 0x31, 0xd2, 0x0f, 0x30, 0xf3, 0x0f, 0x01,
    0xd9, 0xf4,
];

struct Machine {
    host: Host,
    sev: Arc<File>,
}

/// The host, or `None` with the reason printed.
fn machine() -> Option<Machine> {
    let host = Host::open(Path::new("/dev/kvm"));
    let types = host.as_ref().map_or(0, |host| host.capabilities().vm_types);
    match (host, host::open(Path::new("/"), types)) {
        (Ok(host), Ok(sev)) => Some(Machine { host, sev }),
        (Err(error), _) => skip(&error),
        (_, Err(error)) => skip(&error),
    }
}

fn skip(why: &dyn std::error::Error) -> Option<Machine> {
    eprintln!("SKIPPED: {why}");
    None
}

impl Machine {
    fn cpuid(&self) -> CpuidTable {
        let mut cpuid = self.host.supported_cpuid().unwrap();
        snp::cpuid_page::sanitise(&mut cpuid);
        cpuid
    }

    /// A VM with private RAM from address 0 on, nothing initialised.
    fn foundation(&self) -> (Foundation, Gmem) {
        let vm = Arc::new(Vm::create(&self.host, host::VM_TYPE).unwrap());
        let all = PageRange::new(Gpa(0), RAM_BYTES).unwrap();
        let ram = HostRam::allocate(&[all]).unwrap();
        let gmem = Gmem::new(&vm, RAM_BYTES).unwrap();
        for (slot, region) in (0..).zip(ram.regions()) {
            vm.map_slot(slot, Arc::clone(region), Some((&gmem, 0))).unwrap();
        }
        vm.set_visibility(all, Visibility::Private).unwrap();
        let visible = Arc::new(VisibilityMap::new(&[all], Visibility::Private));
        let shared = SharedMem::new(Arc::clone(ram.map()), visible);
        (
            Foundation {
                vm,
                ram,
                shared,
                cpuid: self.cpuid(),
            },
            gmem,
        )
    }

    fn vcpus(&self, vm: &Vm, count: u32) -> Vec<Vcpu> {
        let create = |index| {
            let vcpu = vm.create_vcpu(index).unwrap();
            vcpu.set_cpuid(&self.cpuid()).unwrap();
            vcpu
        };
        (0..count).map(create).collect()
    }
}

fn page(name: &'static str, at: u64, len: u64, kind: PageKind, bytes: Vec<u8>) -> LaunchPage {
    LaunchPage {
        name,
        range: PageRange::new(Gpa(at), len).unwrap(),
        kind,
        bytes,
    }
}

fn plan(vcpus: u64) -> LaunchPlan {
    let mut code = CODE.to_vec();
    code.resize(0x1000, 0xf4);
    let mut tables = vec![0; 0x2000];
    tables.splice(..8, (0x3000 | 3 | C_BIT).to_le_bytes());
    tables.splice(0x1000..0x1008, (0x83 | C_BIT).to_le_bytes());
    let pages = vec![
        page("code", 0x1000, 0x1000, PageKind::Measured, code),
        page("tables", 0x2000, 0x2000, PageKind::Measured, tables),
        page("secrets", 0x4000, 0x1000, PageKind::Secrets, vec![]),
        page("CPUID", 0x5000, 0x1000, PageKind::Cpuid, vec![]),
        page("zero", 0x6000, 0x2000, PageKind::Zero, vec![]),
        page(
            "unmeasured",
            0x8000,
            0x1000,
            PageKind::Unmeasured,
            vec![7; 0x1000],
        ),
    ];
    let start = |index| {
        BootState::long_mode(
            General {
                rip: 0x1000,
                rdi: index,
                ..General::default()
            },
            0x2000 | C_BIT,
        )
    };
    LaunchPlan {
        pages,
        vcpus: (0..vcpus).map(start).collect(),
    }
}

/// Launches and returns what the platform says of its end.
fn launch(machine: &Machine, vcpus: u32, config: LaunchConfig) -> Result<(Measurement, String), String> {
    let words = |code| Some(format!("reason {code}"));
    let snp = Snp::new(Arc::clone(&machine.sev), config, None, words);
    let (foundation, _gmem) = machine.foundation();
    let vm = Arc::clone(&foundation.vm);
    let told = |error: arch::platform::PlatformError| {
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    };
    let launch = snp.begin(foundation).map_err(told)?;
    let mut vcpus = machine.vcpus(&vm, vcpus);
    let sealed = plan(vcpus.len() as u64).apply(launch, &mut vcpus).map_err(told)?;
    let digest = snp.digest().lock().unwrap().unwrap();
    let exit = vcpus.first_mut().unwrap().enter().unwrap();
    let Exit::Platform(exit) = exit else {
        panic!("{exit:?}")
    };
    let end = sealed.handle_exit(exit).unwrap();
    let PlatformFlow::Terminated(words) = end else {
        panic!("{end:?}")
    };
    Ok((digest, words))
}

#[test]
fn a_guest_starts_and_ends_with_the_reason_it_gives_and_the_digest_predicted() {
    let Some(machine) = machine() else { return };
    for vcpus in [1, 2, 4] {
        let predicted = measure::digest(&plan(vcpus.into()), SevFeatures::SNP).unwrap();
        let ended = launch(&machine, vcpus, LaunchConfig::default());
        assert_eq!(
            ended,
            Ok((predicted, "the shim terminated: reason 8".into())),
            "{vcpus} vCPUs"
        );
    }
    let status = PlatformStatus::ask(&machine.sev).unwrap();
    eprintln!("{status:?} {:?}", Offered::ask(&machine.host));
    assert!(status.initialised);
}

#[test]
fn an_id_block_for_this_launch_is_accepted_and_another_one_refused() {
    let Some(machine) = machine() else { return };
    let key = SigningKey::parse(include_bytes!("recorded/id-block/id-key.pem")).unwrap();
    let author = SigningKey::parse(include_bytes!("recorded/id-block/author-key.pem")).unwrap();
    let with = |measurement| {
        let policy = Policy::default();
        let block = IdBlock {
            measurement,
            family_id: [1; 16],
            image_id: [2; 16],
            guest_svn: 3,
            policy,
        };
        let auth = block.sign(&key, Some(&author)).unwrap();
        Identity {
            id_block: Some((block, auth)),
            host_data: [9; 32],
            ..Identity::default()
        }
    };
    let config = |identity| LaunchConfig {
        identity,
        ..LaunchConfig::default()
    };
    for vcpus in [1, 2, 4] {
        // Firmware accepts the block only if its own digest is the predicted one.
        let predicted = measure::digest(&plan(vcpus.into()), SevFeatures::SNP).unwrap();
        let ended = launch(&machine, vcpus, config(with(predicted)));
        assert!(ended.is_ok(), "{vcpus} vCPUs: {ended:?}");
    }
    let refused = launch(&machine, 1, config(with(Measurement([1; 48])))).unwrap_err();
    assert!(
        refused.contains("the ID block is for launch digest 0101"),
        "{refused}"
    );
}

/// Signatures that do not verify, each for a launch whose digest and policy are right.
#[test]
fn firmware_refuses_identities_that_were_tampered_with() {
    let Some(machine) = machine() else { return };
    let key = SigningKey::parse(include_bytes!("recorded/id-block/id-key.pem")).unwrap();
    let author = SigningKey::parse(include_bytes!("recorded/id-block/author-key.pem")).unwrap();
    let block = IdBlock {
        measurement: measure::digest(&plan(1), SevFeatures::SNP).unwrap(),
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        policy: Policy::default(),
    };
    let good = block.sign(&key, Some(&author)).unwrap();
    for (what, at) in [
        ("block signature", 0x48),
        ("ID key", 0x250),
        ("ID key signature", 0x690),
    ] {
        let mut bytes = *good.bytes();
        bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1);
        let auth = IdAuth::parse(&bytes).unwrap();
        assert!(auth.check(&block).is_err(), "{what}: noticed before the launch");
        let identity = Identity {
            id_block: Some((block, auth)),
            ..Identity::default()
        };
        let config = LaunchConfig {
            identity,
            ..LaunchConfig::default()
        };
        let refused = launch(&machine, 1, config).unwrap_err();
        eprintln!("{what}: {refused}");
        assert!(
            refused.contains("SNP_LAUNCH_FINISH was refused"),
            "{what}: {refused}"
        );
    }
}

/// One question and its answer: errno and firmware status, or what was done.
type Answers = Vec<(&'static str, Result<u64, (i32, u32)>)>;

fn answer(result: Result<u64, Refusal>) -> Result<u64, (i32, u32)> {
    result.map_err(|r| (r.errno(), r.firmware.map_or(0, |status| status.0)))
}

/// Page-aligned, as the kernel wants sources.
#[repr(align(4096))]
struct Aligned([u8; 0x3000]);

/// Asks everything that a VMM can do wrong. `vcpus` makes the vCPUs when it is time; frames from 0x100 on are
/// shared, those above belong to no slot.
fn interrogate(vm: &mut impl SevCommands, mut vcpus: impl FnMut()) -> Answers {
    let mut source = Box::new(Aligned([7; 0x3000]));
    let policy = Policy::default();
    let newer = Policy::from_bits(policy.bits() | 0x200).unwrap();
    let block = IdBlock {
        measurement: Measurement([1; 48]),
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        policy,
    };
    let key = SigningKey::parse(include_bytes!("recorded/id-block/id-key.pem")).unwrap();
    let identity = Identity {
        id_block: Some((block, block.sign(&key, None).unwrap())),
        ..Identity::default()
    };
    let done = |result: Result<(), Refusal>| answer(result.map(|()| 0));
    let mut answers: Answers = vec![
        ("certificates before INIT2", done(vm.enable_req_certs())),
        ("START before INIT2", done(vm.launch_start(policy))),
        (
            "FINISH before INIT2",
            done(vm.launch_finish(&Identity::default())),
        ),
        ("INIT2 with the SNP bit", done(vm.init2(1))),
        ("INIT2 with an unknown feature", done(vm.init2(1 << 40))),
        ("INIT2", done(vm.init2(0))),
        ("INIT2 again", done(vm.init2(0))),
        (
            "UPDATE before START",
            answer(vm.launch_update(PageType::Normal, 1, 1, &mut source.0)),
        ),
        (
            "FINISH before START",
            done(vm.launch_finish(&Identity::default())),
        ),
        (
            "START with a migration agent",
            done(vm.launch_start(policy.set(PolicyBit::MigrationAgent, true))),
        ),
        ("START for newer firmware", done(vm.launch_start(newer))),
        ("START", done(vm.launch_start(policy))),
        ("START again", done(vm.launch_start(policy))),
    ];
    let updates = [
        ("a VMSA", PageType::Vmsa, 1, 1),
        ("nothing", PageType::Normal, 1, 0),
        ("a shared page", PageType::Normal, 0x100, 1),
        ("no slot", PageType::Normal, 0x9999, 1),
        ("three pages", PageType::Normal, 1, 3),
        ("one of them again", PageType::Normal, 2, 1),
        ("up to a page that is there", PageType::Unmeasured, 0, 2),
        ("the page that is there", PageType::Unmeasured, 1, 1),
        ("zero pages up to a shared one", PageType::Zero, 0xfe, 3),
        ("secrets", PageType::Secrets, 5, 1),
    ];
    for (name, kind, gfn, pages) in updates {
        answers.push((name, answer(vm.launch_update(kind, gfn, pages, &mut source.0))));
    }
    vcpus();
    answers.extend([
        ("certificates after a vCPU", done(vm.enable_req_certs())),
        ("FINISH with another ID block", done(vm.launch_finish(&identity))),
        ("FINISH again", done(vm.launch_finish(&Identity::default()))),
    ]);
    answers
}

/// The model's answers. Always compared with what was recorded from the emulated host's kernel, so that the model
/// stays true where there is no such host.
fn modelled() -> Answers {
    let model = std::cell::RefCell::new(Model::new(4));
    model.borrow_mut().slot(0..0x200, true);
    model.borrow_mut().set_private(0..0x100);
    struct Shared<'a>(&'a std::cell::RefCell<Model>);
    impl SevCommands for Shared<'_> {
        fn init2(&mut self, features: u64) -> Result<(), Refusal> {
            self.0.borrow_mut().init2(features)
        }
        fn enable_req_certs(&mut self) -> Result<(), Refusal> {
            self.0.borrow_mut().enable_req_certs()
        }
        fn launch_start(&mut self, policy: Policy) -> Result<(), Refusal> {
            self.0.borrow_mut().launch_start(policy)
        }
        fn launch_update(
            &mut self,
            kind: PageType,
            gfn: u64,
            pages: u64,
            source: &mut [u8],
        ) -> Result<u64, Refusal> {
            self.0.borrow_mut().launch_update(kind, gfn, pages, source)
        }
        fn launch_finish(&mut self, identity: &Identity) -> Result<(), Refusal> {
            self.0.borrow_mut().launch_finish(identity)
        }
    }
    let create = || {
        model.borrow_mut().create_vcpu();
    };
    interrogate(&mut Shared(&model), create)
}

#[test]
fn kernel_and_firmware_answer_as_the_model_does() {
    let Some(machine) = machine() else { return };
    let (foundation, _gmem) = machine.foundation();
    let high = PageRange::new(Gpa(0x10_0000), 0x10_0000).unwrap();
    foundation.vm.set_visibility(high, Visibility::Shared).unwrap();
    let mut vcpus = Vec::new();
    let vm = Arc::clone(&foundation.vm);
    let mut commands = KvmSev::new(Arc::clone(&vm), Arc::clone(&machine.sev));
    let real = interrogate(&mut commands, || vcpus = machine.vcpus(&vm, 1));
    for (real, modelled) in real.iter().zip(modelled()) {
        eprintln!("{real:?}");
        assert_eq!(*real, modelled);
    }
}

#[test]
fn the_model_answers_as_the_emulated_host_once_did() {
    let answers: Vec<String> = modelled()
        .iter()
        .map(|(name, answer)| format!("{name}: {answer:?}"))
        .collect();
    let recorded: Vec<&str> = include_str!("recorded/kvm-answers.txt").lines().collect();
    assert_eq!(answers, recorded);
}
