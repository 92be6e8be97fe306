//! The order of work of the boot processor, over a machine that the binary or a test supplies.
//!
//! Host data is copied into validated private memory first, checked there, and only then parsed.

use crate::bytes::get;
use crate::bzimage::{ENTRY_OFFSET, HEADER_END, Kernel};
use crate::config::{CMDLINE_MAX, CONFIG_LEN, Config, FLAG_LAZY_ACCEPT};
use crate::descriptor::{DESCRIPTOR_LEN, Descriptor, Staged};
use crate::layout::{FREE, HANDOVER, KERNEL, LOW_END, LOW_HOLE, PAGE, SECRETS, STACK, STAGING, TEXT, UNIT};
use crate::plan::Plan;
use crate::reason::Reason;
use crate::sha256::{Compress, Sha256};
use crate::sha384::Digest;
use crate::zero_page::Links;
use crate::{acpi, efi, events, snp, unaccepted, zero_page};
use core::ops::Range;

/// The zero page.
const ZERO_PAGE: u64 = HANDOVER;
/// The command line, one page.
const CMDLINE: u64 = HANDOVER + PAGE;
/// Confidential-computing blob and its setup data, one page.
const CC_BLOB: u64 = HANDOVER + 2 * PAGE;
/// EFI system table and memory map, one page.
const EFI: u64 = HANDOVER + 3 * PAGE;
/// Log of measurements, one page.
const LOG: u64 = HANDOVER + 4 * PAGE;
/// ACPI tables.
const ACPI: u64 = HANDOVER + 0x1_0000;
const ACPI_LEN: u64 = 0x1_0000;
/// Unaccepted-memory table.
const UNACCEPTED: u64 = HANDOVER + 0x2_0000;
const UNACCEPTED_LEN: u64 = 0x1_0000;
/// How much is copied and then hashed while it is in the cache.
const BLOCK: u64 = 0x1_0000;

/// Put before the owner's command line where it fits: this machine has EFI tables at most, never EFI services. A
/// stock kernel that is not told restarts by EFI, because hardware-reduced ACPI makes it prefer that (Linux,
/// arch/x86/kernel/reboot.c), and hangs; and it warns of the missing services. Behind it the words could be init's,
/// which come after `--`, or part of a quotation that does not end.
const NO_RUNTIME: &[u8] = b"efi=noruntime ";

/// What the shim runs on.
pub trait Machine {
    /// Makes the whole pages of `range` private and usable; their content is undefined.
    ///
    /// # Errors
    /// What the platform found; the caller must stop the machine.
    fn validate(&mut self, range: &Range<u64>) -> Result<(), Reason>;

    /// Fills validated memory below [`LOW_END`] with zeros.
    fn wipe(&mut self, range: &Range<u64>);

    /// Private memory that was validated before and that nobody else uses.
    ///
    /// # Errors
    /// [`Reason::Bug`] when the range is the shim's own or no RAM.
    fn memory(&mut self, gpa: u64, len: u64) -> Result<&mut [u8], Reason>;

    /// Copies `len` bytes from the staging area to private memory, reading each byte once.
    ///
    /// # Errors
    /// [`Reason::Bug`] when a range is not what it should be.
    fn fetch(&mut self, staged: u64, to: u64, len: u64) -> Result<(), Reason>;

    /// How to hash on this processor.
    fn compress(&self) -> impl Compress + use<Self>;

    /// Extends the run-time measurement register `register` with `digest`; on TDX alone.
    ///
    /// # Errors
    /// [`Reason::RtmrExtend`], or [`Reason::Bug`] where there are no such registers.
    fn extend(&mut self, register: u8, digest: &Digest) -> Result<(), Reason>;

    /// Tells the host that the staging area is no longer needed; nothing may touch it afterwards.
    ///
    /// # Errors
    /// [`Reason::Bug`] when the request cannot be made, [`Reason::TdVmcall`] when a TD's is refused.
    fn release_staging(&mut self) -> Result<(), Reason>;
}

/// Protection of the machine that the shim was entered on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// None.
    Soft,
    /// SEV-SNP.
    Snp,
    /// TDX.
    Tdx,
}

/// Where to go: the kernel's 64-bit entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first instruction.
    pub rip: u64,
    /// Address of the zero page, for RSI.
    pub zero_page: u64,
}

