//! Registers as KVM's structures lay them out.

use arch::x86::regs::{BootState, Segment, Table};

/// `struct kvm_run`: offsets.
pub(crate) const IMMEDIATE_EXIT: u64 = 1;
pub(crate) const EXIT_REASON: u64 = 8;
pub(crate) const BODY: u64 = 32;
pub(crate) const VALID_REGS: u64 = 288;
pub(crate) const DIRTY_REGS: u64 = 296;
pub(crate) const SYNC_REGS: u64 = 304;
pub(crate) const SYNC_SREGS: u64 = SYNC_REGS + REGS as u64;
/// `KVM_SYNC_X86_REGS`, `KVM_SYNC_X86_SREGS`.
pub(crate) const REGS_AND_SREGS: u64 = 3;
/// `struct kvm_regs` and `kvm_sregs`.
pub(crate) const REGS: usize = 144;
pub(crate) const SREGS: usize = 312;

/// Where a TD's vCPUs start.
const TD_RESET: u64 = 0xffff_fff0;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
}

/// General registers by their place in `struct kvm_regs`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reg {
    Rax = 0,
    Rbx = 8,
    Rcx = 16,
    Rdx = 24,
    Rsi = 32,
    Rdi = 40,
    Rsp = 48,
    Rbp = 56,
    R8 = 64,
    R9 = 72,
    R10 = 80,
    R11 = 88,
    R12 = 96,
    R13 = 104,
    R14 = 112,
    R15 = 120,
    Rip = 128,
    Rflags = 136,
}

/// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
pub(crate) fn in_encoding_order(regs: &[u8; REGS]) -> [u64; 16] {
    use Reg::{R8, R9, R10, R11, R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi, Rsp};
    [
        Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15,
    ]
    .map(|which| reg(regs, which))
}

pub(crate) fn set_reg(regs: &mut [u8; REGS], which: Reg, value: u64) {
    put(regs, which as usize, value);
}

pub(crate) fn reg(regs: &[u8; REGS], which: Reg) -> u64 {
    u64_at(regs, which as usize)
}

/// Takes `KVM_SET_REGS` into the state that a launch measures.
pub(crate) fn take_regs(state: &mut BootState, regs: &[u8; REGS]) {
    let general = &mut state.general;
    general.rip = reg(regs, Reg::Rip);
    general.rsp = reg(regs, Reg::Rsp);
    general.rflags = reg(regs, Reg::Rflags);
    general.rdx = reg(regs, Reg::Rdx);
    general.rsi = reg(regs, Reg::Rsi);
    general.rdi = reg(regs, Reg::Rdi);
}

fn segment(bytes: &[u8]) -> Segment {
    let [kind, present, dpl, db, s, l, g, avl] = bytes[14..22].try_into().expect("eight bytes");
    let bits = [
        (kind, 0),
        (s, 4),
        (dpl, 5),
        (present, 7),
        (avl, 8),
        (l, 9),
        (db, 10),
        (g, 11),
    ];
    Segment {
        base: u64_at(bytes, 0),
        limit: u32::from_ne_bytes(bytes[8..12].try_into().expect("four bytes")),
        selector: u16::from_ne_bytes(bytes[12..14].try_into().expect("two bytes")),
        attributes: bits
            .iter()
            .fold(0, |all, (value, shift)| all | u16::from(*value) << shift),
    }
}

fn table(bytes: &[u8]) -> Table {
    Table {
        base: u64_at(bytes, 0),
        limit: u16::from_ne_bytes(bytes[8..10].try_into().expect("two bytes")),
    }
}

/// Takes `KVM_SET_SREGS`.
pub(crate) fn take_sregs(state: &mut BootState, sregs: &[u8; SREGS]) {
    let mut segments = sregs.chunks(24).map(segment);
    let mut next = || segments.next().expect("eight segments");
    let s = &mut state.segments;
    (s.cs, s.ds, s.es, s.fs, s.gs, s.ss) = (next(), next(), next(), next(), next(), next());
    (s.tr, s.ldtr) = (next(), next());
    s.gdtr = table(&sregs[192..]);
    s.idtr = table(&sregs[208..]);
    state.control.cr0 = u64_at(sregs, 224);
    state.control.cr3 = u64_at(sregs, 240);
    state.control.cr4 = u64_at(sregs, 248);
    state.control.efer = u64_at(sregs, 264);
}

/// Clears bits of CR3.
pub(crate) fn clear_cr3(sregs: &mut [u8; SREGS], bits: u64) {
    let cr3 = u64_at(sregs, 240) & !bits;
    put(sregs, 240, cr3);
}

/// What the TDX module starts a vCPU with: 32-bit protected mode, flat, paging off, long mode already enabled
/// (Intel TDX Module 1.5 base specification, "Initial State of Guest GPRs", "Initial State of CRs").
pub(crate) fn td_reset(
    regs: &mut [u8; REGS],
    sregs: &mut [u8; SREGS],
    index: u64,
    width: u32,
    rcx: u64,
    signature: u32,
) {
    *regs = [0; REGS];
    let values = [
        (Reg::Rbx, width.into()),
        (Reg::Rcx, rcx),
        (Reg::R8, rcx),
        (Reg::Rdx, signature.into()),
        (Reg::Rsi, index),
        (Reg::Rip, TD_RESET),
        (Reg::Rflags, 2),
    ];
    for (which, value) in values {
        put(regs, which as usize, value);
    }
    for (number, segment) in sregs[..144].chunks_mut(24).enumerate() {
        // CS, DS, ES, FS, GS, SS: base 0, 4 GiB, present, 32-bit.
        let (selector, kind) = if number == 0 { (8, 0xb) } else { (16, 3) };
        segment.fill(0);
        segment[8..12].fill(0xff);
        segment[12] = selector;
        segment[14..22].copy_from_slice(&[kind, 1, 0, 1, 1, 0, 1, 0]);
    }
    sregs[192..224].fill(0);
    for (at, value) in [
        (224, 0x31),
        (232, 0),
        (240, 0),
        (248, 0x40),
        (256, 0),
        (264, 0x100),
    ] {
        put(sregs, at, value);
    }
    // The local APIC is in x2APIC mode from the start.
    let apic = u64_at(sregs, 272) | 0xc00;
    put(sregs, 272, apic);
}
