//! The whole launch on the model, command by command, against a recorded trace: every field of every command, and the
//! contents of every page by their hash. A difference is a change of what cvmm asks of KVM, and must be wanted.
//! `BLESS=1 cargo test -p tdx --test launch` records it anew.
#![expect(
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    clippy::wildcard_enum_match_arm,
    reason = "a test stops at the first surprise"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use arch::addr::{Gpa, PageRange};
use arch::platform::{LaunchPage, PageKind};
use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use sha2::{Digest, Sha384};
use tdx::commands::{Capabilities, InitVm, MemRegion, Page, TdxCommands};
use tdx::cpuid;
use tdx::error::{Refusal, TdxError};
use tdx::launch::{LaunchConfig, Launching};
use tdx::measure::Measurement;
use tdx::model::{Entry, Kernel, Model};

/// Passes commands on to the model and writes down what went in and what came out.
struct Recorder {
    model: Model,
    cpus: u32,
    trace: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rows(table: &CpuidTable) -> String {
    let mut text = String::new();
    for e in &table.0 {
        let subleaf = e.subleaf.map_or("-".into(), |n| format!("{n:x}"));
        let (eax, ebx, ecx, edx) = (e.eax, e.ebx, e.ecx, e.edx);
        writeln!(
            text,
            "  {:08x}.{subleaf} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}",
            e.leaf
        )
        .unwrap();
    }
    text
}

impl Recorder {
    /// Memory and vCPUs, which the machine makes once there is a TD.
    fn furnish(&mut self) {
        for frames in [0..0x4000, 0xf_ffff..0x10_0000] {
            self.model.slot(frames.clone(), true).unwrap();
            self.model.set_private(frames);
        }
        for id in 0..self.cpus {
            self.model.create_vcpu(id).unwrap();
        }
    }

    fn note<T>(&mut self, line: &str, answer: Result<T, Refusal>) -> Result<T, Refusal> {
        let came = match &answer {
            Ok(_) => "ok".to_owned(),
            Err(refusal) => format!(
                "errno {} status {:x?}",
                refusal.errno(),
                refusal.status.map(|s| s.0)
            ),
        };
        writeln!(self.trace, "{line}: {came}").unwrap();
        answer
    }
}

impl TdxCommands for Recorder {
    type Vcpu = usize;

    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal> {
        let answer = self.model.capabilities(room);
        self.note(&format!("CAPABILITIES room {room}"), answer)
    }

    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal> {
        let answer = self.model.init_vm(init);
        let (attributes, xfam) = (init.attributes, init.xfam);
        let answer = self.note(
            &format!("INIT_VM attributes {attributes:#x} xfam {xfam:#x}"),
            answer,
        );
        for (name, id) in [
            ("mrconfigid", &init.mrconfigid),
            ("mrowner", &init.mrowner),
            ("mrownerconfig", &init.mrownerconfig),
        ] {
            writeln!(self.trace, "  {name} {}", hex(id)).unwrap();
        }
        self.trace += &rows(&init.cpuid);
        if answer.is_ok() {
            self.furnish();
        }
        answer
    }

    fn get_cpuid(&mut self, vcpu: &mut usize, room: usize) -> Result<CpuidTable, Refusal> {
        let answer = self.model.get_cpuid(vcpu, room);
        self.note(&format!("GET_CPUID {vcpu} room {room}"), answer)
    }

    fn set_cpuid(&mut self, vcpu: &mut usize, table: &CpuidTable) -> Result<(), Refusal> {
        let answer = self.model.set_cpuid(vcpu, table);
        let answer = self.note(&format!("SET_CPUID2 {vcpu}"), answer);
        self.trace += &rows(table);
        answer
    }

    fn init_vcpu(&mut self, vcpu: &mut usize, rcx: u64) -> Result<(), Refusal> {
        let answer = self.model.init_vcpu(vcpu, rcx);
        self.note(&format!("INIT_VCPU {vcpu} rcx {rcx:#x}"), answer)
    }

    fn init_mem_region(&mut self, vcpu: &mut usize, region: &mut MemRegion<'_>) -> Result<(), Refusal> {
        let (gpa, pages, measured) = (region.gpa, region.source.len(), u8::from(region.measured));
        let bytes: Vec<u8> = region.source.iter().flat_map(|page| page.0).collect();
        let hash = hex(&Sha384::digest(bytes));
        let answer = self.model.init_mem_region(vcpu, region);
        let line =
            format!("INIT_MEM_REGION {vcpu} gpa {gpa:#x} pages {pages} flags {measured} sha384 {hash}");
        self.note(&line, answer)
    }

