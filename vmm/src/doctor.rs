//! `cvmm doctor`: what this host can do, what is missing, and how to mend it.

mod checks;
mod probe;
mod report;
mod snp;
mod system;
mod tdx;

use clap::ValueEnum;

pub use report::{Check, Report, Status};

use crate::ending::ExitClass;
use crate::measure;

#[derive(clap::Args, Clone, Debug, Default)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Succeed only if a guest can run on this platform
    #[arg(long = "for", id = "for", value_name = "PLATFORM")]
    pub platform: Option<Platform>,
}

/// A platform that doctor can be asked about.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// No protection, for development
    Soft,
    /// AMD SEV-SNP
    Snp,
    /// Intel TDX
    Tdx,
}

/// Examines the host, prints the report, and returns the exit code.
pub fn run(args: &Args) -> u8 {
    let report = checks::examine();
    let text = if args.json {
        serde_json::to_string_pretty(&report).unwrap_or_default()
    } else {
        report.to_string()
    };
    if let Err(e) = measure::say(&text) {
        eprintln!("cvmm: printing what this host has: {e}");
        return ExitClass::HostFailed as u8;
    }
    let good = match args.platform {
        None => report.usable.soft || report.usable.snp || report.usable.tdx,
        Some(Platform::Soft) => report.usable.soft,
        Some(Platform::Snp) => report.usable.snp,
        Some(Platform::Tdx) => report.usable.tdx,
    };
    if good {
        ExitClass::Success as u8
    } else {
        ExitClass::HostLacks as u8
    }
}
