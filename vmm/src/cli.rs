//! The command line: what it means, and what each command does.

use std::fmt::Write as _;
use std::panic::{self, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::process;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use devices::console::restore_terminal;

use crate::config::{Config, ConfigError, PlatformName};
use crate::doctor;
use crate::ending::{Ending, ExitClass, RunError, exit_code_table};
use crate::events::{Event, Events, EventsError};
use crate::id_block;
use crate::measure::{self, Unpredictable};
use crate::quote;
use crate::report;
use crate::signals::Signals;
use crate::sink::{self, Level};
use crate::spec::host::HostFacts;
use crate::spec::{MachineSpec, SpecError, output};

const EXAMPLES: &str = "\
Examples:
  Boot this host's kernel without protection, with its console in this terminal (Ctrl-A x ends it):
    cvmm run --platform soft --kernel /boot/vmlinuz-$(uname -r) --initrd /boot/initrd.img-$(uname -r)

  A guest with two processors, a disk, a network card and a socket to the host, protected by SEV-SNP:
    ip tuntap add tap0 mode tap && ip link set tap0 up
    cvmm run --platform snp --cpus 2 --memory 2G --kernel vmlinuz --initrd initrd.img \\
        --cmdline 'console=ttyS0 root=/dev/vda1' --disk disk.img --net tap=tap0 \\
        --vsock cid=3,uds=/run/guest.vsock --rng

  Keep the flags as a file, and change one thing:
    cvmm run --kernel vmlinuz --memory 1G --print-config > guest.json
    cvmm run --config guest.json --memory 2G

Signals: the first SIGTERM or SIGINT asks the guest to power off, the second ends it at once.
";

const MEASURE_EXAMPLES: &str = "\
Examples:
  The digest of a guest, and those of the same guest with 1 to 8 processors:
    cvmm measure --kernel vmlinuz --initrd initrd.img --cpus 2
    cvmm measure --config guest.json --table 8

  What the digest is made of, and why two guests have different ones:
    cvmm measure --config guest.json --explain
    cvmm measure --diff guest.json other.json

  The digest of a guest that QEMU launches with OVMF, as sev-snp-measure computes it:
    cvmm measure --payload ovmf --firmware OVMF.amdsev.fd --vcpu-type EPYC-Genoa --cpus 4 --kernel vmlinuz

  MRTD and RTMRs of the same guest as a trust domain, and MRTD of a TDVF or td-shim image:
    cvmm measure --platform tdx --kernel vmlinuz --initrd initrd.img
    cvmm measure --payload tdvf --firmware OVMF.inteltdx.ms.fd

On SNP the digest depends on kernel, initrd, command line, processors, platform, --debug-swap and --secure-tsc; on
nothing else. Policy, HOST_DATA and the ID block stand in the report by themselves.

On TDX, MRTD depends on kernel, initrd and command line alone: not on the number of processors, their features or the
TD's attributes, which stand in the report by themselves. The shim extends RTMR1 by kernel and initrd and RTMR2 by the
command line; RTMR0 and RTMR3 stay zero until the guest extends them. --platform auto means SNP here.
";

const ID_BLOCK_EXAMPLES: &str = "\
Examples:
  Approve the guest of a configuration, and launch it:
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out id-key.pem
    cvmm id-block --config guest.json --id-key id-key.pem --id-block id-block.bin --id-auth id-auth.bin
    cvmm run --config guest.json --id-block id-block.bin --id-auth id-auth.bin
";

const REPORT_EXAMPLES: &str = "\
Examples:
  A report and the host's certificates, as a guest finds them below /sys/kernel/config/tsm/report/NAME:
    cvmm report outblob --certs auxblob --measurement $(cvmm measure --config guest.json) --report-data 5f3c...

  A guest that was launched on the emulated host of scripts/rig, which has a root of its own:
    cvmm report outblob --certs auxblob --ark $(scripts/rig certs)/ark.pem
";

const QUOTE_EXAMPLES: &str = "\
Examples:
  A quote, as a TDX guest finds it below /sys/kernel/config/tsm/report/NAME, of the guest that was predicted:
    cvmm measure --platform tdx --config guest.json --json > predicted.json
    cvmm quote outblob --collateral collateral.json --measure-json predicted.json --report-data 5f3c...

  What a quote states, and whether it was changed, without knowing who made it (exit code 40):
    cvmm quote outblob
";

/// Launches confidential virtual machines (AMD SEV-SNP, Intel TDX) on Linux and KVM.
///
/// cvmm boots the unmodified kernel of a distribution in a guest whose memory this host cannot read, measured by a
/// boot shim of a few pages. Begin with `cvmm doctor`, which says what this host can do.
#[derive(Parser, Debug)]
#[command(name = "cvmm", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "`cvmm run --help` shows every flag, with examples and exit codes.")]
pub struct Cli {
    /// How much to log on standard error
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        default_value = "warn",
        help_heading = "Supervision"
    )]
    log_level: Level,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Launch a guest and stay until it ends
    ///
    /// Every value is checked before anything is created. Flags are laid over the file given by --config.
    #[command(after_long_help = format!("{EXAMPLES}\n{}", exit_code_table()))]
    Run(Box<RunArgs>),
    /// Predict the launch digest of a guest, as its attestation report will state it
    ///
    /// Takes the flags or the file of `cvmm run`, reads kernel and initrd once, and needs neither KVM nor SNP or TDX.
    #[command(after_long_help = MEASURE_EXAMPLES)]
    Measure(Box<measure::Args>),
    /// Approve one launch: make the ID block and its signatures, which `cvmm run` gives to firmware
    ///
    /// Takes the flags or the file of `cvmm run`; --id-block and --id-auth name the files that are written. Firmware
    /// then refuses every other launch digest and policy, and reports state the digests of the keys.
    #[command(after_long_help = ID_BLOCK_EXAMPLES)]
    IdBlock(Box<id_block::Args>),
    /// Read and verify an attestation report
    ///
    /// Prints a line for each check, and what the report states. The exit code is 0 only if every check passes, and 40
    /// if one fails.
    #[command(after_long_help = REPORT_EXAMPLES)]
    Report(Box<report::Args>),
    /// Read and verify an attestation quote of a TDX guest
    ///
    /// Prints a line for each check, and what the quote states. The exit code is 0 only if every check passes, and 40
    /// if one fails or if there is no collateral to verify the signer with.
    #[command(after_long_help = QUOTE_EXAMPLES)]
    Quote(Box<quote::Args>),
    /// Say what this host can do, what is missing, and how to mend it
    Doctor(doctor::Args),
}

