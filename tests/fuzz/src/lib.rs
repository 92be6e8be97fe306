//! Fuzz targets: each drives code that parses what a guest, a file or a socket says, and panics when a promise
//! is broken. A device's target is a guest program in a small byte code; see [`program`].
#![forbid(unsafe_code)]

pub mod exits;
pub mod files;
pub mod guest;
pub mod input;
pub mod machine;
pub mod peer;
pub mod program;
pub mod tdx_input;
pub mod watch;

/// Runs one input.
pub type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("blk", |data| program::run(data, peer::disk_in_memory)),
    ("blk_ring", |data| program::run(data, peer::disk_on_ring)),
    ("bzimage", files::kernel),
    ("certs", files::certs),
    ("config", files::config),
    ("console", |data| program::run(data, peer::console)),
    ("cpuid_page", files::cpuid),
    ("get_quote", tdx_input::get_quote),
    ("id_block", files::id_block),
    ("input", |data| program::run(data, peer::button)),
    ("map_gpa", exits::run),
    ("net", |data| program::run(data, peer::passt)),
    ("ovmf", files::ovmf),
    ("qgs", tdx_input::answer),
    ("quote", tdx_input::quote),
    ("report", files::report),
    ("rng", |data| program::run(data, peer::entropy)),
    ("shim", files::shim_plan),
    ("tdvf", tdx_input::tdvf),
    ("transport", |data| program::run_raw(data, peer::button)),
    ("vsock", |data| program::run(data, peer::vsock)),
    ("vsock_mux", |data| program::run_packets(data, peer::vsock)),
];

/// The target called `name`.
pub fn find(name: &str) -> Option<Target> {
    TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, target)| *target)
}

/// All targets.
pub fn names() -> Vec<&'static str> {
    TARGETS.iter().map(|(name, _)| *name).collect()
}
