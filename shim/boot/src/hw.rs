//! The instructions of the shim: memory by address, PVALIDATE, the GHCB, exceptions, the jump.
// UNSAFETY: raw memory at the fixed addresses of the machine and privileged instructions.
#![expect(unsafe_code, reason = "raw memory and privileged instructions")]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::ops::Range;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU8, Ordering};
use shim::boot::{Entry, Machine, Mode};
use shim::config::CONFIG_LEN;
use shim::layout::{
    CONFIG, CPUID, ENTRY_CS, FREE, HIGH_RAM, HIGH_RAM_MAX, LOW_RAM_MAX, PAGE, PORT_SHIM,
    SHIM_RELEASE_STAGING, SHIM_TERMINATE, STAGING, STAGING_END, STAGING_GHCB, UNIT,
};
use shim::reason::Reason;
use shim::sha256::{Compress, Plain, compress_by_instructions};
use shim::sha384::Digest;
use shim::snp;
use shim::tdx::{self, Accepted};

use crate::td;

const MSR_GHCB: u32 = 0xc001_0130;
const MSR_SEV_STATUS: u32 = 0xc001_0131;

/// The machine under the shim; there is one, so what it lends out is lent once.
pub(crate) struct Platform {
    mode: Mode,
    /// Whether the processor has SHA instructions.
    sha: bool,
}

impl Platform {
    /// The machine that the shim was entered on.
    pub(crate) fn new(mode: Mode) -> Result<Self, Reason> {
        let sha = match mode {
            Mode::Snp => Platform::snp()?,
            Mode::Soft | Mode::Tdx => {
                if mode == Mode::Tdx {
                    let (width, attributes) = td::info();
                    tdx::check_info(width, attributes)?;
                }
                // Neither traps here, nor is it the host's invention.
                snp::has_sha(__cpuid(1).ecx, __cpuid_count(7, 0).ebx)
            }
        };
        Ok(Platform { mode, sha })
    }

    /// An SNP guest: checks processor, CPUID page and hypervisor, and registers the GHCB; whether the processor has
    /// SHA instructions.
    fn snp() -> Result<bool, Reason> {
        snp::check_sev_status(rdmsr(MSR_SEV_STATUS))?;
        // SAFETY: the launch placed the page, nobody writes it while the shim runs.
        let sha = snp::check_cpuid(unsafe { page(CPUID) })?;
        snp::check_sev_info(call_by_msr(snp::MSR_SEV_INFO))?;
        snp::check_features(call_by_msr(snp::MSR_FEATURES))?;
        snp::check_register(STAGING_GHCB, call_by_msr(snp::msr_register(STAGING_GHCB)))?;
        Ok(sha)
    }

    /// Makes the 4 KiB or (`large`) 2 MiB page at `gpa` usable; false when it consists of smaller ones.
    fn validate_page(&self, gpa: u64, large: bool) -> Result<bool, Reason> {
        match self.mode {
            Mode::Soft => Ok(true),
            Mode::Snp => pvalidate_page(gpa, large),
            Mode::Tdx => match tdx::accept(|| td::accept_page(gpa, large))? {
                Accepted::Done => Ok(true),
                Accepted::Smaller => Ok(false),
            },
        }
    }
}

impl Machine for Platform {
    fn validate(&mut self, range: &Range<u64>) -> Result<(), Reason> {
        let mut at = range.start;
        while self.mode != Mode::Soft && at < range.end {
            let left = range.end.wrapping_sub(at);
            let whole = at.is_multiple_of(UNIT) && left >= UNIT;
            let step = if whole && self.validate_page(at, true)? {
                UNIT
            } else if self.validate_page(at, false)? {
                PAGE
            } else {
                return Err(Reason::Accept);
            };
            at = at.wrapping_add(step);
        }
        Ok(())
    }

    fn memory(&mut self, gpa: u64, len: u64) -> Result<&mut [u8], Reason> {
        let (start, len) = private(gpa, len)?;
        // SAFETY: `private` admits only RAM outside the image, its tables, parameters and stack; the result
        // borrows the one Platform, so no other reference to it lives. The library validates before use.
        Ok(unsafe { core::slice::from_raw_parts_mut(start, len) })
    }

    fn fetch(&mut self, staged: u64, to: u64, len: u64) -> Result<(), Reason> {
        let (start, count) = private(to, len)?;
        let end = staged.checked_add(len).ok_or(Reason::Bug)?;
        if staged < STAGING || end > STAGING_END {
            return Err(Reason::Bug);
        }
        // SAFETY: the target is private RAM as above. The source is memory that the host may change at any
        // time: it is read by one string instruction, each byte once, and never by reference.
        unsafe {
            asm!("rep movsb", inout("rdi") start => _, inout("rsi") pointer(staged) => _,
                inout("rcx") count => _, options(nostack, preserves_flags));
        }
        Ok(())
    }

