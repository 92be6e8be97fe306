//! What the shim asks of the TDX module and of the hypervisor behind it, and checks of their answers, without
//! the instructions.
//!
//! Sources: "Intel TDX Module v1.5 ABI Specification", revision 348551-007, "Guest-Side (TDCALL) Interface
//! Functions"; "Guest-Hypervisor Communication Interface (GHCI) for TDX 1.5", revision 348552-004,
//! "TDG.VP.VMCALL Interface"; ACPI 6.6, "Multiprocessor Wakeup Structure".

use crate::layout::TD_FATAL_MARK;
use crate::reason::Reason;

/// TDG.VP.VMCALL.
pub const VP_VMCALL: u64 = 0;
/// TDG.VP.INFO.
pub const VP_INFO: u64 = 1;
/// TDG.MR.RTMR.EXTEND.
pub const RTMR_EXTEND: u64 = 2;
/// TDG.MEM.PAGE.ACCEPT.
pub const PAGE_ACCEPT: u64 = 6;

/// Width of guest-physical addresses that the boot page tables are made for.
const ADDRESS_BITS: u64 = 48;
const ADDRESS_BITS_MASK: u64 = 0x3f;
/// Attribute: the host may read and change the TD.
const ATTRIBUTE_DEBUG: u64 = 1;
/// Attribute: no #VE for memory that is not accepted, so that the host cannot remove pages behind the TD's back.
const ATTRIBUTE_SEPT_VE_DISABLE: u64 = 1 << 28;

/// Checks what TDG.VP.INFO says of the TD: `width` is RCX, `attributes` RDX.
///
/// # Errors
/// [`Reason::TdAddressWidth`] or [`Reason::TdAttributes`].
pub fn check_info(width: u64, attributes: u64) -> Result<(), Reason> {
    if width & ADDRESS_BITS_MASK != ADDRESS_BITS {
        return Err(Reason::TdAddressWidth);
    }
    let relevant = attributes & (ATTRIBUTE_DEBUG | ATTRIBUTE_SEPT_VE_DISABLE);
    (relevant == ATTRIBUTE_SEPT_VE_DISABLE)
        .then_some(())
        .ok_or(Reason::TdAttributes)
}

/// Bits of a TDCALL's status that name what happened; the others say to which operand.
const STATUS_MASK: u64 = 0xffff_ffff_0000_0000;
const OPERAND_BUSY: u64 = 0x8000_0200 << 32;
const PAGE_ALREADY_ACCEPTED: u64 = 0x0000_0b0a << 32;
const PAGE_SIZE_MISMATCH: u64 = 0xc000_0b0b << 32;
/// How often the shim asks while the host works on the same page or register.
const CALLS_MAX: u32 = 10_000;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is private, zero and usable.
    Done,
    /// The host backs it by smaller pages.
    Smaller,
}

/// Repeats `call` while the module is busy, and gives its status.
fn patiently(mut call: impl FnMut() -> u64) -> u64 {
    for _ in 0..CALLS_MAX {
        let status = call();
        if status & STATUS_MASK != OPERAND_BUSY {
            return status;
        }
    }
    OPERAND_BUSY
}

/// Accepts a page by `call`, one TDG.MEM.PAGE.ACCEPT, which gives its status.
///
/// # Errors
/// [`Reason::DoubleValidation`] when the page was accepted before, [`Reason::Accept`] for any other refusal.
pub fn accept(call: impl FnMut() -> u64) -> Result<Accepted, Reason> {
    match patiently(call) {
        0 => Ok(Accepted::Done),
        status => match status & STATUS_MASK {
            PAGE_SIZE_MISMATCH => Ok(Accepted::Smaller),
            PAGE_ALREADY_ACCEPTED => Err(Reason::DoubleValidation),
            _ => Err(Reason::Accept),
        },
    }
}

/// Extends a register by `call`, one TDG.MR.RTMR.EXTEND, which gives its status.
///
/// # Errors
/// [`Reason::RtmrExtend`].
pub fn extend(call: impl FnMut() -> u64) -> Result<(), Reason> {
    (patiently(call) == 0).then_some(()).ok_or(Reason::RtmrExtend)
}

