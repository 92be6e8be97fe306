//! What the user asks for: one model that the command line and `--config FILE.json` both fill in. Nothing here
//! touches the host; `crate::spec` turns a `Config` into a checked machine.

mod blob;
mod confine;
mod net;
mod object;
mod rates;
mod snp;
mod tdx;
mod text;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

pub use blob::{Blob, Blob32, Blob48};
pub use confine::{Account, Confine, Switch};
pub use net::{Backend, Mac, Net};
pub use rates::Rates;
pub use snp::{Policy, Snp};
pub use tdx::{Attributes, QuoteService, Tdx};
pub use text::{BadValue, Console, Disk, EventSink, Size, Vsock};

use crate::spec::file::{describe, open_at_once};
use object::{object, objects, optional};

/// Everything about one machine. An absent field means its default, which [`Config::with_defaults`] fills in.
#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub boot: Boot,
    /// Memory of the guest: bytes, or with the suffix K, M, G or T; a multiple of 2M from 64M to 440G [default: 512M]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Number of virtual CPUs, 1 to 256 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// What protects the guest from this host. `auto` takes snp or tdx, whichever the host has, and never
    /// falls back to soft, which protects nothing [default: auto]
    #[arg(long, value_name = "NAME", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformName>,
    /// Version of the virtual machine's layout, part of what is measured [default: v2]
    #[arg(long, value_name = "VERSION", help_heading = "Machine")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineVersion>,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub devices: Devices,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub snp: Snp,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub tdx: Tdx,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub notify: Notify,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default", deserialize_with = "object")]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub confine: Confine,
}

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Boot")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Boot {
    /// Linux kernel (bzImage) as distributions ship it, for example /boot/vmlinuz-6.12.0-1-amd64
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of the guest
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, at most 2047 bytes [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Devices")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Devices {
    /// Disk: a raw image or a block device; repeat for more. `ro` lets the guest only read it; `bandwidth` (bytes) and
    /// `operations` are most per second, after a burst of one second's worth
    #[arg(
        long = "disk",
        value_name = "PATH[,ro][,queues=N][,bandwidth=SIZE][,operations=N]"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "objects")]
    pub disks: Vec<Disk>,
    /// Network card on an existing tap, an inherited tap descriptor, or passt's socket; repeat for more. Rates as for
    /// disks: rx-bandwidth, rx-operations (what the guest receives), tx-bandwidth, tx-operations
    #[arg(
        long = "net",
        value_name = "tap=NAME|fd=N|passt=PATH[,mac=MAC][,queues=N][,RATE=N]..."
    )]
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "objects")]
    pub nets: Vec<Net>,
    /// Sockets between host and guest: `uds` is the Unix socket on which the host says `CONNECT PORT`
    #[arg(long, value_name = "cid=N,uds=PATH")]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional")]
    pub vsock: Option<Vsock>,
    /// Give the guest the host's random numbers
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub rng: bool,
    /// Where the guest's console goes [default: stdio]
    #[arg(long, value_name = "stdio|pty|file=PATH|socket=PATH|none")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
}

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Supervision")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Notify {
    /// Write what happens to the machine as JSON lines to a file, a FIFO, a Unix socket that somebody listens on, or an
    /// inherited descriptor
    #[arg(long, value_name = "PATH|fd:N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<EventSink>,
    /// End with exit code 10 when the guest reboots, instead of starting it anew
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub no_reboot: bool,
    /// Inherited descriptor that gets the line READY=1 when the guest begins to run
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_fd: Option<u32>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_false(value: &bool) -> bool {
    !*value
}

/// Platform as the user names it.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum PlatformName {
    /// snp or tdx, whichever the host has
    Auto,
    /// The same machine without any protection from the host, for development
    Soft,
    /// AMD SEV-SNP
    Snp,
    /// Intel TDX
    Tdx,
}

/// Frozen layouts of the virtual machine.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum MachineVersion {
    /// The first one; its shim does not keep a host's cache lines out of pages of 2 MiB (CVE-2025-38560)
    V1,
    /// The newest one
    #[default]
    V2,
}