    fn wipe(&mut self, range: &Range<u64>) {
        let len = range.end.saturating_sub(range.start);
        // SAFETY: the library wipes areas that it validated and that hold neither the image nor the stack.
        // No reference: the range may start at address 0.
        unsafe {
            asm!("rep stosb", inout("rdi") range.start => _, inout("rcx") len => _, in("al") 0u8,
                options(nostack, preserves_flags));
        }
    }

    fn compress(&self) -> impl Compress + use<> {
        Hash { sha: self.sha }
    }

    fn extend(&mut self, register: u8, digest: &Digest) -> Result<(), Reason> {
        match self.mode {
            Mode::Soft | Mode::Snp => Err(Reason::Bug),
            Mode::Tdx => tdx::extend(|| td::extend(register, digest)),
        }
    }

    fn release_staging(&mut self) -> Result<(), Reason> {
        match self.mode {
            Mode::Soft => {
                out(PORT_SHIM, SHIM_RELEASE_STAGING);
                Ok(())
            }
            Mode::Snp => self.release_by_ghcb(),
            Mode::Tdx => td::out(PORT_SHIM, SHIM_RELEASE_STAGING),
        }
    }
}

impl Platform {
    fn release_by_ghcb(&mut self) -> Result<(), Reason> {
        let request = self.memory(FREE, PAGE)?;
        request.fill(0);
        snp::ghcb_out(request, PORT_SHIM, SHIM_RELEASE_STAGING)?;
        // SAFETY: the target is the GHCB page, shared with the host, which nothing here holds a reference to.
        unsafe {
            asm!("rep movsb", inout("rdi") pointer(STAGING_GHCB) => _, inout("rsi") pointer(FREE) => _,
                inout("rcx") PAGE => _, options(nostack, preserves_flags));
        }
        // The answer is not read: the page may be gone.
        wrmsr(MSR_GHCB, STAGING_GHCB);
        vmgexit();
        Ok(())
    }
}

/// SHA-256 by instructions where the processor has them.
struct Hash {
    sha: bool,
}

impl Compress for Hash {
    fn compress(&self, state: &mut [u32; 8], blocks: &[[u8; 64]]) {
        if self.sha {
            // SAFETY: the processor has every instruction set that the function is compiled for.
            unsafe { compress_by_instructions(state, blocks) }
        } else {
            Plain.compress(state, blocks);
        }
    }
}

/// The CONFIG page.
pub(crate) fn config() -> &'static [u8; CONFIG_LEN] {
    // SAFETY: the launch placed the page, nobody writes it while the shim runs.
    unsafe { page(CONFIG) }
}

/// A launched page.
///
/// # Safety
/// The page at `gpa` holds data that nobody writes, ever.
unsafe fn page(gpa: u64) -> &'static [u8; CONFIG_LEN] {
    // SAFETY: identity-mapped, not null, aligned; the caller promises the rest.
    unsafe { &*pointer(gpa).cast_const().cast() }
}

/// Identity-mapped address.
fn pointer(gpa: u64) -> *mut u8 {
    with_exposed_provenance_mut(usize::from_ne_bytes(gpa.to_ne_bytes()))
}

/// Start and length of RAM that the library may use: above the shim's own pages, below the staging area.
fn private(gpa: u64, len: u64) -> Result<(*mut u8, usize), Reason> {
    let end = gpa.checked_add(len).ok_or(Reason::Bug)?;
    let low = gpa >= FREE && end <= LOW_RAM_MAX;
    let high = gpa >= HIGH_RAM && end <= HIGH_RAM_MAX;
    if low || high {
        Ok((pointer(gpa), usize::from_ne_bytes(len.to_ne_bytes())))
    } else {
        Err(Reason::Bug)
    }
}

/// Enters the kernel as its 64-bit boot protocol says.
pub(crate) fn jump(entry: Entry) -> ! {
    // SAFETY: the library verified the kernel at this address; nothing of the shim runs afterwards.
    unsafe {
        asm!("xor ebx, ebx", "xor ebp, ebp", "xor edi, edi", "jmp {rip}",
            rip = in(reg) entry.rip, in("rsi") entry.zero_page, options(noreturn));
    }
}

/// Stops the machine and tells the host why.
pub(crate) fn terminate(mode: Mode, reason: Reason) -> ! {
    loop {
        match mode {
            Mode::Soft => out(PORT_SHIM, SHIM_TERMINATE | u32::from(reason.code())),
            Mode::Snp => {
                wrmsr(MSR_GHCB, snp::msr_terminate(reason));
                vmgexit();
            }
            Mode::Tdx => td::fatal(reason),
        }
    }
}

/// The mode in which exceptions and panics are reported, as a number; 0 is [`Mode::Soft`].
static MODE: AtomicU8 = AtomicU8::new(0);
/// Interrupt descriptors, filled once.
static mut IDT: [[u32; 4]; 32] = [[0; 4]; 32];
/// Type and attributes of an interrupt gate: present, privilege 0.
const GATE: u32 = 0x8e00;