/// Checks, copies and prepares everything, up to the jump.
///
/// # Errors
/// The [`Reason`] for which the machine must be stopped.
pub fn prepare<M: Machine>(machine: &mut M, mode: Mode, page: &[u8; CONFIG_LEN]) -> Result<Entry, Reason> {
    let config = Config::decode(page).map_err(|_| Reason::BadConfig)?;
    for range in fixed(mode) {
        machine.validate(&range)?;
        machine.wipe(&range);
    }
    let plan = Plan::new(&config, &fetch_descriptor(machine)?)?;
    unaccepted::create(machine.memory(UNACCEPTED, UNACCEPTED_LEN)?, &plan.ram)?;
    let mut header = [0; HEADER_END];
    let kernel = load_kernel(machine, &plan, &config, &mut header)?;
    load_initrd(machine, &plan, &config)?;
    if mode == Mode::Soft || config.flags & FLAG_LAZY_ACCEPT == 0 {
        accept_rest(machine)?;
    }
    if mode == Mode::Tdx {
        measure(machine, page)?;
    }
    write_tables(machine, mode, &plan)?;
    write_cmdline(machine, &config, kernel.cmdline_max)?;
    let links = Links {
        rsdp: ACPI,
        cmdline: CMDLINE,
        setup_data: write_links(machine, mode, &plan)?,
    };
    let page = machine.memory(ZERO_PAGE, PAGE)?;
    zero_page::write(page, mode, &plan, &kernel, &header, &links)?;
    machine.release_staging()?;
    Ok(Entry {
        rip: KERNEL.wrapping_add(ENTRY_OFFSET),
        zero_page: ZERO_PAGE,
    })
}

/// What is validated for the shim itself and its hand-over: all below [`LOW_END`] that the launch did not place,
/// and that somebody reads. A kernel looks for old tables in all of the first MiB, on SNP excepted.
fn fixed(mode: Mode) -> [Range<u64>; 3] {
    match mode {
        Mode::Soft | Mode::Snp => [0..LOW_HOLE, LOW_HOLE..LOW_HOLE, FREE..LOW_END],
        Mode::Tdx => [0..TEXT, SECRETS..STACK, FREE..LOW_END],
    }
}

/// The descriptor, copied once and then parsed; its place is wiped.
fn fetch_descriptor<M: Machine>(machine: &mut M) -> Result<Descriptor, Reason> {
    let len = DESCRIPTOR_LEN as u64;
    machine.fetch(STAGING, ZERO_PAGE, len)?;
    let copy = machine.memory(ZERO_PAGE, len)?;
    let descriptor = get(copy, 0).and_then(|copy| Descriptor::decode(&copy));
    copy.fill(0);
    descriptor.ok_or(Reason::BadDescriptor)
}

/// Validates `range` and records it, so that it can never be validated again.
fn accept<M: Machine>(machine: &mut M, range: &Range<u64>) -> Result<(), Reason> {
    unaccepted::take(machine.memory(UNACCEPTED, UNACCEPTED_LEN)?, range)?;
    machine.validate(range)
}

/// Validates every unit of RAM that is not yet.
fn accept_rest<M: Machine>(machine: &mut M) -> Result<(), Reason> {
    let mut from = 0;
    while let Some(unit) = unaccepted::next(machine.memory(UNACCEPTED, UNACCEPTED_LEN)?, from) {
        let start = unit.saturating_mul(UNIT);
        accept(machine, &(start..start.saturating_add(UNIT)))?;
        from = unit;
    }
    Ok(())
}

/// Copies a staged file to `to` and gives the digest of the private copy.
fn copy_and_hash<M: Machine>(machine: &mut M, file: Staged, to: u64) -> Result<[u8; 32], Reason> {
    let mut hash = Sha256::new(machine.compress());
    let mut done = 0u64;
    loop {
        let len = file.len.saturating_sub(done).min(BLOCK);
        let place = to.saturating_add(done);
        machine.fetch(file.gpa.saturating_add(done), place, len)?;
        let copy = machine.memory(place, len)?;
        if len < BLOCK {
            return Ok(hash.finish(copy));
        }
        let rest = hash.update(copy);
        debug_assert!(rest.is_empty());
        done = done.saturating_add(len);
    }
}

