//! One life of a machine: from launch to power-off, reboot or failure.

use std::io;
use std::sync::{Arc, Mutex};

use arch::kvm::system::Host;
use devices::bus::Bus;
use devices::power::{self, PowerEvent, PowerPorts};
use devices::serial::{self, Serial, SerialLine};
use shim::reason::Reason;

use super::build::{Ground, step};
use super::inbox::{Inbox, Note};
use super::threads::VcpuThreads;
use super::{MachineError, Parts};
use crate::event_loop::EventLoop;
use crate::plan;
use crate::platform;
use crate::staging::{Content, Staging};
use crate::vcpu::{Services, VcpuEnd};

/// How one life of a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    Off,
    /// The guest wants to start anew.
    Reboot,
    /// The guest triple-faulted.
    Crashed,
    /// The guest, or the shim in it, refused to go on; the reason in words.
    Terminated(String),
}

/// Launches the machine, runs it, and takes it down.
pub(super) fn live(host: &Host, parts: &Parts, line: Box<dyn SerialLine>) -> Result<Outcome, MachineError> {
    let platform = platform::open(parts.kind);
    let ground = Ground::lay(host, platform.as_ref(), parts.memory_bytes, parts.cpus)?;
    let launch = platform.begin(ground.foundation())?;
    let content = Content {
        kernel: parts
            .kernel
            .try_clone()
            .map_err(step("opening the kernel again"))?,
        initrd: parts
            .initrd
            .as_ref()
            .map(|f| f.try_clone())
            .transpose()
            .map_err(step("opening the initrd again"))?,
        vcpus: parts.cpus,
        ram: crate::ram::ranges(parts.memory_bytes).map_err(|e| step("placing RAM")(io::Error::other(e)))?,
    };
    let staging =
        Staging::place(Arc::clone(&ground.vm), content).map_err(step("staging kernel and initrd"))?;
    let mut vcpus = ground.vcpus(parts.cpus)?;
    let mut plan = plan::machine_v1(platform::mode(parts.kind), &parts.payload, parts.cpus)?;
    if !crate::cpuid::has_gib_pages(&ground.cpuid) {
        plan::without_gib_pages(&mut plan).map_err(|e| step("placing page tables")(io::Error::other(e)))?;
    }
    let sealed = plan.apply(launch, &mut vcpus)?;

    let inbox = Inbox::new().map_err(step("making the main thread's inbox"))?;
    let mut ports = Bus::default();
    let to_main = inbox.address().map_err(step("making the main thread's inbox"))?;
    let power = PowerPorts::new(Box::new(move |event| to_main.send(Note::Power(event))));
    let conflict = |e| step("placing devices")(io::Error::other(e));
    ports
        .attach(power::PORT, power::PORTS, Box::new(power))
        .map_err(conflict)?;
    ports
        .attach(serial::PORT, serial::PORTS, Box::new(Serial::new(line)))
        .map_err(conflict)?;
    let services = Services {
        ports,
        mmio: Bus::default(),
        ram: Arc::clone(&ground.ram),
        platform: sealed,
    };

    let mut event_loop = EventLoop::new().map_err(step("making the event loop"))?;
    event_loop
        .add(inbox.fd(), Box::new(|_| ()))
        .map_err(step("making the event loop"))?;
    let addresses = (0..parts.cpus)
        .map(|_| inbox.address())
        .collect::<io::Result<_>>();
    let addresses = addresses.map_err(step("making the main thread's inbox"))?;
    let _threads =
        VcpuThreads::start(vcpus, Arc::new(services), addresses).map_err(step("starting vCPU threads"))?;
    attend(&mut event_loop, &inbox, &Mutex::new(staging))
}

/// Serves events until the machine ends.
fn attend(
    event_loop: &mut EventLoop,
    inbox: &Inbox,
    staging: &Mutex<Staging>,
) -> Result<Outcome, MachineError> {
    loop {
        event_loop.turn(-1).map_err(step("waiting for events"))?;
        while let Some(note) = inbox.take() {
            match note {
                Note::Power(PowerEvent::Off) => return Ok(Outcome::Off),
                Note::Power(PowerEvent::Reboot) => return Ok(Outcome::Reboot),
                Note::Power(PowerEvent::ShimTerminated(code)) => {
                    return Ok(Outcome::Terminated(shim_words(code)));
                }
                Note::Power(PowerEvent::ReleaseStaging) => {
                    if let Ok(mut staging) = staging.lock() {
                        staging.release().map_err(step("releasing the staging area"))?;
                    }
                }
                Note::VcpuEnded(VcpuEnd::Stopped) | Note::DeviceBroken(..) => {}
                Note::VcpuEnded(VcpuEnd::Crashed) => return Ok(Outcome::Crashed),
                Note::VcpuEnded(VcpuEnd::Terminated(why)) => return Ok(Outcome::Terminated(why)),
                Note::VcpuEnded(VcpuEnd::Failed(e)) => return Err(e.into()),
            }
        }
    }
}

/// The shim's reason in words.
fn shim_words(code: u32) -> String {
    match u8::try_from(code).ok().and_then(Reason::from_code) {
        Some(reason) => format!("the boot shim stopped: {reason}"),
        None => format!("the boot shim stopped for a reason that this cvmm does not know, {code:#x}"),
    }
}
