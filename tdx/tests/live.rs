//! On a host with TDX (the emulated one of `scripts/rig --tdx` will do): asks kernel and module the questions that
//! the model answers, to see that the answers are the same. Elsewhere it says what is missing and skips.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::Arc;

use arch::addr::{Gpa, PageRange};
use arch::kvm::gmem::Gmem;
use arch::kvm::system::Host;
use arch::kvm::vm::Vm;
use arch::mem::Visibility;
use arch::mem::map::HostRam;
use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use tdx::commands::{Capabilities, InitVm, MemRegion, Page, TdxCommands};
use tdx::error::Refusal;
use tdx::host;
use tdx::ioctl::KvmTdx;
use tdx::model::{Kernel, Model};

const RAM_PAGES: u64 = 64;
const PAGE: u64 = 4096;
const SHARED: u64 = 1 << 47;
const ROOM: usize = 256;

/// `errno` and the module's status; zeros for success.
type Answer = (i32, u64);

fn answer<T>(to: Result<T, Refusal>) -> Answer {
    let refused = |refusal: Refusal| (refusal.errno(), refusal.status.map_or(0, |status| status.0));
    to.map_or_else(refused, |_| (0, 0))
}

/// A TD and its first vCPU, of the kernel or of the model.
trait Td {
    type Commands: TdxCommands;
    fn commands(&mut self) -> &mut Self::Commands;
    fn create_vcpu(&mut self) -> <Self::Commands as TdxCommands>::Vcpu;
}

/// A VM with 256 KiB that are private, nothing initialised.
struct Real {
    commands: KvmTdx,
    vm: Arc<Vm>,
    _gmem: Gmem,
    _ram: HostRam,
}

impl Real {
    fn new(host: &Host) -> Self {
        let vm = Arc::new(Vm::create(host, host::VM_TYPE).unwrap());
        let all = PageRange::new(Gpa(0), RAM_PAGES * PAGE).unwrap();
        let ram = HostRam::allocate(&[all]).unwrap();
        let gmem = Gmem::new(&vm, RAM_PAGES * PAGE).unwrap();
        let region = Arc::clone(ram.regions().first().unwrap());
        vm.map_slot(0, region, Some((&gmem, 0))).unwrap();
        vm.set_visibility(all, Visibility::Private).unwrap();
        Self {
            commands: KvmTdx::new(Arc::clone(&vm)),
            vm,
            _gmem: gmem,
            _ram: ram,
        }
    }
}

impl Td for Real {
    type Commands = KvmTdx;

    fn commands(&mut self) -> &mut KvmTdx {
        &mut self.commands
    }

    fn create_vcpu(&mut self) -> arch::kvm::vcpu::Vcpu {
        self.vm.create_vcpu(0).unwrap()
    }
}

impl Td for Model {
    type Commands = Self;

    fn commands(&mut self) -> &mut Self {
        self
    }

    fn create_vcpu(&mut self) -> usize {
        Self::create_vcpu(self, 0).unwrap()
    }
}

fn model() -> Model {
    let mut model = Model::create(Kernel::default(), host::VM_TYPE).unwrap();
    model.split_irqchip(24).unwrap();
    model.exit_hypercall(1 << 12).unwrap();
    model.slot(0..RAM_PAGES, true).unwrap();
    model.set_private(0..RAM_PAGES);
    model
}

