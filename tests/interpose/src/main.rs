//! `interpose CVMM`: launches a TD with this cvmm on the modelled host, lets it run to its kernel, and prints what that
//! took, as JSON.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use interpose::place::{KERNEL_PORT, Place};
use interpose::{Outcome, Ran, Scenario};

/// `KVM_EXIT_IO`.
const EXIT_IO: u32 = 2;

fn is_kernel(exit: &Ran) -> bool {
    exit.reason == EXIT_IO && exit.body[0] >> 16 == u32::from(KERNEL_PORT)
}

fn to_kernel(scenario: &mut Scenario) {
    scenario.limit = Duration::from_secs(120);
    scenario.enough = |progress| progress.exits.last().is_some_and(is_kernel);
}

fn report(outcome: &Outcome) -> Option<String> {
    let exits = outcome.exits.iter().position(is_kernel)?;
    let commands = outcome.commands.len();
    let calls = outcome.tdcalls.len();
    let accepts = outcome
        .tdcalls
        .iter()
        .filter(|call| call.leaf == interpose::PAGE_ACCEPT)
        .count();
    Some(format!(
        r#"{{"commands": {commands}, "exits": {exits}, "tdcalls": {calls}, "accepts": {accepts}}}"#
    ))
}

fn main() -> ExitCode {
    let Some(cvmm) = std::env::args_os().nth(1) else {
        eprintln!("usage: interpose CVMM");
        return ExitCode::from(2);
    };
    let args = ["--platform", "tdx", "--sandbox", "off"];
    let outcome = Place::new("tdx-report").and_then(|place| place.run(Path::new(&cvmm), &args, to_kernel));
    match outcome {
        Ok(outcome) => match report(&outcome) {
            Some(line) => {
                println!("{line}");
                ExitCode::SUCCESS
            }
            None => {
                let last = outcome.exits.last();
                eprintln!(
                    "the kernel was not reached: {:?} {last:x?} {}",
                    outcome.ended, outcome.stderr
                );
                ExitCode::FAILURE
            }
        },
        Err(e) => {
            eprintln!("interpose: {e}");
            ExitCode::FAILURE
        }
    }
}