#[derive(Args, Debug)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct RunArgs {
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub config: Config,
    /// Read a configuration first: JSON, as --print-config prints it
    #[arg(
        long = "config",
        id = "file",
        value_name = "FILE.json",
        help_heading = "Configuration"
    )]
    pub file: Option<PathBuf>,
    /// Print what the flags mean as JSON, and exit without touching the host
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,
}

/// Why a command failed before or while a machine ran.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Events(#[from] EventsError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Measure(#[from] Unpredictable),
    #[error(transparent)]
    IdBlock(#[from] id_block::Unsigned),
    #[error(transparent)]
    Report(#[from] report::Unreadable),
    #[error(transparent)]
    Quote(#[from] quote::Unreadable),
}

impl Failure {
    fn class(&self) -> ExitClass {
        match self {
            Self::Config(_) | Self::Events(_) => ExitClass::Usage,
            Self::Spec(e) => e.class(),
            Self::Run(e) => e.class(),
            Self::Measure(e) => e.class(),
            Self::IdBlock(e) => e.class(),
            Self::Report(e) => e.class(),
            Self::Quote(e) => e.class(),
        }
    }
}

/// Runs the process's command line and returns the exit code. `launch` runs a machine to its end.
pub fn main(launch: impl FnOnce(MachineSpec, Events, Signals) -> Result<Ending, RunError>) -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return misused(&e),
    };
    panic::set_hook(Box::new(report_panic));
    sink::install(cli.log_level);
    match cli.command {
        Command::Run(args) => run(*args, launch),
        Command::Measure(args) => close(measure::run(&args)),
        Command::IdBlock(args) => close(id_block::run(&args)),
        Command::Report(args) => close(report::run(&args)),
        Command::Quote(args) => close(quote::run(&args)),
        Command::Doctor(args) => doctor::run(&args),
    }
}

/// Help goes where it was asked for; a mistake is told in one line, as every other is.
fn misused(error: &clap::Error) -> u8 {
    if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprintln!(
            "cvmm: {}; see --help",
            first_paragraphs(&error.render().to_string())
        );
    } else {
        let _ = error.print();
    }
    u8::try_from(error.exit_code()).unwrap_or(ExitClass::Usage as u8)
}

