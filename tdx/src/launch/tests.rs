//! The launch over a fake that keeps a log, refuses what it is told to refuse, and loads as many pages as it is told.

use std::collections::VecDeque;

use arch::addr::PageRange;
use arch::platform::LaunchPlan;
use arch::x86::cpuid::CpuidEntry;

use super::*;
use crate::attributes::{BadAttributes, SEPT_VE_DISABLE};
use crate::commands::Command;
use crate::measure::{self, Order};

/// What the fake does at a command, once.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Refuse(i32, u64),
    /// Load this many pages, then fail.
    Load(u64, i32),
}

#[derive(Debug, Default)]
struct Fake {
    log: Vec<String>,
    turns: VecDeque<(Command, Turn)>,
    /// Entries that the answers to E2BIG commands have.
    entries: usize,
    effective: CpuidTable,
    init: Option<InitVm>,
    given: Vec<CpuidTable>,
    loaded: Vec<(u64, u8, bool)>,
}

fn entry(leaf: u32, eax: u32, edx: u32) -> CpuidEntry {
    CpuidEntry {
        leaf,
        eax,
        edx,
        ..CpuidEntry::default()
    }
}

/// What a sound module shows.
fn effective() -> CpuidTable {
    let extended = entry(0x8000_0001, 0, 1 << 29 | 1 << 26 | 1 << 20);
    CpuidTable(vec![entry(1, 0, 0), extended, entry(0x8000_0008, 48 << 16, 0)])
}

fn offered() -> CpuidTable {
    CpuidTable(vec![
        entry(1, 0x806f8, 1 << 28),
        CpuidEntry {
            subleaf: Some(0),
            ..entry(0xd, 7, 0)
        },
        entry(0x4000_0000, 0x4000_0001, 0),
        entry(0x4000_0001, 0x1002, 0),
    ])
}

impl Fake {
    fn new(turns: &[(Command, Turn)]) -> Self {
        Self {
            turns: turns.iter().copied().collect(),
            effective: effective(),
            ..Self::default()
        }
    }

    fn refusing(times: usize, command: Command, errno: i32, hw_error: u64) -> Self {
        Self::new(&vec![(command, Turn::Refuse(errno, hw_error)); times])
    }

    fn turn(&mut self, command: Command) -> Option<Turn> {
        self.log.push(command.to_string());
        if self.turns.front().is_some_and(|(of, _)| *of == command) {
            return self.turns.pop_front().map(|(_, turn)| turn);
        }
        None
    }

    fn plain(&mut self, command: Command) -> Result<(), Refusal> {
        match self.turn(command) {
            Some(Turn::Refuse(errno, hw_error)) => Err(Refusal::new(command, errno, hw_error)),
            Some(Turn::Load(..)) | None => Ok(()),
        }
    }
}

impl TdxCommands for Fake {
    type Vcpu = u32;

    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal> {
        self.plain(Command::Capabilities)?;
        if room < self.entries {
            return Err(Refusal::new(Command::Capabilities, libc::E2BIG, 0));
        }
        let all = |leaf| CpuidEntry {
            leaf,
            subleaf: Some(0),
            eax: u32::MAX,
            ebx: 0,
            ecx: 0,
            edx: u32::MAX,
        };
        Ok(Capabilities {
            attributes: SEPT_VE_DISABLE,
            xfam: 0x207,
            user_calls: 2,
            cpuid: CpuidTable(vec![all(1), all(0x8000_0008)]),
        })
    }

    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal> {
        self.plain(Command::InitVm)?;
        self.init = Some(init.clone());
        Ok(())
    }

    fn get_cpuid(&mut self, _: &mut u32, room: usize) -> Result<CpuidTable, Refusal> {
        self.plain(Command::GetCpuid)?;
        if room < self.entries {
            return Err(Refusal::new(Command::GetCpuid, libc::E2BIG, 0));
        }
        Ok(self.effective.clone())
    }

    fn set_cpuid(&mut self, _: &mut u32, table: &CpuidTable) -> Result<(), Refusal> {
        self.plain(Command::SetCpuid)?;
        self.given.push(table.clone());
        Ok(())
    }

