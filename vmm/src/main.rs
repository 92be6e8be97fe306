//! The `cvmm` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(vmm::cli::main(vmm::machine::run))
}