    fn finalize_vm(&mut self) -> Result<(), Refusal> {
        let answer = self.model.finalize_vm();
        self.note("FINALIZE_VM", answer)
    }
}

/// What the host offers; the module decides most of it.
fn offered(cpus: u32) -> CpuidTable {
    let mut table = CpuidTable(vec![
        CpuidEntry::new(1, None, [0x000c_06f2, cpus << 16, 0x8120_2000, 0x1f8b_fbff]),
        CpuidEntry::new(7, Some(0), [2, 0x0184_2852, 0x1a01_0124, 0x2001_0010]),
        CpuidEntry::new(0xb, Some(0), [0, 1, 0x100, 0]),
        CpuidEntry::new(0xb, Some(1), [2, cpus, 0x201, 0]),
        CpuidEntry::new(0xd, Some(0), [7, 0x340, 0x340, 0]),
        CpuidEntry::new(0x4000_0000, None, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        CpuidEntry::new(0x4000_0001, None, [0x0100_7efb, 0, 0, 0]),
        CpuidEntry::new(0x8000_0008, None, [0x0030_3930, 0x200, 0, 0]),
    ]);
    cpuid::adapt(&mut table);
    table
}

fn page(name: &'static str, kind: PageKind, at: u64, fills: &[u8]) -> LaunchPage {
    LaunchPage {
        name,
        range: PageRange::new(Gpa(at), 4096 * fills.len() as u64).unwrap(),
        kind,
        bytes: match kind {
            PageKind::Zero => Vec::new(),
            _ => fills.iter().flat_map(|fill| [*fill; 4096]).collect(),
        },
    }
}

fn pages() -> [LaunchPage; 4] {
    [
        page("shim", PageKind::Measured, 0x10_0000, &[1, 2, 3]),
        page("filled by the host", PageKind::Unmeasured, 0x10_4000, &[4]),
        page("stack", PageKind::Zero, 0x11_2000, &[0, 0]),
        page("reset page", PageKind::Measured, 0xffff_f000, &[5]),
    ]
}

fn vm(cpus: u32, faults: impl FnOnce(&mut Model)) -> Recorder {
    let mut model = Model::create(Kernel::default(), 5).unwrap();
    model.split_irqchip(0).unwrap();
    model.exit_hypercall(1 << 12).unwrap();
    model.bus_cycles(40).unwrap();
    faults(&mut model);
    Recorder {
        model,
        cpus,
        trace: String::new(),
    }
}

/// What the platform does.
fn launch(recorder: &mut Recorder) -> Result<Measurement, TdxError> {
    let cpus = recorder.cpus;
    let config = LaunchConfig {
        mrconfigid: [0xc1; 48],
        mrowner: [0x0e; 48],
        mrownerconfig: [0xec; 48],
        ..LaunchConfig::default()
    };
    let mut launching = Launching::begin(&mut *recorder, &config, offered(cpus))?;
    for page in &pages() {
        launching.add(page)?;
    }
    for index in 0..cpus {
        launching.add_vcpu(&mut (index as usize), index)?;
    }
    launching.finish().map(|(_, mrtd)| mrtd)
}

fn compare(name: &str, trace: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, trace).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    for (number, (found, wanted)) in trace.lines().zip(golden.lines()).enumerate() {
        assert_eq!(found, wanted, "{name}, line {}", number + 1);
    }
    assert_eq!(trace, golden, "{name}");
}

#[test]
fn the_sequence_is_as_recorded_and_ends_in_the_mrtd_that_was_predicted() {
    for cpus in [1, 4] {
        let mut recorder = vm(cpus, |_| {});
        let mrtd = launch(&mut recorder).unwrap();
        assert_eq!(
            recorder.model.module.mrtd(),
            Some(mrtd.0),
            "MRTD by two implementations"
        );
        for index in 0..cpus as usize {
            assert_eq!(recorder.model.run(index), Entry::Runs, "vCPU {index} of {cpus}");
        }
        writeln!(recorder.trace, "MRTD {}", hex(&mrtd.0)).unwrap();
        compare(&format!("launch-{cpus}.txt"), &recorder.trace);
    }
}

#[test]
fn interruptions_leave_their_trace_and_the_same_mrtd() {
    let mut calm = vm(1, |_| {});
    let expected = launch(&mut calm).unwrap();
    let mut recorder = vm(1, |model| {
        model.module.without_entropy = 2;
        model.module.busy = 2;
        let interruptions = [
            (0, libc::EINTR),
            (2, libc::EINTR),
            (1, libc::EAGAIN),
            (0, libc::EINTR),
        ];
        model.interruptions.extend(interruptions);
    });
    let mrtd = launch(&mut recorder).unwrap();
    assert_eq!((mrtd, recorder.model.module.mrtd()), (expected, Some(expected.0)));
    writeln!(recorder.trace, "MRTD {}", hex(&mrtd.0)).unwrap();
    compare("launch-interrupted.txt", &recorder.trace);
}

#[test]
fn a_wrong_order_is_refused_by_the_kernel_and_named() {
    let mut late = vm(1, |_| {});
    launch(&mut late).unwrap();
    let init = InitVm {
        attributes: 1 << 28,
        xfam: 3,
        mrconfigid: [0; 48],
        mrowner: [0; 48],
        mrownerconfig: [0; 48],
        cpuid: CpuidTable::default(),
    };
    let mut early = vm(1, |_| {});
    type Wrong = fn(&mut Recorder, &InitVm) -> Result<(), Refusal>;
    let cases: [(&str, bool, Wrong); 6] = [
        ("FINALIZE before INIT_VM", false, |r, _| r.finalize_vm()),
        ("INIT_VM after FINALIZE", true, |r, init| r.init_vm(init)),
        ("INIT_VCPU after FINALIZE", true, |r, _| r.init_vcpu(&mut 0, 0)),
        ("GET_CPUID after FINALIZE", true, |r, _| {
            r.get_cpuid(&mut 0, 99).map(|_| ())
        }),
        ("a page after FINALIZE", true, |r, _| {
            let source = [Page([0; 4096])];
            let mut region = MemRegion {
                gpa: 0x20_0000,
                source: &source,
                measured: true,
            };
            r.init_mem_region(&mut 0, &mut region)
        }),
        ("FINALIZE twice", true, |r, _| r.finalize_vm()),
    ];
    for (name, finalised, wrong) in cases {
        let on = if finalised { &mut late } else { &mut early };
        let refusal = wrong(on, &init).unwrap_err();
        assert_eq!(refusal.errno(), libc::EINVAL, "{name}");
        let words = refusal.to_string();
        assert!(
            words.contains("KVM_TDX_") && words.contains("refused"),
            "{name}: {words}"
        );
    }
}
