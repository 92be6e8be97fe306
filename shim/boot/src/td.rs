//! The instruction of a TD: TDCALL.
// UNSAFETY: TDCALL, by its bytes.
#![expect(unsafe_code, reason = "an instruction that the compiler does not know")]

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use shim::reason::Reason;
use shim::sha384::Digest;
use shim::tdx::{
    CALL_FATAL, CALL_IO, PAGE_ACCEPT, PASS_R10_TO_R15, RTMR_EXTEND, VP_INFO, VP_VMCALL, check_call,
    fatal as fatal_registers,
};

/// The leaf that names a TD, which the TDX module answers.
const LEAF_TDX: u32 = 0x21;

/// Whether this is a TD, so that TDCALL exists.
pub(crate) fn is_td() -> bool {
    let leaf = __cpuid_count(LEAF_TDX, 0);
    [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"IntelTDX    "
}

/// TDG.VP.INFO: address width and attributes.
pub(crate) fn info() -> (u64, u64) {
    let (width, attributes);
    // SAFETY: fills registers only, and those that are not used hold nothing.
    unsafe {
        asm!(".byte 0x66, 0x0f, 0x01, 0xcc", inout("rax") VP_INFO => _, out("rcx") width, out("rdx") attributes,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, options(nostack));
    }
    (width, attributes)
}

/// TDG.MEM.PAGE.ACCEPT of one 4 KiB or (`large`) 2 MiB page: its status.
pub(crate) fn accept_page(gpa: u64, large: bool) -> u64 {
    let status;
    // SAFETY: makes a page usable and zero; the library accepts only RAM that it does not use yet.
    unsafe {
        asm!(".byte 0x66, 0x0f, 0x01, 0xcc", inout("rax") PAGE_ACCEPT => status,
            inout("rcx") gpa | u64::from(large) => _, out("rdx") _, options(nostack));
    }
    status
}

/// What TDG.MR.RTMR.EXTEND reads.
#[repr(align(64))]
struct Aligned(Digest);

/// TDG.MR.RTMR.EXTEND: its status.
pub(crate) fn extend(register: u8, digest: &Digest) -> u64 {
    let digest = Aligned(*digest);
    let status;
    // SAFETY: reads 48 bytes of the stack, which is identity-mapped and private.
    unsafe {
        asm!(".byte 0x66, 0x0f, 0x01, 0xcc", inout("rax") RTMR_EXTEND => status,
            inout("rcx") &raw const digest.0 => _, in("rdx") u64::from(register), options(nostack));
    }
    status
}

/// A 32-bit write to a port, by the host.
pub(crate) fn out(port: u16, value: u32) -> Result<(), Reason> {
    const BYTES: u64 = 4;
    const WRITE: u64 = 1;
    let (status, answer) = call(CALL_IO, [BYTES, WRITE, port.into(), value.into()]);
    check_call(status, answer)
}

/// Ends the TD and tells the host why, again and again should it return.
pub(crate) fn fatal(reason: Reason) -> ! {
    let [code, text, more] = fatal_registers(reason);
    loop {
        call(CALL_FATAL, [code, 0, text, more]);
    }
}

/// TDG.VP.VMCALL of `function` with R12 to R15: the module's status and the host's answer in R10.
fn call(function: u64, [r12, r13, r14, r15]: [u64; 4]) -> (u64, u64) {
    let (status, answer);
    // SAFETY: the host sees the six registers and may change them, as declared; it cannot write private memory.
    unsafe {
        asm!(".byte 0x66, 0x0f, 0x01, 0xcc", inout("rax") VP_VMCALL => status,
            inout("rcx") PASS_R10_TO_R15 => _, inout("r10") 0u64 => answer, inout("r11") function => _,
            inout("r12") r12 => _, inout("r13") r13 => _, inout("r14") r14 => _, inout("r15") r15 => _,
            options(nostack));
    }
    (status, answer)
}
