//! The launch plan of a machine: the measured shim, its tables and parameters, and the vCPUs' first state.
//!
//! Built from the same arguments by `cvmm run`, which applies it, and by `cvmm measure`, which folds it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::thread;

use arch::addr::{BadRange, Gpa, PageRange};
use arch::platform::{LaunchPage, LaunchPlan, PageKind};
use arch::x86::regs::{BootState, General, Segment};
use sha2::{Digest, Sha256};
pub use shim::boot::Mode;
use shim::config::{Blob, Config, ConfigError};
use shim::layout;

use crate::config::MachineVersion;
use crate::spec::file::InputFile;
use crate::spec::payload;

/// The shim of each machine, all that differs between them; its bytes are the measurement and frozen.
/// `scripts/shim --check` rebuilds and compares the newest one.
fn shim_image(machine: MachineVersion) -> &'static [u8] {
    match machine {
        MachineVersion::V1 => include_bytes!("../../shim/v1.bin"),
        MachineVersion::V2 => include_bytes!("../../shim/v2.bin"),
    }
}

/// The page of the reset vector, which every TD is launched with at [`layout::RESET_PAGE`]; checked with the shim.
const RESET: &[u8] = include_bytes!("../../shim/v1-reset.bin");

/// [`layout::PAGE`] as a length in memory.
const PAGE_LEN: usize = 4096;

/// Where 2 MiB page tables go on hosts that offer no 1 GiB pages: RAM that the shim does not use.
const SMALL_TABLES: u64 = layout::LOW_END;
/// GiBs that get such a table: all low RAM and the first of the staging area.
const SMALL_TABLE_GIBS: [u64; 8] = [0, 1, 2, 3, 448, 449, 450, 451];

/// What the owner fixes.
#[derive(Clone, Debug)]
pub struct Payload {
    /// Version of the machine that boots it.
    pub machine: MachineVersion,
    /// The kernel file.
    pub kernel: Blob,
    /// The initrd; length 0 if there is none.
    pub initrd: Blob,
    /// Kernel command line.
    pub cmdline: String,
}

/// The plan cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The owner's parameters do not fit the page.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A constant of the layout is wrong.
    #[error(transparent)]
    Layout(#[from] BadRange),
}

/// Length and SHA-256 of `file`, from its beginning.
///
/// # Errors
/// Reading fails.
pub fn blob(mut file: &File) -> io::Result<Blob> {
    file.rewind()?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut len = 0_u64;
    loop {
        let count = file.read(&mut buffer)?;
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else {
            break;
        };
        hash.update(part);
        len = len.saturating_add(count as u64);
    }
    Ok(Blob {
        len,
        sha256: hash.finalize().into(),
    })
}

/// An input file that broke off while it was read.
#[derive(Debug, thiserror::Error)]
#[error("reading {}", path.display())]
pub struct ReadError {
    /// The file.
    pub path: PathBuf,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// Kernel and initrd by length and hash; on two threads, because that is most of the work of a launch.
///
/// # Errors
/// Reading fails.
pub fn blobs(kernel: &InputFile, initrd: Option<&InputFile>) -> Result<(Blob, Option<Blob>), ReadError> {
    let hash = |input: &InputFile| {
        blob(&input.file).map_err(|source| ReadError {
            path: input.path.clone(),
            source,
        })
    };
    let Some(initrd) = initrd else {
        return Ok((hash(kernel)?, None));
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| hash(initrd));
        let kernel = hash(kernel)?;
        // A thread that hashes cannot panic; should it ever, hashing again here is right as well.
        let initrd = other.join().unwrap_or_else(|_| hash(initrd))?;
        Ok((kernel, Some(initrd)))
    })
}

impl Payload {
    /// Reads the files, each once.
    ///
    /// # Errors
    /// Reading fails.
    pub fn of(machine: MachineVersion, files: &payload::Payload) -> Result<Self, ReadError> {
        const NO_FILE: Blob = Blob {
            len: 0,
            sha256: [0; 32],
        };
        let (kernel, initrd) = blobs(&files.kernel, files.initrd.as_ref())?;
        Ok(Self {
            machine,
            kernel,
            initrd: initrd.unwrap_or(NO_FILE),
            cmdline: files.cmdline.clone(),
        })
    }
}

