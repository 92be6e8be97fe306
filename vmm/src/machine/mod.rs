//! Builds a machine from a checked specification, runs it, and takes it down again.
//!
//! A reboot is a new VM from the same specification: no platform can return a VM to its state before launch.

mod build;
mod inbox;
pub mod run;
mod threads;

use std::io;

use arch::platform::PlatformError;

use crate::plan::PlanError;
use crate::vcpu::VcpuError;

/// Why a machine could not be built or go on. Nothing in here is a guest's doing.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The launch plan cannot be built.
    #[error("building the launch plan")]
    Plan(#[from] PlanError),
    /// The platform refused a step of the launch.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// A vCPU cannot go on.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Interim: what a machine is made of.
#[derive(Debug)]
pub struct Parts {
    /// Platform.
    pub kind: crate::platform::Kind,
    /// Kernel.
    pub kernel: std::fs::File,
    /// Initrd.
    pub initrd: Option<std::fs::File>,
    /// Payload.
    pub payload: crate::plan::Payload,
    /// Memory.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u32,
}

/// Interim.
pub fn run(parts: &Parts, line: Box<dyn devices::serial::SerialLine>) -> Result<run::Outcome, MachineError> {
    let host = arch::kvm::system::Host::open(std::path::Path::new("/dev/kvm"))
        .map_err(build::step("opening /dev/kvm"))?;
    run::live(&host, parts, line)
}
