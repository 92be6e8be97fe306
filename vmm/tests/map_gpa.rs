//! A TD's MapGPA from call to answer: the model of KVM cuts it into exits, cvmm's vCPU loop serves them, and the answers
//! lead to what the guest gets.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test stops at the first surprise"
)]

use std::io;
use std::sync::Arc;

use arch::addr::{Gpa, PageRange};
use arch::exit::{Exit, PlatformExit, Reply};
use arch::kvm::vcpu::RunError;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use arch::platform::{PlatformError, PlatformFlow, Sealed};
use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use devices::bus::Bus;
use tdx::launch::{LaunchConfig, Launching};
use tdx::model::{Call, Completion, Kernel, Model, TdxExit};
use vmm::ram::{Backing, GuestRam, ranges};
use vmm::vcpu::{Enter, Flow, Memory, Services, VcpuError, step};

const RAM: u64 = 64 << 20;
const SHARED: u64 = 1 << 47;
const SUCCESS: u64 = 0;
const RETRY: u64 = 1;
const INVALID: u64 = 1 << 63;
const MIB: u64 = 1 << 20;

#[derive(Debug)]
struct Works;
impl Backing for Works {
    fn set_attribute(&self, _: PageRange, _: Visibility) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: PageRange, _: Visibility) -> io::Result<()> {
        Ok(())
    }
}

/// As TDX explains failures, and nothing else.
#[derive(Debug)]
struct Explains;
impl Sealed for Explains {
    fn handle_exit(&self, _: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        panic!("no such exit here");
    }
    fn explain_failure(&self, error: &io::Error) -> Option<String> {
        tdx::platform::explain_failure(error)
    }
}

/// One exit, and where its answer goes.
struct One {
    gpa: u64,
    pages: u64,
    private: bool,
    reply: [u8; 8],
}

impl Enter for One {
    fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        Ok(Exit::Convert {
            gpa: self.gpa,
            pages: self.pages,
            to: if self.private {
                Visibility::Private
            } else {
                Visibility::Shared
            },
            reply: Reply(&mut self.reply),
        })
    }
    fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        Ok(Exit::Interrupted)
    }
    fn populate(&mut self, _: PageRange) {}
}

/// `KVM_RUN` fails with this errno.
struct Fails(i32);
impl Enter for Fails {
    fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        Err(RunError::Run {
            index: 0,
            source: io::Error::from_raw_os_error(self.0),
        })
    }
    fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        self.enter()
    }
    fn populate(&mut self, _: PageRange) {}
}

struct Machine {
    td: Model,
    services: Services,
}

