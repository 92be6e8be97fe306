//! `cvmm measure`: the digest that a launch will have, from the arguments of `cvmm run` alone. Needs neither KVM nor
//! SNP, opens no device, and reads kernel and initrd once.

mod answer;
mod compare;
mod launch;
mod ovmf;

use std::io::{self, Write};
use std::path::PathBuf;

use snp::measure::MeasureError;
use snp::ovmf::OvmfError;

use crate::cli;
use crate::config::{Config, ConfigError};
use crate::ending::ExitClass;
use crate::plan::{PlanError, ReadError};
use crate::spec::file::FileError;
use crate::spec::payload::PayloadError;
use crate::spec::size::{self, SizeError};
use crate::spec::snp::SnpOptionError;

pub use launch::Launch;
pub use ovmf::Ovmf;

#[derive(clap::Args, Clone, Debug)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// Print the digests for 1, 2, … N virtual CPUs, one a line
    #[arg(long, value_name = "N", help_heading = "Measure", conflicts_with_all = ["diff", "explain"])]
    pub table: Option<u32>,
    /// Print every page and register set in launch order: address, type, SHA-384 of the contents, digest so far
    #[arg(long, help_heading = "Measure", conflicts_with = "diff")]
    pub explain: bool,
    /// Name the first page or register in which the launches of two configuration files differ; other flags are
    /// laid over both
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"], help_heading = "Measure", conflicts_with = "file")]
    pub diff: Vec<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, help_heading = "Measure", conflicts_with = "diff")]
    pub json: bool,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub subject: Subject,
}

/// What is to be launched.
#[derive(clap::Args, Clone, Debug)]
pub struct Subject {
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub ovmf: Ovmf,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub config: Config,
    /// Read a configuration first: JSON, as `cvmm run --print-config` prints it
    #[arg(
        long = "config",
        id = "file",
        value_name = "FILE.json",
        help_heading = "Configuration"
    )]
    pub file: Option<PathBuf>,
}

/// A launch that cannot be predicted.
#[derive(Debug, thiserror::Error)]
pub enum Unpredictable {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Number of vCPUs.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// Kernel or initrd broke off.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Options of SNP.
    #[error(transparent)]
    Snp(#[from] SnpOptionError),
    /// TDX measures otherwise.
    #[error("platform tdx: its digest cannot be predicted yet; give --platform snp or soft")]
    Tdx,
    /// QEMU measures nothing without SNP.
    #[error("platform soft: a firmware image is measured by SNP alone; give --platform snp")]
    SoftFirmware,
    /// The shim is no firmware.
    #[error("firmware: cvmm's shim needs none; leave out --firmware, or give --payload ovmf")]
    TwoPayloads,
    /// The parameters do not fit the page.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A mistake in the plan.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// An input file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The firmware image.
    #[error("firmware {}: {cause}", path.display())]
    Firmware {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: OvmfError,
    },
    /// Firmware and guest do not go together.
    #[error(transparent)]
    Ovmf(#[from] snp::ovmf::PlanError),
    /// A vCPU type nobody knows.
    #[error("vcpu-type {name}: unknown; give EPYC-v4, EPYC-Rome, EPYC-Milan, EPYC-Genoa or EPYC-Turin")]
    VcpuType {
        /// The name given.
        name: String,
    },
    /// Standard output is gone.
    #[error("writing to standard output")]
    Output(#[from] io::Error),
}

impl Unpredictable {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        match self {
            Self::Measure(_) => ExitClass::Internal,
            Self::Output(_) | Self::Read(_) => ExitClass::HostFailed,
            Self::Config(_)
            | Self::Size(_)
            | Self::Payload(_)
            | Self::Snp(_)
            | Self::Tdx
            | Self::SoftFirmware
            | Self::TwoPayloads
            | Self::Plan(_)
            | Self::File(_)
            | Self::Firmware { .. }
            | Self::Ovmf(_)
            | Self::VcpuType { .. } => ExitClass::Usage,
        }
    }
}

/// Does what `args` ask for.
///
/// # Errors
/// See [`Unpredictable`].
pub fn run(args: &Args) -> Result<ExitClass, Unpredictable> {
    if let [left, right] = args.diff.as_slice() {
        let (text, same) = compare::compare(&args.subject, left, right)?;
        say(&text)?;
        return Ok(if same {
            ExitClass::Success
        } else {
            ExitClass::Mismatch
        });
    }
    let mut subject = args.subject.clone();
    subject.config.cpus = args.table.or(subject.config.cpus);
    let launch = Launch::plan(&subject)?;
    let text = if args.json {
        answer::json(&launch, args.explain)?
    } else if args.explain {
        answer::explain(&launch)?
    } else if args.table.is_some() {
        answer::table(&launch)?
    } else {
        launch.digest()?.to_string()
    };
    say(&text)?;
    Ok(ExitClass::Success)
}

/// Prints `text`; a reader that has closed the pipe has seen enough.
pub(crate) fn say(text: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
        _ => Ok(()),
    }
}