    fn init_vcpu(&mut self, _: &mut u32, rcx: u64) -> Result<(), Refusal> {
        assert_eq!(rcx, 0);
        self.plain(Command::InitVcpu)
    }

    fn init_mem_region(&mut self, _: &mut u32, region: &mut MemRegion<'_>) -> Result<(), Refusal> {
        let turn = self.turn(Command::InitMemRegion);
        let (pages, errno) = match turn {
            Some(Turn::Refuse(errno, _)) => (0, errno),
            Some(Turn::Load(pages, errno)) => (pages, errno),
            None => (region.source.len() as u64, 0),
        };
        for (page, at) in region
            .source
            .iter()
            .zip((region.gpa..).step_by(4096))
            .take(pages as usize)
        {
            self.loaded.push((at, page.0[0], region.measured));
        }
        region.advance(pages);
        if errno == 0 {
            return Ok(());
        }
        Err(Refusal::new(Command::InitMemRegion, errno, 0))
    }

    fn finalize_vm(&mut self) -> Result<(), Refusal> {
        self.plain(Command::FinalizeVm)
    }
}

fn page(kind: PageKind, at: u64, fill: &[u8]) -> LaunchPage {
    let pages = if fill.is_empty() { 2 } else { fill.len() as u64 };
    LaunchPage {
        name: "test",
        range: PageRange::new(Gpa(at), pages << 12).unwrap(),
        kind,
        bytes: fill.iter().flat_map(|byte| [*byte; 4096]).collect(),
    }
}

fn launch(mut fake: &mut Fake, pages: &[LaunchPage], vcpus: u32) -> Result<Measurement, TdxError> {
    let mut launching = Launching::begin(&mut fake, &LaunchConfig::default(), offered())?;
    for page in pages {
        launching.add(page)?;
    }
    for index in 0..vcpus {
        launching.add_vcpu(&mut { index }, index)?;
    }
    launching.finish().map(|(_, mrtd)| mrtd)
}

#[test]
fn commands_come_in_the_order_that_kvm_wants() {
    let mut fake = Fake::new(&[]);
    let pages = [
        page(PageKind::Measured, 0x10_0000, &[1, 2, 3]),
        page(PageKind::Unmeasured, 0x10_4000, &[4]),
        page(PageKind::Zero, 0x11_2000, &[]),
    ];
    let mrtd = launch(&mut fake, &pages, 2).unwrap();
    let plan = LaunchPlan {
        pages: pages.to_vec(),
        vcpus: vec![],
    };
    assert_eq!(mrtd, measure::mrtd(&plan, Order::SinglePass).unwrap());
    let expected = [
        "KVM_TDX_CAPABILITIES",
        "KVM_TDX_INIT_VM",
        "KVM_TDX_GET_CPUID",
        "KVM_SET_CPUID2",
        "KVM_TDX_INIT_VCPU",
        "KVM_TDX_INIT_MEM_REGION",
        "KVM_TDX_INIT_MEM_REGION",
        "KVM_TDX_INIT_MEM_REGION",
        "KVM_SET_CPUID2",
        "KVM_TDX_INIT_VCPU",
        "KVM_TDX_FINALIZE_VM",
    ];
    assert_eq!(fake.log, expected);
    let loaded = [
        (0x10_0000, 1, true),
        (0x10_1000, 2, true),
        (0x10_2000, 3, true),
        (0x10_4000, 4, false),
        (0x11_2000, 0, true),
        (0x11_3000, 0, true),
    ];
    assert_eq!(fake.loaded, loaded);
}

#[test]
fn what_the_owner_fixes_and_the_host_allows_goes_into_init_vm() {
    let mut fake = Fake::new(&[]);
    let config = LaunchConfig {
        mrconfigid: [1; 48],
        mrowner: [2; 48],
        mrownerconfig: [3; 48],
        ..LaunchConfig::default()
    };
    drop(Launching::begin(&mut fake, &config, offered()).unwrap());
    let init = fake.init.unwrap();
    assert_eq!((init.attributes, init.xfam), (SEPT_VE_DISABLE, 0x7));
    assert_eq!(
        (init.mrconfigid, init.mrowner, init.mrownerconfig),
        ([1; 48], [2; 48], [3; 48])
    );
    let given: Vec<_> = init.cpuid.0.iter().map(|e| (e.leaf, e.eax, e.edx)).collect();
    assert_eq!(given, [(1, 0x806f8, 1 << 28), (0x8000_0008, 48 << 16, 0)]);
}