/// What clap says of a mistake before it comes to usage and help, in one line.
fn first_paragraphs(text: &str) -> String {
    let is_said = |line: &&str| !line.starts_with("Usage:") && !line.starts_with("For more information");
    let words = text.lines().take_while(is_said).flat_map(str::split_whitespace);
    let line = words.collect::<Vec<_>>().join(" ").replace(" tip: ", "; ");
    line.trim_start_matches("error: ").to_owned()
}

fn run(args: RunArgs, launch: impl FnOnce(MachineSpec, Events, Signals) -> Result<Ending, RunError>) -> u8 {
    let config = match merge(args.config, args.file.as_deref()) {
        Ok(config) => config.with_defaults(),
        Err(e) => return complain(&e.into()),
    };
    if args.print_config {
        return print(&config);
    }
    if let Err(e) = output::check(&config, args.file.as_deref()) {
        return complain(&SpecError::from(e).into());
    }
    let events = match Events::open(&config.notify) {
        Ok(events) => events,
        Err(e) => return complain(&e.into()),
    };
    let code = match start(config, &events, launch) {
        Ok(ending) => {
            log::info!("{ending}");
            if let Some(event) = Event::of_ending(&ending) {
                events.emit(&event);
            }
            if !matches!(ending, Ending::PowerOff) {
                eprintln!("cvmm: {ending}");
            }
            ending.exit_code()
        }
        Err(e) => {
            let code = complain(&e);
            let message = sentence(&e);
            events.emit(&Event::Error { message, code });
            code
        }
    };
    events.emit(&Event::Stopped { code });
    events.finish();
    code
}

/// The exit code of a command that runs no machine.
fn close(result: Result<ExitClass, impl Into<Failure>>) -> u8 {
    match result {
        Ok(class) => class as u8,
        Err(e) => complain(&e.into()),
    }
}

/// `flags` laid over the file, if there is one; without defaults.
pub(crate) fn merge(flags: Config, file: Option<&Path>) -> Result<Config, ConfigError> {
    match file {
        Some(path) => Ok(Config::load(path)?.overlaid(flags)),
        None => Ok(flags),
    }
}

fn print(config: &Config) -> u8 {
    let json = match serde_json::to_string_pretty(config) {
        Ok(json) => json,
        Err(e) => {
            eprintln!("cvmm: print-config: {e}, which JSON cannot hold; rename the file");
            return ExitClass::Usage as u8;
        }
    };
    match measure::say(&json) {
        Ok(()) => ExitClass::Success as u8,
        Err(e) => {
            eprintln!("cvmm: printing the configuration: {e}");
            ExitClass::HostFailed as u8
        }
    }
}

fn start(
    config: Config,
    events: &Events,
    launch: impl FnOnce(MachineSpec, Events, Signals) -> Result<Ending, RunError>,
) -> Result<Ending, Failure> {
    // Before any thread exists, so that no thread takes the signals.
    let signals = Signals::catch().map_err(RunError::host("catching signals"))?;
    let facts = HostFacts::probe(config.platform.unwrap_or(PlatformName::Auto));
    let spec = MachineSpec::resolve(config, facts)?;
    let terminal = spec.parts().devices.console.terminal_path();
    let console = terminal.map(|path| path.display().to_string());
    if let Some(path) = &console {
        eprintln!("cvmm: console on {path}");
    }
    events.emit(&Event::Started {
        pid: process::id(),
        platform: spec.parts().platform.name(),
        console,
    });
    Ok(launch(spec, events.clone(), signals)?)
}

/// Whatever thread it is, a mistake of cvmm's ends the process with its own exit code and a terminal that works.
fn report_panic(info: &PanicHookInfo<'_>) {
    restore_terminal();
    let text = info.to_string().replace('\n', " ");
    eprintln!("cvmm: internal error: {text}; please report it");
    process::exit(i32::from(ExitClass::Internal as u8));
}

/// Prints the failure in one line and returns its exit code.
fn complain(failure: &Failure) -> u8 {
    eprintln!("cvmm: {}", sentence(failure));
    failure.class() as u8
}

/// An error with its causes, in one line.
fn sentence(failure: &Failure) -> String {
    let mut text = failure.to_string();
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}
