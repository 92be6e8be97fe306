//! Builds a machine from a checked specification, runs it, and takes it down again.
//!
//! A reboot is a new VM from the same specification: no platform can return a VM to its state before launch.

mod build;
mod devices;
mod inbox;
mod run;
mod threads;
mod wires;

use std::path::Path;

use arch::kvm::system::Host;
use shim::config::Blob;

use crate::ending::{Ending, RunError};
use crate::events::{Event, Events};
use crate::plan::{self, Payload};
use crate::signals::Signals;
use crate::spec::file::InputFile;
use crate::spec::{MachineSpec, payload};
use run::World;

/// Runs a machine until its guest powers off, ends itself or crashes, or a signal ends it. Reboots happen inside.
///
/// # Errors
/// The host or the platform cannot go on; nothing of the machine is left then.
pub fn run(spec: MachineSpec, events: Events, mut signals: Signals) -> Result<Ending, RunError> {
    let parts = spec.into_parts();
    let host = Host::open(Path::new("/dev/kvm")).map_err(RunError::host("opening /dev/kvm"))?;
    let payload = measured(&parts.payload)?;
    loop {
        let mut world = World {
            host: &host,
            parts: &parts,
            payload: &payload,
            events: &events,
            signals: &mut signals,
        };
        let ending = run::live(&mut world)?;
        if ending != Ending::Reboot {
            return Ok(ending);
        }
        events.emit(&Event::GuestReboot);
        if !parts.reboots {
            return Ok(ending);
        }
    }
}

/// The payload as the measured parameters name it.
fn measured(files: &payload::Payload) -> Result<Payload, RunError> {
    const NO_FILE: Blob = Blob {
        len: 0,
        sha256: [0; 32],
    };
    let hash = |input: &InputFile| {
        let doing = format!("reading {}", input.path.display());
        plan::blob(&input.file).map_err(RunError::host(doing))
    };
    Ok(Payload {
        kernel: hash(&files.kernel)?,
        initrd: files.initrd.as_ref().map_or(Ok(NO_FILE), hash)?,
        cmdline: files.cmdline.clone(),
    })
}
