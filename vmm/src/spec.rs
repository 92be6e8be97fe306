//! From what the user asks for to a machine that can be built: every size, file, socket and descriptor is checked
//! before anything is created, and what was checked stays open, so that nothing can change in between.

pub mod bzimage;
pub mod confine;
mod console;
pub mod disk;
pub mod file;
pub mod host;
pub mod inherited;
pub mod net;
pub mod output;
pub mod payload;
pub mod size;
pub mod snp;
pub mod socket;
pub mod tdx;

use std::path::PathBuf;

use devices::console::{Console as HostConsole, ConsoleError};

use disk::{DiskError, DiskSpec};
use host::{Chosen, HostFacts, HostLack};
use net::{NetError, NetSpec};
use output::OutputError;
use payload::{Payload, PayloadError};
use size::SizeError;
use snp::{SnpOptionError, SnpSpec};
use socket::SocketError;
use tdx::{TdxOptionError, TdxSpec};

use crate::config::{Config, Console, Devices, MachineVersion, PlatformName, Size, Vsock};
use crate::ending::ExitClass;
use crate::sandbox::Plan;

/// A checked machine. Only [`MachineSpec::resolve`] makes one, so holding it proves that it is valid.
#[derive(Debug)]
pub struct MachineSpec(Parts);

/// The contents of a [`MachineSpec`].
#[derive(Debug)]
pub struct Parts {
    /// What protects the guest, once `auto` is decided.
    pub platform: PlatformSpec,
    /// Frozen layout that it has.
    pub machine: MachineVersion,
    /// Guest memory: a multiple of 2 MiB, 64 MiB to 440 GiB.
    pub memory_bytes: u64,
    /// Processors, 1 to 256 and no more than KVM can have.
    pub cpus: u32,
    /// Kernel, initrd and command line; they fit the memory.
    pub payload: Payload,
    /// Devices, at most 31.
    pub devices: DeviceSpecs,
    /// A reboot starts the machine anew instead of ending it.
    pub reboots: bool,
    /// What is given up before the guest runs.
    pub confine: Plan,
}

/// Platform with what only it needs.
#[derive(Debug)]
pub enum PlatformSpec {
    /// No protection.
    Soft,
    /// AMD SEV-SNP.
    Snp(SnpSpec),
    /// Intel TDX.
    Tdx(TdxSpec),
}

impl PlatformSpec {
    /// Name as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Snp(_) => "snp",
            Self::Tdx(_) => "tdx",
        }
    }
}

/// The devices of a machine.
#[derive(Debug)]
pub struct DeviceSpecs {
    /// In the order of their PCI slots.
    pub disks: Vec<DiskSpec>,
    /// In the order of their PCI slots.
    pub nets: Vec<NetSpec>,
    /// Sockets between host and guest.
    pub vsock: Option<VsockSpec>,
    /// Random numbers.
    pub rng: bool,
    /// The console's host side, open; a terminal is in raw mode while it lives.
    pub console: HostConsole,
    /// False if the guest gets no virtio console, because its output would go nowhere.
    pub has_console: bool,
}

/// Sockets between host and guest.
#[derive(Debug)]
pub struct VsockSpec {
    /// The guest's context id, 3 to 2^32 - 2.
    pub cid: u32,
    /// Where the host says `CONNECT PORT`. A guest's connection to port P goes to its path with `_P` appended.
    pub uds: PathBuf,
}