#[test]
fn vcpus_get_what_the_module_shows_each_with_its_own_id() {
    let mut fake = Fake::new(&[]);
    launch(&mut fake, &[], 3).unwrap();
    let third = fake.given.last().unwrap();
    let first = third.get(1, 0).unwrap();
    assert_eq!((first.ebx >> 24, first.ecx & 1 << 21, first.eax), (2, 1 << 21, 0));
    assert_eq!(third.get(0x4000_0000, 0).unwrap().eax, 0x4000_0001);
    assert!(third.get(0xd, 0).is_none(), "the module shows no such leaf");
}

#[test]
fn lists_of_any_length_are_fetched() {
    for entries in [1, 256, 257, 4096] {
        let mut fake = Fake::new(&[]);
        fake.entries = entries;
        launch(&mut fake, &[], 1).unwrap();
    }
    let mut endless = Fake::new(&[]);
    endless.entries = usize::MAX;
    let error = launch(&mut endless, &[], 1).unwrap_err();
    assert!(
        matches!(error, TdxError::Refused(r) if r.errno() == libc::E2BIG),
        "{error}"
    );
    assert!(endless.log.len() < 10);
}

#[test]
fn signals_and_passing_errors_delay_a_launch_and_end_it_only_when_they_do_not_stop() {
    let cases = [
        (Command::Capabilities, libc::EINTR),
        (Command::InitVm, libc::EINTR),
        (Command::InitVm, libc::EAGAIN),
        (Command::GetCpuid, libc::EINTR),
        (Command::GetCpuid, libc::EBUSY),
        (Command::SetCpuid, libc::EINTR),
        (Command::InitVcpu, libc::EINTR),
        (Command::InitVcpu, libc::EBUSY),
        (Command::InitMemRegion, libc::EINTR),
        (Command::InitMemRegion, libc::EAGAIN),
        (Command::FinalizeVm, libc::EINTR),
        (Command::FinalizeVm, libc::EBUSY),
    ];
    let pages = [page(PageKind::Measured, 0x10_0000, &[1, 2])];
    let storms: Vec<_> = cases
        .iter()
        .map(|(command, errno)| {
            thread::spawn({
                let (command, errno, pages) = (*command, *errno, pages.clone());
                move || {
                    launch(&mut Fake::refusing(3, command, errno, 0), &pages, 2).unwrap();
                    let mut storm = Fake::refusing(100_000, command, errno, 0);
                    (
                        command,
                        errno,
                        launch(&mut storm, &pages, 2).unwrap_err(),
                        storm.log.len(),
                    )
                }
            })
        })
        .collect();
    for storm in storms {
        let (command, errno, error, commands) = storm.join().unwrap();
        assert!(
            matches!(&error, TdxError::Refused(r) if r.command == command && r.errno() == errno),
            "{error}"
        );
        assert!(commands < 250, "{command}: {commands}");
    }
}

#[test]
fn a_refusal_that_does_not_pass_ends_the_launch_at_once() {
    let cases = [
        (Command::Capabilities, libc::ENOTTY, 0),
        (Command::InitVm, libc::ENOSPC, 0),
        (Command::InitVm, libc::EBUSY, 0),
        (Command::InitVm, libc::EINVAL, 0xc000_0100_0000_0045),
        (Command::GetCpuid, libc::EIO, 0),
        (Command::SetCpuid, libc::EPERM, 0),
        (Command::InitVcpu, libc::EINVAL, 0),
        (Command::InitMemRegion, libc::EIO, 0),
        (Command::FinalizeVm, libc::EINVAL, 0),
        (Command::FinalizeVm, libc::EIO, 0xc000_0605_0000_0000),
    ];
    for (command, errno, hw_error) in cases {
        let mut fake = Fake::refusing(1, command, errno, hw_error);
        let pages = [page(PageKind::Measured, 0x10_0000, &[1])];
        let error = launch(&mut fake, &pages, 1).unwrap_err();
        let expected = Refusal::new(command, errno, hw_error);
        assert!(matches!(error, TdxError::Refused(r) if r == expected), "{error}");
        assert_eq!(fake.log.last().unwrap(), &command.to_string());
    }
}