impl Machine {
    /// A TD that runs; all its RAM is private.
    fn new() -> Self {
        let mut vm = Model::create(Kernel::default(), 5).unwrap();
        vm.split_irqchip(0).unwrap();
        vm.exit_hypercall(1 << 12).unwrap();
        let offered = CpuidTable(vec![CpuidEntry {
            leaf: 1,
            ..CpuidEntry::default()
        }]);
        let mut launching = Launching::begin(vm, &LaunchConfig::default(), offered).unwrap();
        launching.commands().create_vcpu(0).unwrap();
        launching.add_vcpu(&mut 0, 0).unwrap();
        let (td, _) = launching.finish().unwrap();
        let ram = ranges(RAM).unwrap();
        let host = HostRam::allocate(&ram).unwrap();
        let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Private));
        let shared = SharedMem::new(Arc::clone(host.map()), Arc::clone(&visible));
        let services = Services {
            ports: Bus::default(),
            mmio: Bus::default(),
            ram: Arc::new(GuestRam::new(shared, visible, Box::new(Works))),
            private_backing: true,
            platform: Box::new(Explains),
        };
        Self { td, services }
    }

    /// The guest's call: sizes of the exits in pages, and R10 and R11 in the end. `interrupt` is pending after each.
    fn map_gpa(&mut self, gpa: u64, bytes: u64, interrupt: bool) -> (Vec<u64>, u64, u64) {
        let mut next = self.td.call(0, Call::MapGpa { gpa, bytes });
        let mut exits = Vec::new();
        loop {
            match next {
                Completion::Guest { r10, r11 } => return (exits, r10, r11),
                Completion::Exit(TdxExit::MapGpaRange {
                    gpa,
                    pages,
                    attributes,
                }) => {
                    exits.push(pages);
                    let mut vcpu = One {
                        gpa,
                        pages,
                        private: attributes == 1 << 4,
                        reply: [0xee; 8],
                    };
                    let flow = step(&mut vcpu, &mut Memory::default(), &self.services).unwrap();
                    assert_eq!(flow, Flow::Resume);
                    next = self.td.complete(0, u64::from_ne_bytes(vcpu.reply), interrupt);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn shared_bytes(&self) -> u64 {
        self.services.ram.gauges().shared_bytes
    }
}

/// Case 27.
#[test]
fn a_long_range_changes_sides_in_chunks_of_two_mebibytes() {
    let mut machine = Machine::new();
    let (at, bytes) = (0x12_3000, 5 * MIB + 0x1000);
    assert_eq!(
        machine.map_gpa(SHARED | at, bytes, false),
        (vec![512, 512, 257], SUCCESS, 0)
    );
    let shared = machine.services.ram.shared();
    assert!(shared.all_shared(Gpa(at), bytes));
    assert_eq!(machine.shared_bytes(), bytes);
    assert_eq!(
        machine.map_gpa(at, bytes, false),
        (vec![512, 512, 257], SUCCESS, 0)
    );
    assert_eq!(machine.shared_bytes(), 0);
}

#[test]
fn a_guest_that_is_interrupted_goes_on_where_it_was() {
    let mut machine = Machine::new();
    let end = SHARED | (9 * MIB);
    let mut at = SHARED | MIB;
    let mut calls = 0;
    loop {
        let (exits, status, next) = machine.map_gpa(at, end.checked_sub(at).unwrap(), true);
        assert_eq!(exits.len(), 1);
        calls += 1;
        if status == SUCCESS {
            break;
        }
        assert_eq!((status, next), (RETRY, at.checked_add(2 * MIB).unwrap()));
        at = next;
    }
    assert_eq!((calls, machine.shared_bytes()), (4, 8 * MIB));
}

/// C53 of the list of hostile cases, as a TD reaches it.
#[test]
fn ranges_that_are_not_ram_are_the_guests_mistake_and_change_nothing() {
    let mut machine = Machine::new();
    let cases = [
        // RAM, then nothing: the chunk across the end is refused as a whole.
        (
            SHARED | (RAM - MIB),
            2 * MIB,
            vec![512],
            INVALID,
            SHARED | (RAM - MIB),
        ),
        (RAM, 2 * MIB, vec![512], INVALID, RAM),
        (0xc000_0000, 0x1000, vec![1], INVALID, 0xc000_0000),
        (0xffff_f000, 0x1000, vec![1], INVALID, 0xffff_f000),
        ((1 << 47) - 0x1000, 0x1000, vec![1], INVALID, (1 << 47) - 0x1000),
        // What is no memory at all is shared already.
        (SHARED | 0xc000_0000, 4 * MIB, vec![512, 512], SUCCESS, 0),
        (SHARED | RAM, 0x1000, vec![1], SUCCESS, 0),
    ];
    for (gpa, bytes, exits, status, detail) in cases {
        assert_eq!(
            machine.map_gpa(gpa, bytes, false),
            (exits, status, detail),
            "{gpa:#x}"
        );
        assert_eq!(machine.shared_bytes(), 0, "{gpa:#x}");
    }
    // The part before the mistake has changed sides, and the guest learns where it stopped.
    let (exits, status, stopped) = machine.map_gpa(SHARED | (RAM - 3 * MIB), 4 * MIB, false);
    assert_eq!(
        (exits, status, stopped),
        (vec![512, 512], INVALID, SHARED | (RAM - MIB))
    );
    assert_eq!(machine.shared_bytes(), 2 * MIB);
}

#[test]
fn a_page_that_a_device_is_using_makes_the_guest_try_again() {
    let mut machine = Machine::new();
    machine.map_gpa(SHARED, 4 * MIB, false);
    let ram = Arc::clone(&machine.services.ram);
    let pin = ram.shared().pin(Gpa(3 * MIB), 0x1000).unwrap();
    assert_eq!(
        machine.map_gpa(0, 4 * MIB, false),
        (vec![512, 512], RETRY, 2 * MIB)
    );
    drop(pin);
    assert_eq!(machine.map_gpa(2 * MIB, 2 * MIB, false), (vec![512], SUCCESS, 0));
    assert_eq!(machine.shared_bytes(), 0);
}

/// Case 28: memory that was not accepted.
#[test]
fn a_td_that_kvm_cannot_run_any_more_has_crashed_and_other_failures_are_the_hosts() {
    let machine = Machine::new();
    let failing = |errno| step(&mut Fails(errno), &mut Memory::default(), &machine.services);
    match failing(libc::EIO) {
        Ok(Flow::Crashed(why)) => assert!(why.contains("had not accepted"), "{why}"),
        other => panic!("{other:?}"),
    }
    for errno in [libc::EFAULT, libc::EINVAL, libc::ENOMEM] {
        let error = failing(errno).unwrap_err();
        assert!(matches!(error, VcpuError::Run(_)), "{error}");
    }
}