/// A machine that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Memory or processors.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A file to write that is another one already.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The console's file is none.
    #[error("console {}: is a {found}; give a file, or socket=PATH for a socket", path.display())]
    ConsoleFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Options of SNP.
    #[error(transparent)]
    Snp(#[from] SnpOptionError),
    /// Options of TDX.
    #[error(transparent)]
    Tdx(#[from] TdxOptionError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostLack),
    /// User or cgroup.
    #[error(transparent)]
    Confine(#[from] confine::ConfineError),
    /// The context id is reserved.
    #[error("vsock cid={cid}: reserved; give one from 3 to 4294967294")]
    Cid {
        /// Context id asked for.
        cid: u32,
    },
    /// Vsock and console share a path.
    #[error("console {path}: also the path of vsock; give another one")]
    SharedSocket {
        /// The path.
        path: String,
    },
    /// More devices than the PCI bus has slots.
    #[error("{devices} devices are more than the {MOST_DEVICES} of a machine; remove some")]
    Devices {
        /// Devices asked for.
        devices: usize,
    },
}

/// Slots of PCI bus 0 beside the host bridge.
const MOST_DEVICES: usize = 31;

impl SpecError {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        let busy = matches!(
            self,
            Self::Disk(DiskError::Busy { .. })
                | Self::Socket(SocketError::Busy { .. })
                | Self::Console(ConsoleError::InUse { .. })
        );
        if busy {
            ExitClass::Busy
        } else if matches!(self, Self::Host(_)) {
            ExitClass::HostLacks
        } else {
            ExitClass::Usage
        }
    }
}

impl MachineSpec {
    /// Checks `config`, absent fields meaning their defaults, against the host.
    ///
    /// # Errors
    /// The first thing that is wrong; nothing has been created then, and every lock is released.
    pub fn resolve(config: Config, facts: HostFacts) -> Result<Self, SpecError> {
        let config = config.with_defaults();
        let memory = config.memory.unwrap_or(Size(0));
        let memory_bytes = size::check_memory(memory, facts.memory_bytes)?;
        // A host without KVM has its own error below, after those that the user can mend in the command line.
        let most_cpus = facts.kvm.as_ref().map_or(u32::MAX, |kvm| kvm.max_vcpus);
        let cpus = size::check_cpus(config.cpus.unwrap_or(0), most_cpus)?;
        let payload = Payload::check(&config.boot, memory)?;
        let machine = config.machine.unwrap_or_default();
        let devices = CheckedDevices::check(&config.devices)?;
        let confine = confine::check(&config)?;
        facts.require_kvm()?;
        let platform = resolve_platform(&config, facts)?;
        if let (PlatformSpec::Snp(_), MachineVersion::V1) = (&platform, machine) {
            log::warn!(
                "--machine v1: its shim leaves out a part of the mitigation of CVE-2025-38560; use v2 unless the digest must stay"
            );
        }
        Ok(Self(Parts {
            platform,
            machine,
            memory_bytes,
            cpus,
            payload,
            devices: devices.open(config.devices)?,
            reboots: !config.notify.no_reboot,
            confine,
        }))
    }

    /// What it consists of.
    pub fn parts(&self) -> &Parts {
        &self.0
    }

    /// Takes it apart, to move files and sockets into devices.
    pub fn into_parts(self) -> Parts {
        self.0
    }
}

fn resolve_platform(config: &Config, facts: HostFacts) -> Result<PlatformSpec, SpecError> {
    let chosen = facts.choose(config.platform.unwrap_or(PlatformName::Auto))?;
    if !matches!(chosen, Chosen::Snp(_)) {
        snp::check_absent(&config.snp)?;
    }
    if !matches!(chosen, Chosen::Tdx) {
        tdx::check_absent(&config.tdx)?;
    }
    Ok(match chosen {
        Chosen::Soft => PlatformSpec::Soft,
        Chosen::Snp(host) => PlatformSpec::Snp(SnpSpec::check(&config.snp, &host)?),
        Chosen::Tdx => PlatformSpec::Tdx(TdxSpec::check(&config.tdx)?),
    })
}

/// Devices of which all is checked; disks are open and locked, but nothing has been created.
struct CheckedDevices {
    disks: Vec<DiskSpec>,
    nets: Vec<net::Checked>,
}

impl CheckedDevices {
    fn check(devices: &Devices) -> Result<Self, SpecError> {
        let console = devices.console.as_ref();
        let counts = [
            devices.disks.len(),
            devices.nets.len(),
            usize::from(devices.vsock.is_some()),
            usize::from(devices.rng),
            usize::from(console != Some(&Console::None)),
        ];
        let total = counts.iter().fold(0_usize, |sum, n| sum.saturating_add(*n));
        if total > MOST_DEVICES {
            return Err(SpecError::Devices { devices: total });
        }
        // Inherited descriptors first: files opened here must not take their numbers.
        let nets = net::check_all(&devices.nets)?;
        let disks = disk::check_all(&devices.disks)?;
        if let Some(Vsock { cid, uds }) = &devices.vsock {
            if !(3..u32::MAX).contains(cid) {
                return Err(SpecError::Cid { cid: *cid });
            }
            socket::check_free("vsock", uds)?;
            if let Some(Console::Socket(path) | Console::File(path)) = console
                && path == uds
            {
                let path = path.display().to_string();
                return Err(SpecError::SharedSocket { path });
            }
        }
        if let Some(console) = console {
            console::check(console)?;
        }
        Ok(Self { disks, nets })
    }

    fn open(self, devices: Devices) -> Result<DeviceSpecs, SpecError> {
        let console = devices.console.unwrap_or(Console::Stdio);
        let nets = self.nets.into_iter().map(net::Checked::open);
        Ok(DeviceSpecs {
            nets: nets.collect::<Result<_, _>>()?,
            vsock: devices.vsock.map(|Vsock { cid, uds }| VsockSpec { cid, uds }),
            disks: self.disks,
            rng: devices.rng,
            has_console: console != Console::None,
            // Last, because it may change the mode of the terminal.
            console: HostConsole::open(&console::device_spec(console))?,
        })
    }
}

#[cfg(test)]
mod tests;
