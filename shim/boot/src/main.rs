//! The measured boot shim of machine v1.
//!
//! `hw` holds every instruction that is not plain Rust; what to do stands in the `shim` library.
#![no_std]
#![no_main]

mod entry;
mod hw;

use hw::Platform;
use shim::boot::{Mode, prepare};
use shim::layout::{MODE_SNP, MODE_SOFT};
use shim::reason::Reason;

/// The boot processor's work; `mode` is RDI as the VMM set it, which SNP measures.
fn run(mode: u64) -> ! {
    let (mode, mut platform) = match mode {
        MODE_SOFT => (Mode::Soft, Platform::soft()),
        MODE_SNP => match Platform::snp() {
            Ok(platform) => (Mode::Snp, platform),
            Err(reason) => hw::terminate(Mode::Snp, reason),
        },
        _ => hw::terminate(Mode::Soft, Reason::UnknownMode),
    };
    hw::catch_exceptions(mode);
    match prepare(&mut platform, mode, hw::config()) {
        Ok(entry) => hw::jump(entry),
        Err(reason) => hw::terminate(mode, reason),
    }
}
