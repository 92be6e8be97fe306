//! The manual pages and docs/process.md say what the program does. `BLESS=1 cargo test -p vmm --test docs` writes
//! them anew.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use vmm::cli::Cli;
use vmm::ending::exit_code_table;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// Compares a file with what it should be, or writes it.
fn same(name: &str, expected: &str) {
    let path = docs().join(name);
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/{name} is out of date; run `BLESS=1 cargo test -p vmm --test docs`"
    );
}

#[test]
fn manual_pages_are_made_from_the_flags() {
    let mut cvmm = Cli::command().flatten_help(false);
    cvmm.build();
    let mut pages = vec![(String::from("cvmm"), cvmm.clone())];
    for command in cvmm.get_subcommands().filter(|c| c.get_name() != "help") {
        pages.push((format!("cvmm-{}", command.get_name()), command.clone()));
    }
    for (name, command) in pages {
        let mut page = Vec::new();
        // No date: the page changes only when the flags do.
        let man = clap_mangen::Man::new(command).section("1").date("");
        man.render(&mut page).unwrap();
        same(&format!("{name}.1"), &String::from_utf8(page).unwrap());
    }
}

#[test]
fn the_process_contract_lists_exit_codes_and_events() {
    let path = docs().join("process.md");
    let text = fs::read_to_string(path).unwrap();
    for line in exit_code_table().lines().skip(1) {
        let (code, meaning) = line.trim().split_once("  ").unwrap();
        let row = format!("| {code} | {meaning} |");
        assert!(text.contains(&row), "docs/process.md lacks: {row}");
    }
    for event in [
        "started",
        "sandbox",
        "measured",
        "running",
        "device_broken",
        "guest_reboot",
        "guest_off",
        "guest_terminated",
        "stopping",
        "stopped",
        "error",
    ] {
        assert!(
            text.contains(&format!("| `{event}` |")),
            "docs/process.md lacks {event}"
        );
    }
}