/// Every configurable leaf with nothing set, and 48 bits of address.
fn parameters(offered: &Capabilities) -> InitVm {
    let mut cpuid = offered.cpuid.clone();
    for entry in &mut cpuid.0 {
        (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        if entry.leaf == 0x8000_0008 {
            entry.eax = 48 << 16;
        }
    }
    InitVm {
        attributes: 1 << 28,
        xfam: 3,
        mrconfigid: [1; 48],
        mrowner: [2; 48],
        mrownerconfig: [3; 48],
        cpuid,
    }
}

fn leaf(init: &mut InitVm, leaf: u32) -> &mut CpuidEntry {
    init.cpuid.leaf_mut(leaf).next().unwrap()
}

type Change = fn(&mut InitVm);

/// What no INIT_VM may ask for.
const BAD_PARAMETERS: [(&str, Change); 9] = [
    ("47 bits of address", |i| leaf(i, 0x8000_0008).eax = 47 << 16),
    ("no address sizes", |i| {
        i.cpuid.0.retain(|e| e.leaf != 0x8000_0008)
    }),
    ("not a configurable leaf", |i| leaf(i, 1).leaf = 2),
    ("a leaf twice", |i| {
        let entry = *leaf(i, 1);
        i.cpuid.0.push(entry);
    }),
    ("WAITPKG", |i| leaf(i, 7).ecx = 1 << 5),
    ("attribute DEBUG", |i| i.attributes |= 1),
    ("an XFAM bit", |i| i.xfam |= 1 << 17),
    ("too many entries", |i| {
        let entry = *leaf(i, 1);
        i.cpuid.0.resize(257, entry);
    }),
    ("a fixed CPUID bit", |i| leaf(i, 1).edx = 1),
];

fn x2apic(set: bool) -> CpuidTable {
    let one = CpuidEntry {
        leaf: 1,
        ecx: u32::from(set) << 21,
        ..CpuidEntry::default()
    };
    let sizes = CpuidEntry {
        leaf: 0x8000_0008,
        eax: 48 << 16,
        ..CpuidEntry::default()
    };
    CpuidTable(vec![one, sizes])
}

/// One launch, with everything in it that is refused on the way.
fn launch<T: Td>(mut td: T) -> Vec<(String, Answer)> {
    let mut answers = Vec::new();
    let mut note = |what: &str, answer| answers.push((what.to_owned(), answer));
    let commands = td.commands();
    note("capabilities, no room", answer(commands.capabilities(1)));
    let offered = commands.capabilities(ROOM).unwrap();
    for (what, change) in BAD_PARAMETERS {
        let mut init = parameters(&offered);
        change(&mut init);
        note(what, answer(commands.init_vm(&init)));
    }
    note("INIT_VM", answer(commands.init_vm(&parameters(&offered))));
    note("INIT_VM twice", answer(commands.init_vm(&parameters(&offered))));
    note("capabilities after INIT_VM", answer(commands.capabilities(ROOM)));
    let mut vcpu = td.create_vcpu();
    let commands = td.commands();
    note(
        "INIT_VCPU without CPUID",
        answer(commands.init_vcpu(&mut vcpu, 0)),
    );
    for (what, set) in [("INIT_VCPU without x2APIC", false), ("INIT_VCPU", true)] {
        commands.set_cpuid(&mut vcpu, &x2apic(set)).unwrap();
        note(what, answer(commands.init_vcpu(&mut vcpu, 7)));
    }
    note("INIT_VCPU twice", answer(commands.init_vcpu(&mut vcpu, 7)));
    note("GET_CPUID, no room", answer(commands.get_cpuid(&mut vcpu, 1)));
    note("GET_CPUID", answer(commands.get_cpuid(&mut vcpu, ROOM)));
    let pages = vec![Page([7; 4096]); 2];
    let mut add = |commands: &mut T::Commands, gpa, count, measured| {
        let mut region = MemRegion {
            gpa,
            source: pages.get(..count).unwrap(),
            measured,
        };
        let (errno, status) = answer(commands.init_mem_region(&mut vcpu, &mut region));
        (errno, status | region.gpa << 1)
    };
    for (what, gpa, count, measured) in [
        ("shared bit", SHARED | 0x1000, 1, true),
        ("reaching into the shared half", SHARED - PAGE, 2, true),
        ("no pages", 0x1000, 0, true),
        ("unaligned", 0x1001, 1, true),
        ("outside of all slots", RAM_PAGES * PAGE, 1, true),
        ("half outside", (RAM_PAGES - 1) * PAGE, 2, true),
        ("two pages", 0x1000, 2, true),
        ("an unmeasured page", 0x4000, 1, false),
        ("a page twice", 0x4000, 1, true),
    ] {
        note(what, add(commands, gpa, count, measured));
    }
    note("FINALIZE_VM", answer(commands.finalize_vm()));
    note("FINALIZE_VM twice", answer(commands.finalize_vm()));
    note("a page after FINALIZE_VM", add(commands, 0x8000, 1, true));
    note(
        "INIT_VCPU after FINALIZE_VM",
        answer(commands.init_vcpu(&mut vcpu, 0)),
    );
    note(
        "GET_CPUID after FINALIZE_VM",
        answer(commands.get_cpuid(&mut vcpu, ROOM)),
    );
    answers
}

/// KVM, where it can launch TDs; elsewhere the reason is said, and the rig takes that for a failure.
fn tdx_host() -> Option<Host> {
    let kvm = Host::open(Path::new("/dev/kvm"));
    let types = kvm.as_ref().map_or(0, |kvm| kvm.capabilities().vm_types);
    match (kvm, host::check(Path::new("/"), types)) {
        (Ok(kvm), Ok(())) => return Some(kvm),
        (Err(error), _) => eprintln!("SKIPPED: {error}"),
        (_, Err(error)) => eprintln!("SKIPPED: {error}"),
    }
    None
}

#[test]
fn kernel_and_module_answer_as_the_model_does() {
    let Some(kvm) = tdx_host() else {
        return;
    };
    let real = launch(Real::new(&kvm));
    assert!(real.len() > 30, "{real:?}");
    for (real, modelled) in real.iter().zip(launch(model())) {
        eprintln!("{}: errno {} status {:#x}", real.0, real.1.0, real.1.1);
        assert_eq!(*real, modelled);
    }
}

/// Key ids are few: 32 on the emulated host. A TD that is dropped at any point gives its own back.
#[test]
fn dropped_launches_leak_no_key_id() {
    let Some(kvm) = tdx_host() else {
        return;
    };
    for round in 0..40 {
        let mut td = Real::new(&kvm);
        let offered = td.commands().capabilities(ROOM).unwrap();
        let init = td.commands().init_vm(&parameters(&offered));
        assert_eq!(answer(init), (0, 0), "TD {round}");
        if round % 2 == 0 {
            let mut vcpu = td.create_vcpu();
            td.commands().set_cpuid(&mut vcpu, &x2apic(true)).unwrap();
            td.commands().init_vcpu(&mut vcpu, 0).unwrap();
        }
    }
}