/// RCX of a TDG.VP.VMCALL: R10 to R15 are passed to the host.
pub const PASS_R10_TO_R15: u64 = 0xfc00;
/// R11: port input or output.
pub const CALL_IO: u64 = 30;
/// R11: the TD cannot go on.
pub const CALL_FATAL: u64 = 0x1_0003;

/// Checks the answer to a TDG.VP.VMCALL: `status` of the module, `answer` (R10) of the host.
///
/// # Errors
/// [`Reason::TdVmcall`].
pub fn check_call(status: u64, answer: u64) -> Result<(), Reason> {
    (status == 0 && answer == 0).then_some(()).ok_or(Reason::TdVmcall)
}

/// R12, R14 and R15 of a fatal error: the code, and a text of 14 characters for a host that does not know it.
#[must_use]
pub fn fatal(reason: Reason) -> [u64; 3] {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let code = reason.code();
    let digit = |shift: u8| {
        let at = usize::from((code >> shift) & 15);
        DIGITS.get(at).copied().unwrap_or_default()
    };
    let text = *b"cvmmshim";
    let more = [b':', b' ', b'0', b'x', digit(4), digit(0), 0, 0];
    [
        u64::from(TD_FATAL_MARK | u32::from(code)),
        u64::from_le_bytes(text),
        u64::from_le_bytes(more),
    ]
}

/// Mailbox command: go to the wake-up vector.
pub const MAILBOX_WAKE: u64 = 1;
/// Mailbox command: show that you are here by clearing the command.
pub const MAILBOX_TEST: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_td_has_48_address_bits_no_debugger_and_no_ve_for_memory() {
        let good = ATTRIBUTE_SEPT_VE_DISABLE;
        let cases = [
            (48, good, Ok(())),
            (48 | 1 << 6, good | 1 << 63, Ok(())),
            (52, good, Err(Reason::TdAddressWidth)),
            (0, good, Err(Reason::TdAddressWidth)),
            (48, good | 1, Err(Reason::TdAttributes)),
            (48, 0, Err(Reason::TdAttributes)),
        ];
        for (width, attributes, expected) in cases {
            assert_eq!(check_info(width, attributes), expected, "{width} {attributes:#x}");
        }
    }

    #[test]
    fn only_success_and_a_smaller_size_lead_on() {
        let cases = [
            (0, Ok(Accepted::Done)),
            (0xc000_0b0b_0000_0001, Ok(Accepted::Smaller)),
            (0x0000_0b0a_0000_0001, Err(Reason::DoubleValidation)),
            (0xc000_0b0d_0000_0001, Err(Reason::Accept)),
            (0xc000_0100_0000_0001, Err(Reason::Accept)),
            (1, Err(Reason::Accept)),
        ];
        for (status, expected) in cases {
            assert_eq!(accept(|| status), expected, "{status:#x}");
        }
        assert_eq!(extend(|| 0), Ok(()));
        assert_eq!(extend(|| 0xc000_0100_0000_0001), Err(Reason::RtmrExtend));
    }

    #[test]
    fn a_busy_module_is_asked_again_but_not_for_ever() {
        let mut left = 3;
        let busy_thrice = || {
            left -= 1;
            if left > 0 { 0x8000_0200_0000_0001 } else { 0 }
        };
        assert_eq!(accept(busy_thrice), Ok(Accepted::Done));
        assert_eq!(left, 0);
        let mut calls = 0;
        let busy = || {
            calls += 1;
            0x8000_0200_0000_0001
        };
        assert_eq!(accept(busy), Err(Reason::Accept));
        assert_eq!(calls, CALLS_MAX);
        assert_eq!(extend(|| 0x8000_0200_0000_0001), Err(Reason::RtmrExtend));
    }

    #[test]
    fn a_call_succeeds_when_module_and_host_say_so() {
        for (status, answer, good) in [(0, 0, true), (1, 0, false), (0, 1, false), (0, 1 << 63, false)] {
            assert_eq!(
                check_call(status, answer).is_ok(),
                good,
                "{status:#x} {answer:#x}"
            );
        }
    }

    #[test]
    fn a_fatal_error_has_the_code_twice() {
        let [code, text, more] = fatal(Reason::KernelMismatch);
        assert_eq!(code, 0x6376_6d08);
        let text = [text.to_le_bytes(), more.to_le_bytes()];
        assert_eq!(text.as_flattened(), b"cvmmshim: 0x08\0\0");
    }
}
