//! A guest that attacks the devices it is given, one case after another, and says how each ended.
//!
//! Command line: `mode=plain|soft|snp`, `ecam=HEX`, `ram=HEX` (end of low memory), `from=N` (first case to play, for
//! going on after a machine that a case ended), `only=C01,C02b` (cases to play), `then=reboot` (cvmm's reset register
//! instead of its sleep register).
#![no_std]
#![no_main]

mod cases;
mod entry;
mod machine;
#[path = "../../../shim/boot/src/memory.rs"]
mod memory;
mod pci;
mod say;
mod stage;
mod virtio;

use core::ptr::with_exposed_provenance;
use core::sync::atomic::{AtomicU64, Ordering};

use cases::Case;
use machine::Mode;
use say::say;
use stage::{Stage, Target, Verdict, arm, bystander, intact, serves};

static RAM_END: AtomicU64 = AtomicU64::new(0x800_0000);

/// End of low memory.
fn ram_end() -> u64 {
    RAM_END.load(Ordering::Relaxed)
}

/// Everything; `cmdline` is the address of the command line.
fn run(cmdline: u64) -> ! {
    // SAFETY: the loader left a string that ends with NUL at this address, and nobody changes it.
    let words = unsafe { core::ffi::CStr::from_ptr(with_exposed_provenance(cmdline as usize)) };
    let words = words.to_str().unwrap_or("");
    let value = |key: &str| {
        words
            .split(' ')
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    let number = |key: &str| value(key).and_then(|text| u64::from_str_radix(text, 16).ok());
    machine::start(match value("mode") {
        Some("snp") => Mode::Snp,
        Some("soft") => Mode::Soft,
        _ => Mode::Plain,
    });
    if let Some(ecam) = number("ecam") {
        pci::set_ecam(ecam);
    }
    if let Some(ram) = number("ram") {
        RAM_END.store(ram, Ordering::Relaxed);
    }
    let from = value("from").and_then(|text| text.parse().ok()).unwrap_or(0);
    let only = value("only");
    say!("HOSTILE begins");
    let rounds = cases::all().flat_map(|case| case.on.iter().map(move |target| (case, *target)));
    for (index, (case, target)) in rounds.enumerate().skip(from) {
        if only.is_some_and(|only| !only.split(',').any(|id| id == case.id)) {
            continue;
        }
        say!("BEGIN {index} {} {} {}", case.id, target.name, case.name);
        let (verdict, why) = play(case, target);
        say!("CASE {index} {} {} {verdict:?} {why}", case.id, target.name);
    }
    say!("HOSTILE ends");
    if value("then") == Some("reboot") {
        machine::out(0x602, 1);
    }
    power_off()
}

/// One case on one device, and whether device, bystander and memory survived it.
fn play(case: &Case, target: Target) -> (Verdict, &'static str) {
    let Some(stage) = Stage::set(target) else {
        return (Verdict::Absent, "no such device");
    };
    arm();
    let verdict = (case.play)(&stage);
    if verdict == Verdict::Absent {
        return (verdict, "does not apply");
    }
    if !intact() {
        return (Verdict::Fail, "memory changed that no request named");
    }
    if !serves(bystander(target)) {
        return (Verdict::Wedged, "another device does not serve");
    }
    if !serves(target) {
        return (Verdict::Wedged, "no service after a reset");
    }
    (verdict, "")
}

/// Ends cvmm's machine by its ACPI sleep register, and QEMU's by the one of its chipset.
fn power_off() -> ! {
    machine::out(0x600, 0x34);
    loop {
        core::hint::spin_loop();
    }
}

/// An exception: the report says so and the machine ends.
fn died(vector: u64, first: u64, second: u64) -> ! {
    say!("HOSTILE died of exception {vector} ({first:x} {second:x})");
    power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("HOSTILE panics: {info}");
    power_off()
}
