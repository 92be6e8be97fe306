//! What must change in a guest's memory for an ordinary VM to run it. Only the guest's copy changes, never what was
//! measured: boot page tables without an encryption bit, and without pages of 1 GiB where the guest begins, since not
//! every KVM has them; and an OUT where the shim calls the TDX module, since TDCALL is undefined, which KVMs tell in
//! different ways.

use shim::layout::{C_BIT, STAGING, TABLES, TEXT, TEXT_MAX_LEN};

use crate::call::Call;
use crate::vm::Vm;

const PAGE: u64 = 0x1000;
const GIB: u64 = 1 << 30;
const TWO_MIB: u64 = 2 << 20;
const LARGE: u64 = 0x80;
const TABLE: u64 = 0x3;
const TDCALL: [u8; 4] = [0x66, 0x0f, 0x01, 0xcc];
/// The port that stands for TDCALL.
pub const TDCALL_PORT: u8 = 0xf4;
/// `out TDCALL_PORT, al; nop; nop`.
const OUT: [u8; 4] = [0xe6, TDCALL_PORT, 0x90, 0x90];
/// GiB in which the shim, the reset page and the staging area lie.
const SMALL: [u64; 3] = [0, 3, STAGING / GIB];

/// Makes each TDCALL of the shim an exit.
pub(crate) fn replace_tdcalls(vm: &Vm, call: &Call<'_>) -> Result<(), i32> {
    let hva = vm.hva(TEXT).ok_or(libc::EFAULT)?;
    let text = call.vector(hva, usize::try_from(TEXT_MAX_LEN).unwrap_or(0));
    for (at, window) in (hva..).zip(text.windows(TDCALL.len())) {
        if window == TDCALL {
            call.write(at, &OUT)?;
        }
    }
    Ok(())
}

/// Rewrites the tables; the smaller ones take the last pages of the memory that holds the shim.
pub(crate) fn adapt(vm: &Vm, call: &Call<'_>) -> Result<(), i32> {
    let place = |gpa| vm.hva(gpa).ok_or(libc::EFAULT);
    let end = vm.slot_end(TABLES).ok_or(libc::EFAULT)?;
    for at in (TABLES..TABLES + 2 * PAGE).step_by(8) {
        let entry = call.u64(place(at)?)? & !C_BIT;
        call.write(place(at)?, &entry.to_ne_bytes())?;
    }
    for (number, gib) in (1..).zip(SMALL) {
        let slot = TABLES + PAGE + gib * 8;
        let entry = call.u64(place(slot)?)?;
        if entry & LARGE == 0 {
            continue;
        }
        let table = end - number * PAGE;
        let small = (0..512).map(|index| entry + index * TWO_MIB);
        let bytes: Vec<u8> = small.flat_map(u64::to_ne_bytes).collect();
        call.write(place(table)?, &bytes)?;
        call.write(place(slot)?, &(table | TABLE).to_ne_bytes())?;
    }
    Ok(())
}