#[test]
fn loading_goes_on_where_it_was_interrupted() {
    let turns = [
        (Command::InitMemRegion, Turn::Load(2, libc::EINTR)),
        (Command::InitMemRegion, Turn::Refuse(libc::EAGAIN, 0)),
        (Command::InitMemRegion, Turn::Load(1, libc::EAGAIN)),
    ];
    let mut fake = Fake::new(&turns);
    launch(
        &mut fake,
        &[page(PageKind::Measured, 0x10_0000, &[1, 2, 3, 4, 5])],
        1,
    )
    .unwrap();
    let order: Vec<_> = fake
        .loaded
        .iter()
        .map(|(at, fill, _)| (*at >> 12, *fill))
        .collect();
    assert_eq!(
        order,
        [(0x100, 1), (0x101, 2), (0x102, 3), (0x103, 4), (0x104, 5)]
    );
}

#[test]
fn success_without_progress_is_an_error() {
    let mut fake = Fake::new(&[(Command::InitMemRegion, Turn::Load(0, 0))]);
    let error = launch(&mut fake, &[page(PageKind::Measured, 0x10_0000, &[1])], 1).unwrap_err();
    assert!(
        matches!(error, TdxError::NoProgress { gpa: Gpa(0x10_0000) }),
        "{error}"
    );
}

#[test]
fn a_td_that_would_differ_from_the_machine_is_not_launched() {
    let mut narrow = Fake::new(&[]);
    narrow
        .effective
        .leaf_mut(0x8000_0008)
        .for_each(|e| e.eax = 52 << 16);
    let error = launch(&mut narrow, &[], 1).unwrap_err();
    assert!(
        error.to_string().contains("52 bits, but machines have 48"),
        "{error}"
    );

    let mut poor = Fake::new(&[]);
    poor.effective
        .leaf_mut(0x8000_0001)
        .for_each(|e| e.edx &= !(1 << 26));
    let error = launch(&mut poor, &[], 1).unwrap_err();
    assert!(
        error.to_string().contains("EDX lacks 0x04000000 (1 GiB pages)"),
        "{error}"
    );
    assert_eq!(poor.log.last().unwrap(), "KVM_TDX_GET_CPUID");

    let mut fake = Fake::new(&[]);
    let config = LaunchConfig {
        attributes: SEPT_VE_DISABLE | 1,
        ..LaunchConfig::default()
    };
    let error = Launching::begin(&mut fake, &config, offered()).unwrap_err();
    assert!(
        matches!(
            error,
            TdxError::Attributes(BadAttributes::Forbidden { refused: 1, .. })
        ),
        "{error}"
    );
    assert!(error.to_string().contains("DEBUG"), "{error}");
    assert!(fake.init.is_none());
}

#[test]
fn plans_that_no_td_can_have_are_refused() {
    let mut fake = Fake::new(&[]);
    for kind in [PageKind::Secrets, PageKind::Cpuid] {
        let error = launch(&mut fake, &[page(kind, 0x11_0000, &[])], 1).unwrap_err();
        assert!(matches!(error, TdxError::PageKind { .. }), "{error}");
    }
    let mut short = page(PageKind::Measured, 0x11_0000, &[1, 2]);
    short.bytes.truncate(5000);
    for wrong in [short, page(PageKind::Zero, 0x11_0000, &[1])] {
        let error = launch(&mut fake, &[wrong], 1).unwrap_err();
        assert!(matches!(error, TdxError::Contents { .. }), "{error}");
    }
    let error = launch(&mut fake, &[], 0).unwrap_err();
    assert!(matches!(error, TdxError::NoVcpu), "{error}");
    assert!(!fake.log.contains(&"KVM_TDX_FINALIZE_VM".to_owned()));
}