/// Makes every exception stop the machine with its vector as reason.
pub(crate) fn catch_exceptions(mode: Mode) {
    unsafe extern "C" {
        static exception_stubs: [[u8; 8]; 32];
    }
    MODE.store(mode as u8, Ordering::Relaxed);
    let mut stub = low((&raw const exception_stubs).addr() as u64);
    let table = &raw mut IDT;
    // SAFETY: one processor runs the shim, once, and exceptions only read the table.
    let table = unsafe { &mut *table };
    for gate in table.iter_mut() {
        *gate = [
            (u32::from(ENTRY_CS) << 16) | (stub & 0xffff),
            (stub & 0xffff_0000) | GATE,
            0,
            0,
        ];
        stub = stub.wrapping_add(8);
    }
    let pointer = IdtPointer {
        limit: 32 * 16 - 1,
        base: table.as_ptr().addr() as u64,
    };
    // SAFETY: the table is static and filled; its handlers never return.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack, preserves_flags)) };
}

#[repr(C, packed)]
struct IdtPointer {
    limit: u16,
    base: u64,
}

/// The mode of [`catch_exceptions`].
fn mode() -> Mode {
    let number = MODE.load(Ordering::Relaxed);
    let modes = [Mode::Snp, Mode::Tdx];
    modes
        .into_iter()
        .find(|mode| *mode as u8 == number)
        .unwrap_or(Mode::Soft)
}

/// Called by the exception stubs on an empty stack.
pub(crate) extern "C" fn exception(vector: u8) -> ! {
    terminate(mode(), Reason::Exception(vector))
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    terminate(mode(), Reason::Bug)
}

/// One request and its answer by the GHCB MSR protocol.
fn call_by_msr(request: u64) -> u64 {
    wrmsr(MSR_GHCB, request);
    vmgexit();
    rdmsr(MSR_GHCB)
}

fn vmgexit() {
    // SAFETY: the host answers in the MSR or the GHCB, which are read as hostile data; it cannot write
    // private memory.
    unsafe { asm!("rep vmmcall") };
}

/// PVALIDATE of one 4 KiB or (`large`) 2 MiB page: the return code, and whether the page's state changed.
fn pvalidate(gpa: u64, large: bool) -> (u32, bool) {
    let (code, unchanged): (u64, u8);
    // SAFETY: changes whether an identity-mapped page is usable; the library validates only RAM that it does
    // not use yet.
    unsafe {
        asm!(".byte 0xf2, 0x0f, 0x01, 0xff", "setc {unchanged}",
            unchanged = out(reg_byte) unchanged, inout("rax") gpa => code,
            in("ecx") u32::from(large), in("edx") 1, options(nostack));
    }
    (low(code), unchanged == 0)
}

/// [`pvalidate`] of a page that must not be valid yet, and [`touch`]; false when a large one consists of smaller ones.
fn pvalidate_page(gpa: u64, large: bool) -> Result<bool, Reason> {
    match pvalidate(gpa, large) {
        (0, true) => touch(gpa, if large { UNIT } else { PAGE }),
        (0, false) => return Err(Reason::DoubleValidation),
        (snp::PVALIDATE_SIZE_MISMATCH, _) if large => return Ok(false),
        _ => return Err(Reason::Pvalidate),
    }
    Ok(true)
}

/// Reads the first and the last byte of each of the 4 KiB pages at `gpa`, `len` bytes, which were validated just now. The
/// host may have left cache lines of them, to be written over what the guest puts there; a page's lines are gone once
/// both its ends were read by the guest's key (CVE-2025-38560; Linux, `asm/sev.h`, `sev_evict_cache`). Linux asks
/// CPUID leaf 0x8000001f, EBX bit 31, whether the processor needs this; here it is done always, because the answer is
/// in a page that the host composes.
fn touch(gpa: u64, len: u64) {
    let mut at = gpa;
    let end = gpa.wrapping_add(len);
    while at < end {
        for byte in [at, at.wrapping_add(PAGE - 1)] {
            // SAFETY: the page is validated and identity-mapped, and nobody writes it yet; the value is not used.
            unsafe { pointer(byte).read_volatile() };
        }
        at = at.wrapping_add(PAGE);
    }
}

/// The lower half of a register.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads an MSR that exists on SNP guests.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack)) };
    (u64::from(high) << 32) | u64::from(low)
}

fn wrmsr(msr: u32, value: u64) {
    let (low, high) = (low(value), low(value >> 32));
    // SAFETY: writes the GHCB MSR, which has no effect before VMGEXIT.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack)) };
}

fn out(port: u16, value: u32) {
    // SAFETY: the shim's own port, which only the VMM watches.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}
