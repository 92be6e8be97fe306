//! The fuzzer: libFuzzer around the target that `CVMM_FUZZ_TARGET` names. Use `scripts/fuzz`.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::OnceLock;

static TARGET: OnceLock<fuzz::Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        fuzz::watch::ignore_broken_pipes();
        let name = std::env::var("CVMM_FUZZ_TARGET").unwrap_or_default();
        match fuzz::find(&name) {
            Some(target) => _ = TARGET.set(target),
            None => {
                eprintln!("no fuzz target {name:?}; there are: {}", fuzz::names().join(" "));
                std::process::exit(2);
            }
        }
    },
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            fuzz::watch::bounded(|| target(data));
        }
    }
);
