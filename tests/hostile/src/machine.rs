//! What the machine under the guest is, and every access to it: ports, device registers, memory that the host may
//! see, conversions. On SNP each of them goes through the GHCB (SEV-ES GHCB specification, revision 2.03).

use core::arch::asm;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU8, Ordering};

/// Kind of machine, as the command line says (`mode=`), which the guest's owner controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Another VMM: no conversions.
    Plain = 0,
    /// cvmm without protection: conversions by hypercall.
    Soft = 1,
    /// An SEV-SNP guest.
    Snp = 2,
}

static MODE: AtomicU8 = AtomicU8::new(0);

/// The machine's kind.
pub(crate) fn mode() -> Mode {
    match MODE.load(Ordering::Relaxed) {
        1 => Mode::Soft,
        2 => Mode::Snp,
        _ => Mode::Plain,
    }
}

/// Start of the memory that is shared with the host: rings, buffers and the GHCB.
pub(crate) const ARENA: u64 = 0x120_0000;
/// Its length.
pub(crate) const ARENA_LEN: u64 = 0x20_0000;
/// Memory that is private on SNP and for conversions elsewhere: 2 MiB.
pub(crate) const PRIVATE: u64 = 0x1c0_0000;
/// Offset of the view through which memory is seen as the host sees it.
const SHARED_VIEW: u64 = 1 << 39;
const C_BIT: u64 = 1 << 51;
const PAGE: u64 = 0x1000;
const GHCB: u64 = ARENA;

#[repr(C, align(4096))]
struct Tables([[u64; 512]; 11]);
static mut TABLES: Tables = Tables([[0; 512]; 11]);
static mut IDT: [[u32; 4]; 32] = [[0; 4]; 32];

/// Installs page tables with a private and a shared view, exception gates, and on SNP the shared arena.
pub(crate) fn start(mode: Mode) {
    MODE.store(mode as u8, Ordering::Relaxed);
    tables(if mode == Mode::Snp { C_BIT } else { 0 });
    gates();
    if mode == Mode::Snp {
        for page in (ARENA..ARENA + ARENA_LEN).step_by(4096) {
            to_shared(page);
        }
        assert_eq!(
            msr_call(GHCB | 0x12),
            GHCB | 0x13,
            "the host registers another GHCB"
        );
        wrmsr(MSR_GHCB, GHCB);
    }
}

fn tables(private: u64) {
    let tables = &raw mut TABLES;
    // SAFETY: one processor, once; the tables are in use only after CR3 is loaded below.
    let Tables(tables) = unsafe { &mut *tables };
    let at = |index: usize| tables.as_ptr().addr() as u64 + index as u64 * PAGE;
    let addresses: [u64; 11] = core::array::from_fn(at);
    // Table 0 is the root, 1 and 2 the private and shared views, 3..7 and 7..11 their four GiB of 2 MiB pages.
    tables[0][0] = addresses[1] | private | 3;
    tables[0][1] = addresses[2] | private | 3;
    for (view, bit) in [(0, private), (1, 0)] {
        for gib in 0..4 {
            let directory = 3 + view * 4 + gib;
            tables[1 + view][gib] = addresses[directory] | private | 3;
            for entry in 0..512 {
                tables[directory][entry] = (gib as u64) << 30 | (entry as u64) << 21 | bit | 0x83;
            }
        }
    }
    // SAFETY: the tables map this code, its stack and all memory it uses at the addresses they have now.
    unsafe { asm!("mov cr3, {}", in(reg) addresses[0] | private, options(nostack)) };
}

