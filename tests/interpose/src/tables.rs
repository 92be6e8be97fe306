//! What must change in a guest's memory for an ordinary VM to run it. Only the guest's copy changes, never what was
//! measured: boot page tables without an encryption or shared bit, and without pages of 1 GiB where the guest begins, since not
//! every KVM has them; and an OUT where the shim has a TDCALL, which is undefined there and which KVMs tell in different
//! ways, or a CPUID, which a paravirtually nested KVM does not intercept.

use shim::layout::{C_BIT, SHARED_BIT, STAGING, TABLES, TEXT, TEXT_MAX_LEN};

use crate::call::Call;
use crate::vm::Vm;

const PAGE: u64 = 0x1000;
const GIB: u64 = 1 << 30;
const TWO_MIB: u64 = 2 << 20;
const LARGE: u64 = 0x80;
const TABLE: u64 = 0x3;
const TDCALL: [u8; 4] = [0x66, 0x0f, 0x01, 0xcc];
/// The port that stands for TDCALL.
pub(crate) const TDCALL_PORT: u8 = 0xf4;
/// `out TDCALL_PORT, al; nop; nop`.
pub(crate) const OUT: [u8; 4] = [0xe6, TDCALL_PORT, 0x90, 0x90];
const CPUID: [u8; 2] = [0x0f, 0xa2];
/// The port that stands for CPUID.
pub(crate) const CPUID_PORT: u8 = 0xf6;
pub(crate) const CPUID_OUT: [u8; 2] = [0xe6, CPUID_PORT];
/// GiB in which the shim, the reset page and the staging area lie.
const SMALL: [u64; 3] = [0, 3, STAGING / GIB];

/// Makes each TDCALL and CPUID of the shim an exit.
pub(crate) fn replace_instructions(vm: &Vm, call: &Call<'_>) -> Result<(), i32> {
    let hva = vm.hva(TEXT).ok_or(libc::EFAULT)?;
    let text = call.vector(hva, usize::try_from(TEXT_MAX_LEN).unwrap_or(0));
    for (from, to) in [(TDCALL.as_slice(), OUT.as_slice()), (&CPUID, &CPUID_OUT)] {
        for (at, window) in (hva..).zip(text.windows(from.len())) {
            if window == from {
                call.write(at, to)?;
            }
        }
    }
    Ok(())
}

/// Rewrites the tables; the smaller ones take the last pages of the memory that holds the shim.
pub(crate) fn adapt(vm: &Vm, call: &Call<'_>) -> Result<(), i32> {
    let place = |gpa| vm.hva(gpa).ok_or(libc::EFAULT);
    let end = vm.slot_end(TABLES).ok_or(libc::EFAULT)?;
    for at in (TABLES..TABLES + 2 * PAGE).step_by(8) {
        let entry = call.u64(place(at)?)? & !(C_BIT | SHARED_BIT);
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