impl fmt::Display for MachineVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be opened or read.
    #[error("config {}: {cause}; check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// It is a FIFO, a directory or the like.
    #[error("config {}: is a {found}; give a file, or /dev/stdin", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It is longer than any configuration can be.
    #[error("config {}: longer than 1 MiB; give the JSON that `cvmm run --print-config` prints", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is no JSON, or not of this shape.
    #[error("config {}: {cause}; `cvmm run --print-config` shows the format", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        cause: serde_json::Error,
    },
}

/// Longest configuration file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Opens what a configuration is read from: a file, or what the caller left open for it, as a shell does for `<(…)` and
/// for /dev/stdin. Anything else comes back with what it is: a FIFO by name could wait for its writer for ever.
fn open(path: &Path) -> io::Result<(File, Option<&'static str>)> {
    let file = open_at_once(path)?;
    let metadata = file.metadata()?;
    let pipe = rustix::fs::fstatfs(&file)?.f_type == PIPEFS_MAGIC;
    let stdin = rustix::fs::fstat(io::stdin())
        .is_ok_and(|stdin| (stdin.st_dev, stdin.st_ino) == (metadata.dev(), metadata.ino()));
    if pipe || stdin {
        // The writer is there already, and may take its time.
        rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    }
    let good = metadata.is_file() || pipe || stdin;
    Ok((file, (!good).then(|| describe(metadata.file_type()))))
}

/// File system of pipes without a name (Linux, include/uapi/linux/magic.h).
const PIPEFS_MAGIC: i64 = 0x5049_5045;

impl Config {
    /// Reads a JSON file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |cause| ConfigError::Unreadable {
            path: path.into(),
            cause,
        };
        let mut text = Vec::new();
        let (file, kind) = open(path).map_err(unreadable)?;
        if let Some(found) = kind {
            let path = path.into();
            return Err(ConfigError::NotAFile { path, found });
        }
        file.take(MAX_BYTES.saturating_add(1))
            .read_to_end(&mut text)
            .map_err(unreadable)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(ConfigError::TooLong { path: path.into() });
        }
        Self::parse(&text).map_err(|cause| ConfigError::Malformed {
            path: path.into(),
            cause,
        })
    }

    fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut from = serde_json::Deserializer::from_slice(json);
        let config = object(&mut from)?;
        from.end()?;
        Ok(config)
    }

    /// Lays `flags` over this configuration: single values replace, lists grow.
    #[must_use]
    pub fn overlaid(mut self, flags: Self) -> Self {
        self.devices.disks.extend(flags.devices.disks);
        self.devices.nets.extend(flags.devices.nets);
        Self {
            boot: Boot {
                kernel: flags.boot.kernel.or(self.boot.kernel),
                initrd: flags.boot.initrd.or(self.boot.initrd),
                cmdline: flags.boot.cmdline.or(self.boot.cmdline),
            },
            memory: flags.memory.or(self.memory),
            cpus: flags.cpus.or(self.cpus),
            platform: flags.platform.or(self.platform),
            machine: flags.machine.or(self.machine),
            devices: Devices {
                vsock: flags.devices.vsock.or(self.devices.vsock),
                rng: flags.devices.rng || self.devices.rng,
                console: flags.devices.console.or(self.devices.console),
                ..self.devices
            },
            snp: self.snp.overlaid(flags.snp),
            tdx: self.tdx.overlaid(flags.tdx),
            confine: self.confine.overlaid(flags.confine),
            notify: Notify {
                events: flags.notify.events.or(self.notify.events),
                no_reboot: flags.notify.no_reboot || self.notify.no_reboot,
                ready_fd: flags.notify.ready_fd.or(self.notify.ready_fd),
            },
        }
    }

    /// The same configuration with every default written out.
    #[must_use]
    pub fn with_defaults(self) -> Self {
        let defaults = Self {
            boot: Boot {
                cmdline: Some("console=ttyS0".into()),
                ..Boot::default()
            },
            memory: Some(Size(512 << 20)),
            cpus: Some(1),
            platform: Some(PlatformName::Auto),
            machine: Some(MachineVersion::default()),
            devices: Devices {
                console: Some(Console::Stdio),
                ..Devices::default()
            },
            confine: Confine {
                sandbox: Some(Switch::On),
                ..Confine::default()
            },
            ..Self::default()
        };
        defaults.overlaid(self)
    }
}

#[cfg(test)]
mod tests;
