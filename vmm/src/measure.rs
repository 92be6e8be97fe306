//! `cvmm measure`: the digest that a launch will have, from the arguments of `cvmm run` alone. Needs neither KVM nor
//! SNP nor TDX, opens no device, and reads kernel and initrd once.

mod answer;
mod compare;
mod launch;
mod ovmf;
mod td;

use std::io::{self, Write};
use std::path::PathBuf;

use arch::measurement::MeasureError;
use snp::ovmf::OvmfError;
use tdx::tdvf::TdvfError;

use crate::cli;
use crate::config::{Config, ConfigError, PlatformName};
use crate::ending::ExitClass;
use crate::plan::{PlanError, ReadError};
use crate::spec::file::FileError;
use crate::spec::payload::PayloadError;
use crate::spec::size::{self, SizeError};
use crate::spec::snp::SnpOptionError;
use crate::spec::tdx::TdxOptionError;

pub use launch::Launch;
pub use ovmf::Ovmf;
use ovmf::PayloadName;
use td::Td;

#[derive(clap::Args, Clone, Debug)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// Print the digests for 1, 2, … N virtual CPUs, one a line; not on TDX, where their number has no part in it
    #[arg(long, value_name = "N", help_heading = "Measure", conflicts_with_all = ["diff", "explain"],
        value_parser = clap::value_parser!(u32).range(1..=i64::from(size::MOST_CPUS)))]
    pub table: Option<u32>,
    /// Print every page, register set and event in order: address, type, SHA-384 of the contents, digest so far
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
    /// On TDX: all pages of a range are added before the first is extended, as hosts did it before mainline KVM
    #[arg(long, help_heading = "Measure")]
    pub two_pass: bool,
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

/// A planned launch, by what measures it.
enum Prediction {
    /// SNP's chain, also for a guest without protection.
    Launch(Box<Launch>),
    /// MRTD and RTMRs.
    Td(Box<Td>),
}

impl Subject {
    fn prediction(&self) -> Result<Prediction, Unpredictable> {
        let given = cli::merge(self.config.clone(), self.file.as_deref())?;
        let tdvf = self.ovmf.payload == Some(PayloadName::Tdvf);
        match given.platform {
            Some(PlatformName::Tdx) => Ok(Prediction::Td(Td::plan(self, given)?.into())),
            Some(PlatformName::Auto) | None if tdvf => Ok(Prediction::Td(Td::plan(self, given)?.into())),
            _ => Ok(Prediction::Launch(Launch::plan(self, given)?.into())),
        }
    }
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
    /// Options of TDX.
    #[error(transparent)]
    Tdx(#[from] TdxOptionError),
    /// What only an SNP launch has was asked of a TD.
    #[error(
        "platform tdx: only SNP has ID blocks; a TD is approved by its MRTD, see cvmm measure --platform tdx"
    )]
    NotSnp,
    /// MRTD of several vCPU counts.
    #[error("--table: MRTD does not depend on the number of virtual CPUs; leave it out")]
    Table,
    /// An option for registers that no MRTD measures.
    #[error("{flag}: registers have no part in MRTD; leave it out")]
    NoRegisters {
        /// The flag.
        flag: &'static str,
    },
    /// `--payload ovmf --platform tdx`.
    #[error("payload ovmf: that is an image as SNP launches it; give --payload tdvf for a TD")]
    OvmfAsTd,
    /// `--payload tdvf` and another platform.
    #[error("payload tdvf: such an image is a TD's; give --platform tdx")]
    TdvfElsewhere,
    /// A kernel beside a firmware image of a TD.
    #[error(
        "kernel: no part of a TDVF image's MRTD (the firmware measures it at run time); \
         leave out --kernel, --initrd and --cmdline"
    )]
    TdvfKernel,
    /// `--two-pass` and another platform.
    #[error("--two-pass: only a TD has two possible orders; give --platform tdx, or leave it out")]
    OneOrder,
    /// A TD and something else.
    #[error("diff: a TD and another guest have nothing to compare; give both the same platform")]
    Unlike,
    /// What goes with a kernel, without one.
    #[error(
        "{what}: without a kernel no launch of a firmware image measures it; add --kernel PATH, or leave it out"
    )]
    NoKernel {
        /// What was given.
        what: &'static str,
    },
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
    /// The firmware image of a TD.
    #[error("firmware {}: {cause}", path.display())]
    Tdvf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: TdvfError,
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
            | Self::Tdx(_)
            | Self::NotSnp
            | Self::Table
            | Self::NoRegisters { .. }
            | Self::OvmfAsTd
            | Self::TdvfElsewhere
            | Self::TdvfKernel
            | Self::OneOrder
            | Self::Unlike
            | Self::Tdvf { .. }
            | Self::NoKernel { .. }
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
    let launch = match subject.prediction()? {
        Prediction::Launch(launch) => launch,
        Prediction::Td(_) if args.table.is_some() => return Err(Unpredictable::Table),
        Prediction::Td(td) => {
            let text = if args.json {
                td::json(&td, args.explain)?
            } else if args.explain {
                td::explain(&td)?
            } else {
                td::text(&td)?
            };
            say(&text)?;
            return Ok(ExitClass::Success);
        }
    };
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