/// Brings in the kernel and leaves its protected-mode part at [`KERNEL`], its header in `header`.
fn load_kernel<M: Machine>(
    machine: &mut M,
    plan: &Plan,
    config: &Config<'_>,
    header: &mut [u8; HEADER_END],
) -> Result<Kernel, Reason> {
    let file = plan.kernel_range(plan.kernel.len)?;
    accept(machine, &file)?;
    if copy_and_hash(machine, plan.kernel, KERNEL)? != config.kernel.sha256 {
        return Err(Reason::KernelMismatch);
    }
    let copy = machine.memory(KERNEL, plan.kernel.len)?;
    *header = get(copy, 0).ok_or(Reason::BadKernel)?;
    let kernel = Kernel::parse(header, plan.kernel.len, config.cmdline.len())?;
    let setup_len = usize::try_from(kernel.setup_len).map_err(|_| Reason::BadKernel)?;
    if setup_len > copy.len() {
        return Err(Reason::BadKernel);
    }
    copy.copy_within(setup_len.., 0);
    let all = plan.kernel_range(kernel.init_size)?;
    accept(machine, &(file.end..all.end.max(file.end)))?;
    Ok(kernel)
}

fn load_initrd<M: Machine>(machine: &mut M, plan: &Plan, config: &Config<'_>) -> Result<(), Reason> {
    if plan.initrd.len == 0 {
        return Ok(());
    }
    accept(machine, &plan.initrd_range())?;
    if copy_and_hash(machine, plan.initrd, plan.initrd_to)? != config.initrd.sha256 {
        return Err(Reason::InitrdMismatch);
    }
    Ok(())
}

/// Extends the run-time measurement registers by the events of CONFIG, and logs them.
fn measure<M: Machine>(machine: &mut M, page: &[u8; CONFIG_LEN]) -> Result<(), Reason> {
    let events = events::of(page).map_err(|_| Reason::BadConfig)?;
    for event in &events {
        machine.extend(event.register, &event.digest())?;
    }
    events::write_log(machine.memory(LOG, PAGE)?, &events)
}

fn write_tables<M: Machine>(machine: &mut M, mode: Mode, plan: &Plan) -> Result<(), Reason> {
    let log = (mode == Mode::Tdx).then_some(LOG..LOG.wrapping_add(PAGE));
    acpi::write(machine.memory(ACPI, ACPI_LEN)?, ACPI, plan.vcpus, log)
}

/// Of the owner's words none is lost, so the addition is left out where both together are longer than `max`.
fn write_cmdline<M: Machine>(machine: &mut M, config: &Config<'_>, max: usize) -> Result<(), Reason> {
    let all = config.cmdline.len().saturating_add(NO_RUNTIME.len());
    let more = if all <= max.min(CMDLINE_MAX) {
        NO_RUNTIME
    } else {
        &[]
    };
    let cmdline = machine.memory(CMDLINE, PAGE)?;
    for (to, from) in cmdline.iter_mut().zip(more.iter().chain(config.cmdline)) {
        *to = *from;
    }
    Ok(())
}

/// Under protection, EFI tables and their link in the zero page, on SNP with the blob; gives the head of the
/// setup data list.
fn write_links<M: Machine>(machine: &mut M, mode: Mode, plan: &Plan) -> Result<u64, Reason> {
    let cc = match mode {
        Mode::Soft => return Ok(0),
        Mode::Snp => Some(snp::write_cc_blob(machine.memory(CC_BLOB, PAGE)?, CC_BLOB)?),
        Mode::Tdx => None,
    };
    let targets = efi::Targets {
        rsdp: ACPI,
        unaccepted: UNACCEPTED,
        cc_blob: cc.map(|cc| cc.blob),
    };
    let map = zero_page::memory_map(mode, &plan.ram);
    let tables = efi::write(machine.memory(EFI, PAGE)?, EFI, &map, &targets)?;
    let page = machine.memory(ZERO_PAGE, PAGE)?;
    zero_page::link_efi(
        page,
        tables.system_table,
        tables.map,
        tables.map_len,
        efi::MEMORY_ENTRY_LEN,
    )?;
    Ok(cc.map_or(0, |cc| cc.setup_data))
}

#[cfg(test)]
#[path = "boot_tests.rs"]
mod tests;
