//! Builds a machine from a checked specification, runs it, and takes it down again.
//!
//! A reboot is a new VM from the same specification: no platform can return a VM to its state before launch.

mod build;
mod devices;
mod event_thread;
mod inbox;
mod run;
mod threads;
mod wires;

use std::io;
use std::path::Path;

use ::devices::virtio::vsock::Vsock;
use arch::kvm::system::Host;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::ending::{Ending, RunError};
use crate::events::{Event, Events};
use crate::plan::Payload;
use crate::sandbox::Sandbox;
use crate::signals::Signals;
use crate::spec::{MachineSpec, VsockSpec};
use run::World;

/// Runs a machine until its guest powers off, ends itself or crashes, or a signal ends it. Reboots happen inside.
///
/// # Errors
/// The host or the platform cannot go on; nothing of the machine is left then.
pub fn run(spec: MachineSpec, events: Events, mut signals: Signals) -> Result<Ending, RunError> {
    raise_descriptor_limit();
    let parts = spec.into_parts();
    let host = Host::open(Path::new("/dev/kvm")).map_err(RunError::host("opening /dev/kvm"))?;
    let payload = Payload::of(parts.machine, &parts.payload)
        .map_err(|e| RunError::host(format!("reading {}", e.path.display()))(e.source))?;
    let vsock = parts.devices.vsock.as_ref().map(open_vsock).transpose()?;
    // From here on every life of the machine is built under the same rules, the first and those after a reboot.
    let sandbox = Sandbox::enter(&parts.confine)?;
    events.emit(&sandbox.event());
    loop {
        let mut world = World {
            host: &host,
            parts: &parts,
            payload: &payload,
            events: &events,
            signals: &mut signals,
            vsock: vsock.as_ref(),
            sandbox: &sandbox,
        };
        let ending = run::live(&mut world)?;
        if ending == Ending::Reboot {
            events.emit(&Event::GuestReboot);
        }
        if let Some(ending) = last(ending, parts.reboots, signals.asked()) {
            return Ok(ending);
        }
    }
}

/// Takes all the descriptors that the host allows. The usual soft limit is 1,024, for programs that use select(2), and a
/// guest's vsock connections alone may be as many; what its disks and interrupts need later would not be had.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log::warn!("the limit of open files stays as it is: {e}");
    }
}

/// What the machine comes to after a life that ended so; `None` is another life. Whoever has asked for the machine's end
/// gets it when the guest reboots, too: it may have begun to before it could see the power button.
fn last(ending: Ending, reboots: bool, asked: bool) -> Option<Ending> {
    match ending {
        Ending::Reboot if asked => Some(Ending::PowerOff),
        Ending::Reboot if reboots => None,
        Ending::Reboot
        | Ending::PowerOff
        | Ending::Terminated(_)
        | Ending::Crashed(_)
        | Ending::Forced(_) => Some(ending),
    }
}

/// The socket is bound once: whoever connects while the guest reboots waits instead of being refused.
fn open_vsock(spec: &VsockSpec) -> Result<Vsock, RunError> {
    Vsock::open(spec.cid.into(), &spec.uds).map_err(|e| RunError::host("opening vsock")(io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_reboots_when_it_was_asked_to_go_has_no_further_life() {
        let cases = [
            (Ending::Reboot, true, false, None),
            (Ending::Reboot, false, false, Some(Ending::Reboot)),
            (Ending::Reboot, true, true, Some(Ending::PowerOff)),
            (Ending::Reboot, false, true, Some(Ending::PowerOff)),
            (Ending::PowerOff, true, true, Some(Ending::PowerOff)),
            (Ending::Forced(15), true, true, Some(Ending::Forced(15))),
        ];
        for (ending, reboots, asked, expected) in cases {
            assert_eq!(last(ending, reboots, asked), expected);
        }
    }

    #[test]
    fn a_machine_has_all_the_descriptors_that_the_host_allows() {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum.map(|most| most - 1);
        setrlimit(Resource::Nofile, limit).unwrap();
        raise_descriptor_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, limit.maximum);
    }
}