fn gates() {
    unsafe extern "C" {
        static exception_stubs: [[u8; 16]; 32];
    }
    let table = &raw mut IDT;
    // SAFETY: one processor, once; exceptions only read the table.
    let table = unsafe { &mut *table };
    let mut stub = (&raw const exception_stubs).addr() as u32;
    for gate in table.iter_mut() {
        *gate = [0x10 << 16 | stub & 0xffff, stub & 0xffff_0000 | 0x8e00, 0, 0];
        stub += 16;
    }
    let pointer = TablePointer {
        limit: 32 * 16 - 1,
        base: table.as_ptr().addr() as u64,
    };
    // SAFETY: limit and base of a static table whose handlers never return.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack)) };
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

fn pointer<T>(address: u64) -> *mut T {
    with_exposed_provenance_mut(address as usize)
}

/// An integer as registers and rings have it.
pub(crate) trait Word: Copy + Into<u64> {
    /// Its length in bytes.
    const LEN: u64 = size_of::<Self>() as u64;
    /// The low bytes of a value.
    fn cut(value: u64) -> Self;
}

macro_rules! words {
    ($($word:ty),*) => { $(impl Word for $word { fn cut(value: u64) -> Self { value as Self } })* };
}
words!(u8, u16, u32, u64);

/// Reads memory that the host sees.
pub(crate) fn load<T: Word>(gpa: u64) -> T {
    // SAFETY: the shared view maps all of the first 4 GiB; callers stay in the arena.
    unsafe { pointer::<T>(SHARED_VIEW + gpa).read_unaligned_volatile() }
}

/// Writes memory that the host sees.
pub(crate) fn store<T: Word>(gpa: u64, value: T) {
    // SAFETY: the shared view maps all of the first 4 GiB; callers stay in the arena, where nothing of Rust lies.
    unsafe { pointer::<T>(SHARED_VIEW + gpa).write_unaligned_volatile(value) }
}

/// Reads memory through the private view.
pub(crate) fn load_private(gpa: u64) -> u64 {
    // SAFETY: mapped as above; callers stay in the private area.
    unsafe { pointer::<u64>(gpa).read_unaligned_volatile() }
}

/// Writes memory through the private view.
pub(crate) fn store_private(gpa: u64, value: u64) {
    // SAFETY: mapped as above; callers stay in the private area, where nothing of Rust lies.
    unsafe { pointer::<u64>(gpa).write_unaligned_volatile(value) }
}

/// Accesses at any address, each done once.
trait Volatile<T> {
    unsafe fn read_unaligned_volatile(self) -> T;
    unsafe fn write_unaligned_volatile(self, value: T);
}

impl<T: Word> Volatile<T> for *mut T {
    unsafe fn read_unaligned_volatile(self) -> T {
        let mut value = 0;
        for byte in (0..size_of::<T>()).rev() {
            // SAFETY: the caller promises all bytes of the value.
            value = value << 8 | u64::from(unsafe { self.cast::<u8>().wrapping_add(byte).read_volatile() });
        }
        T::cut(value)
    }

    unsafe fn write_unaligned_volatile(self, value: T) {
        for (byte, part) in value
            .into()
            .to_le_bytes()
            .into_iter()
            .enumerate()
            .take(size_of::<T>())
        {
            // SAFETY: the caller promises all bytes of the value.
            unsafe { self.cast::<u8>().wrapping_add(byte).write_volatile(part) };
        }
    }
}

/// Reads a device register of 1, 2, 4 or 8 bytes.
pub(crate) fn mmio_read<T: Word>(gpa: u64) -> T {
    if mode() == Mode::Snp {
        return T::cut(ghcb_mmio(gpa, T::LEN, None));
    }
    let value: u64;
    // SAFETY: a single load of the register's size; what is behind the address is no memory.
    unsafe {
        match T::LEN {
            1 => asm!("movzx {1:e}, byte ptr [{0}]", in(reg) gpa, out(reg) value, options(nostack)),
            2 => asm!("movzx {1:e}, word ptr [{0}]", in(reg) gpa, out(reg) value, options(nostack)),
            4 => asm!("mov {1:e}, [{0}]", in(reg) gpa, out(reg) value, options(nostack)),
            _ => asm!("mov {1}, [{0}]", in(reg) gpa, out(reg) value, options(nostack)),
        }
    }
    T::cut(value)
}

/// Writes a device register of 1, 2, 4 or 8 bytes.
pub(crate) fn mmio_write<T: Word>(gpa: u64, value: T) {
    let value: u64 = value.into();
    if mode() == Mode::Snp {
        ghcb_mmio(gpa, T::LEN, Some(value));
        return;
    }
    // SAFETY: a single store of the register's size; what is behind the address is no memory.
    unsafe {
        match T::LEN {
            1 => asm!("mov [{0}], al", in(reg) gpa, in("rax") value, options(nostack)),
            2 => asm!("mov [{0}], {1:x}", in(reg) gpa, in(reg) value, options(nostack)),
            4 => asm!("mov [{0}], {1:e}", in(reg) gpa, in(reg) value, options(nostack)),
            _ => asm!("mov [{0}], {1}", in(reg) gpa, in(reg) value, options(nostack)),
        }
    }
}

/// Writes a byte to a port.
pub(crate) fn out(port: u16, value: u8) {
    if mode() == Mode::Snp {
        ghcb_clear();
        ghcb_set(0x1f8, value.into());
        ghcb_call(0x7b, u64::from(port) << 16 | 1 << 4, 0);
        return;
    }
    // SAFETY: a port access changes no memory of this program.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// Reads a byte from a port.
pub(crate) fn input(port: u16) -> u8 {
    if mode() == Mode::Snp {
        ghcb_clear();
        ghcb_set(0x1f8, 0);
        ghcb_call(0x7b, u64::from(port) << 16 | 1 << 4 | 1, 0);
        return load::<u8>(GHCB + 0x1f8);
    }
    let value: u8;
    // SAFETY: a port access changes no memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) };
    value
}

/// Writes `count` bytes to a port in one string instruction; not on SNP.
pub(crate) fn out_many(port: u16, from: u64, count: u64) {
    // SAFETY: reads `count` bytes of mapped memory.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") from => _, inout("rcx") count => _, options(nostack));
    }
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// KVM's MAP_GPA_RANGE with any arguments; not on SNP. Returns what the hypercall left in RAX.
pub(crate) fn map_gpa(gpa: u64, pages: u64, attributes: u64) -> i64 {
    let answer: i64;
    // SAFETY: may discard the pages it names; callers name the private area or what is no memory of this program.
    unsafe {
        asm!("xchg rbx, {gpa}", "vmmcall", "xchg rbx, {gpa}", gpa = inout(reg) gpa => _, inout("rax") 12_i64 => answer,
            in("rcx") pages, in("rdx") attributes, options(nostack));
    }
    answer
}

/// Moves a page to the host's side; false if the host refuses.
pub(crate) fn to_shared(gpa: u64) -> bool {
    match mode() {
        Mode::Plain => false,
        Mode::Soft => map_gpa(gpa, 1, 0) == 0,
        Mode::Snp => {
            pvalidate(gpa, false);
            page_state(gpa, 2)
        }
    }
}

/// Moves a page to the guest's side; false if the host refuses.
pub(crate) fn to_private(gpa: u64) -> bool {
    match mode() {
        Mode::Plain => false,
        Mode::Soft => map_gpa(gpa, 1, 1 << 4) == 0,
        Mode::Snp => {
            let done = page_state(gpa, 1);
            if done {
                pvalidate(gpa, true);
            }
            done
        }
    }
}

const MSR_GHCB: u32 = 0xc001_0130;

/// Asks for a page state change by the MSR protocol: 1 private, 2 shared. True if the host says that it did.
pub(crate) fn page_state(gpa: u64, operation: u64) -> bool {
    let answer = msr_call(operation << 52 | gpa | 0x14);
    wrmsr(MSR_GHCB, GHCB);
    answer & 0xfff == 0x15 && answer >> 32 == 0
}

fn msr_call(request: u64) -> u64 {
    wrmsr(MSR_GHCB, request);
    vmgexit();
    rdmsr(MSR_GHCB)
}

fn ghcb_clear() {
    for at in (0..PAGE).step_by(8) {
        store(GHCB + at, 0_u64);
    }
}

/// Sets a field of the GHCB and its bit in the valid bitmap.
fn ghcb_set(at: u64, value: u64) {
    store(GHCB + at, value);
    let (byte, bit) = (0x3f0 + at / 64, at / 8 % 8);
    store(GHCB + byte, load::<u8>(GHCB + byte) | 1 << bit);
}

fn ghcb_call(code: u64, first: u64, second: u64) {
    ghcb_set(0x390, code);
    ghcb_set(0x398, first);
    ghcb_set(0x3a0, second);
    store(GHCB + 0xffa, 2_u16);
    vmgexit();
}

fn ghcb_mmio(gpa: u64, len: u64, value: Option<u64>) -> u64 {
    ghcb_clear();
    if let Some(value) = value {
        store(GHCB + 0x800, value);
    }
    ghcb_set(0x3a8, GHCB + 0x800);
    ghcb_call(if value.is_some() { 0x8000_0002 } else { 0x8000_0001 }, gpa, len);
    load(GHCB + 0x800)
}

fn vmgexit() {
    // SAFETY: the host answers in the GHCB and its MSR, which are read as data; it cannot reach private memory.
    unsafe { asm!("rep vmmcall") };
}

fn pvalidate(gpa: u64, valid: bool) {
    // SAFETY: the page is in the arena or the private area, where nothing of Rust lies.
    unsafe {
        asm!(".byte 0xf2, 0x0f, 0x01, 0xff", inout("rax") gpa => _, in("ecx") 0, in("edx") u32::from(valid),
            options(nostack));
    }
}

fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: an MSR that SNP guests have.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the GHCB MSR, which has no effect before VMGEXIT.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}
