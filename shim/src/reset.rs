//! The reset vector of machine v1: what a kernel finds that restarts "through the BIOS".
//!
//! Linux prefers a reset by EFI on hardware-reduced ACPI, finds no EFI runtime, and then jumps to F000:FFF0 in real
//! mode (Linux, arch/x86/kernel/reboot.c, `native_machine_emergency_restart`). There lie a few instructions that
//! reset the machine: by the ACPI reset register, or, where port I/O would need a handler for #VC, by the GHCB
//! protocol's termination request, which needs none.

use crate::boot::Mode;
use crate::bytes::put;
use crate::layout::{PAGE, PORT_RESET, RESET_VALUE};
use crate::reason::Reason;
use crate::snp::msr_terminate;

/// The page below 1 MiB that ends with the reset vector.
pub const RESET_PAGE: u64 = 0xf_f000;
/// Offset of the reset vector in the page (F000:FFF0).
const VECTOR: usize = 0xff0;
/// Offset of the code; the vector has room for a jump only.
const CODE: usize = 0xf00;
/// JMP rel16 from the vector to the code.
const JUMP: [u8; 3] = {
    let [low, high, ..] = CODE.wrapping_sub(VECTOR + 3).to_le_bytes();
    [0xe9, low, high]
};
/// HLT; JMP back to it.
const STOP: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// Writes the page, which is zero before.
///
/// # Errors
/// [`Reason::Bug`] when `page` is shorter than a page.
pub fn write(page: &mut [u8], mode: Mode) -> Result<(), Reason> {
    let [port_low, port_high] = PORT_RESET.to_le_bytes();
    let [v0, v1, v2, v3, ..] = msr_terminate(Reason::Reset).to_le_bytes();
    // MOV DX, port; MOV AL, value; OUT DX, AL.
    let by_port = [0xba, port_low, port_high, 0xb0, RESET_VALUE, 0xee];
    // MOV ECX, 0xc0010130; MOV EAX, value; XOR EDX, EDX; WRMSR; VMGEXIT.
    let by_message = [
        0x66, 0xb9, 0x30, 0x01, 0x01, 0xc0, 0x66, 0xb8, v0, v1, v2, v3, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0xf3,
        0x0f, 0x01, 0xd9,
    ];
    let code: &[u8] = match mode {
        Mode::Soft => &by_port,
        Mode::Snp => &by_message,
    };
    let parts = [
        (CODE, code),
        (CODE.saturating_add(code.len()), &STOP),
        (VECTOR, &JUMP),
    ];
    for (at, bytes) in parts {
        put(page, at, bytes).ok_or(Reason::Bug)?;
    }
    Ok(())
}

const _: () = assert!(RESET_PAGE + PAGE == 0x10_0000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vector_leads_to_the_code() {
        let mut page = [0; 4096];
        write(&mut page, Mode::Soft).unwrap();
        let offset = i16::from_le_bytes([page[VECTOR + 1], page[VECTOR + 2]]);
        assert_eq!(page[VECTOR], 0xe9);
        assert_eq!((VECTOR + 3) as i64 + i64::from(offset), CODE as i64);
        assert_eq!(
            page[CODE..CODE + 9],
            [0xba, 0x02, 0x06, 0xb0, 1, 0xee, 0xf4, 0xeb, 0xfd]
        );
    }

    #[test]
    fn an_snp_guest_asks_by_message_and_uses_no_port() {
        let mut page = [0; 4096];
        write(&mut page, Mode::Snp).unwrap();
        let value = u32::from_le_bytes(page[CODE + 8..CODE + 12].try_into().unwrap());
        assert_eq!(u64::from(value), msr_terminate(Reason::Reset));
        assert_eq!(
            page[CODE + 17..CODE + 24],
            [0xf3, 0x0f, 0x01, 0xd9, 0xf4, 0xeb, 0xfd]
        );
    }

    #[test]
    fn a_short_page_is_a_bug() {
        assert_eq!(write(&mut [0; 100], Mode::Soft), Err(Reason::Bug));
    }
}