/// The launch plan for `cpus` vCPUs. Page order is measurement order and frozen, as all of it is.
///
/// # Errors
/// See [`PlanError`].
pub fn launch_plan(mode: Mode, payload: &Payload, cpus: u32) -> Result<LaunchPlan, PlanError> {
    let config = Config {
        flags: match mode {
            Mode::Soft => 0,
            Mode::Snp | Mode::Tdx => shim::config::FLAG_LAZY_ACCEPT,
        },
        kernel: payload.kernel,
        initrd: payload.initrd,
        ram: (0, u64::MAX),
        max_vcpus: layout::VCPUS_MAX,
        cmdline: payload.cmdline.as_bytes(),
    };
    let mut text = shim_image(payload.machine).to_vec();
    text.resize(text.len().next_multiple_of(PAGE_LEN), 0);
    let mut pages = vec![
        page("shim", layout::TEXT, PageKind::Measured, text)?,
        page(
            "boot page tables",
            layout::TABLES,
            PageKind::Measured,
            shim::tables::encode(mode).to_vec(),
        )?,
        page(
            "CONFIG",
            layout::CONFIG,
            PageKind::Measured,
            config.encode()?.to_vec(),
        )?,
    ];
    let one = |name, at, kind| empty(name, at, layout::PAGE, kind);
    match mode {
        Mode::Soft => {}
        Mode::Snp => {
            pages.push(one("SECRETS", layout::SECRETS, PageKind::Secrets)?);
            pages.push(one("CPUID", layout::CPUID, PageKind::Cpuid)?);
        }
        Mode::Tdx => pages.push(one("mailbox", layout::MAILBOX, PageKind::Zero)?),
    }
    pages.push(empty("stack", layout::STACK, layout::STACK_LEN, PageKind::Zero)?);
    if mode == Mode::Tdx {
        pages.push(page(
            "reset vector",
            layout::RESET_PAGE,
            PageKind::Measured,
            RESET.to_vec(),
        )?);
    }
    let vcpus = (0..cpus).map(|index| boot_state(mode, index)).collect();
    Ok(LaunchPlan { pages, vcpus })
}

fn page(name: &'static str, at: u64, kind: PageKind, bytes: Vec<u8>) -> Result<LaunchPage, BadRange> {
    let range = PageRange::new(Gpa(at), bytes.len() as u64)?;
    Ok(LaunchPage {
        name,
        range,
        kind,
        bytes,
    })
}

fn empty(name: &'static str, at: u64, len: u64, kind: PageKind) -> Result<LaunchPage, BadRange> {
    Ok(LaunchPage {
        name,
        range: PageRange::new(Gpa(at), len)?,
        kind,
        bytes: vec![],
    })
}

/// Makes `plan`, which nothing measures, work on a KVM without 1 GiB pages.
pub fn without_gib_pages(plan: &mut LaunchPlan) -> Result<(), BadRange> {
    const PDPT: usize = 0x1000;
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1110_0011;
    let mut tables = Vec::new();
    let mut boot = plan
        .pages
        .iter_mut()
        .find(|page| page.range.start().0 == layout::TABLES);
    for (at, gib) in (SMALL_TABLES..).step_by(4096).zip(SMALL_TABLE_GIBS) {
        let entry = usize::try_from(gib.saturating_mul(8))
            .unwrap_or(usize::MAX)
            .saturating_add(PDPT);
        let slot = boot
            .as_mut()
            .and_then(|page| page.bytes.get_mut(entry..)?.first_chunk_mut::<8>());
        if let Some(slot) = slot {
            *slot = (at | TABLE).to_le_bytes();
        }
        for index in 0..512_u64 {
            tables.extend((gib << 30 | index << 21 | LARGE_PAGE).to_le_bytes());
        }
    }
    plan.pages.push(page(
        "2 MiB page tables",
        SMALL_TABLES,
        PageKind::Unmeasured,
        tables,
    )?);
    Ok(())
}

/// A TD has no say in its registers: the TDX module starts every vCPU at the reset vector, and measures none. What
/// this returns there has the length of the list as its only use.
fn boot_state(mode: Mode, index: u32) -> BootState {
    let (word, c_bit) = match mode {
        Mode::Soft => (layout::MODE_SOFT, 0),
        Mode::Snp => (layout::MODE_SNP, layout::C_BIT),
        Mode::Tdx => (layout::MODE_TDX, 0),
    };
    let general = if index == 0 {
        General {
            rip: layout::ENTRY_RIP,
            rsp: layout::ENTRY_RSP,
            rdi: word,
            ..Default::default()
        }
    } else {
        General {
            rip: layout::AP_PARK_RIP,
            ..Default::default()
        }
    };
    let mut state = BootState::long_mode(general, layout::ENTRY_CR3 | c_bit);
    state.control.cr0 = layout::ENTRY_CR0;
    state.control.cr4 = layout::ENTRY_CR4;
    state.control.efer = layout::ENTRY_EFER;
    state.segments.cs.selector = layout::ENTRY_CS;
    let data = Segment {
        selector: layout::ENTRY_DS,
        ..state.segments.ds
    };
    state.segments.ds = data;
    state.segments.es = data;
    state.segments.ss = data;
    state.segments.fs = Segment { selector: 0, ..data };
    state.segments.gs = Segment { selector: 0, ..data };
    state
}
