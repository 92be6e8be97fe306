//! The measured boot shim of machine v2.
//!
//! `hw` holds every instruction that is not plain Rust; what to do stands in the `shim` library.
#![no_std]
#![no_main]

mod entry;
mod hw;
mod memory;
mod reset;
mod td;

use hw::Platform;
use shim::boot::{Mode, prepare};
use shim::layout::{MODE_SNP, MODE_SOFT, MODE_TDX};
use shim::reason::Reason;

/// The boot processor's work; `mode` is RDI as the VMM set it, which SNP measures, or as the code behind the
/// reset page did.
fn run(mode: u64) -> ! {
    let mode = match mode {
        MODE_SOFT => Mode::Soft,
        MODE_SNP => Mode::Snp,
        MODE_TDX if td::is_td() => Mode::Tdx,
        _ => hw::terminate(Mode::Soft, Reason::UnknownMode),
    };
    hw::catch_exceptions(mode);
    match Platform::new(mode).and_then(|mut platform| prepare(&mut platform, mode, hw::config())) {
        Ok(entry) => hw::jump(entry),
        Err(reason) => hw::terminate(mode, reason),
    }
}
