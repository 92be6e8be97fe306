//! One life of a machine: from launch to power-off, reboot or failure.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::kvm::system::Host;
use arch::kvm::vcpu::Vcpu;
use devices::power::PowerEvent;
use devices::virtio::vsock::Vsock;
use shim::layout;
use shim::reason::Reason;

use super::build::Ground;
use super::devices::Periphery;
use super::event_thread::EventThread;
use super::inbox::{Inbox, Note};
use super::threads::VcpuThreads;
use crate::cpuid;
use crate::ending::{Ending, RunError};
use crate::event_loop::EventLoop;
use crate::events::{Event, Events};
use crate::plan::{self, Payload};
use crate::platform;
use crate::sandbox::Sandbox;
use crate::signals::{Ask, Signals};
use crate::spec::{Parts, PlatformSpec};
use crate::staging::{Content, Staging};
use crate::vcpu::{Enter, Services, VcpuEnd};

/// What outlives one life of the machine.
pub(super) struct World<'a> {
    pub(super) host: &'a Host,
    pub(super) parts: &'a Parts,
    pub(super) payload: &'a Payload,
    pub(super) events: &'a Events,
    pub(super) signals: &'a mut Signals,
    pub(super) vsock: Option<&'a Vsock>,
    pub(super) sandbox: &'a Sandbox,
}

/// Launches the machine, runs it, and takes it down.
pub(super) fn live(world: &mut World<'_>) -> Result<Ending, RunError> {
    let parts = world.parts;
    let (platform, launched) = platform::open(&parts.platform, world.sandbox.clone());
    let ground = Ground::lay(world.host, platform.as_ref(), parts.memory_bytes, parts.cpus)?;
    let launch = platform.begin(ground.foundation())?;
    let mut vcpus = ground.vcpus(parts.cpus)?;
    let mut plan = plan::launch_plan(platform::mode(&parts.platform), world.payload, parts.cpus)
        .map_err(|e| RunError::Internal(e.to_string()))?;
    let predicted =
        platform::predict(&parts.platform, &plan).map_err(|e| RunError::Internal(e.to_string()))?;
    if matches!(parts.platform, PlatformSpec::Soft) && !cpuid::has_gib_pages(&ground.cpuid) {
        plan::without_gib_pages(&mut plan).map_err(|e| RunError::Internal(e.to_string()))?;
    }
    let sealed = plan.apply(launch, &mut vcpus)?;
    world.events.emit(&Event::Measured {
        digest: launched.digest().unwrap_or(predicted).to_string(),
        protected: launched.digest().is_some(),
    });
    let staging = stage(world, &ground)?;
    if let Some(boot) = vcpus.first_mut() {
        staging.fill(boot);
        if platform.private_memory() {
            back_payload(world, &ground, boot);
        }
    }

    let making = || RunError::host("making the event loops");
    let inbox = Inbox::new().map_err(RunError::host("making the main thread's inbox"))?;
    let address = || {
        inbox
            .address()
            .map_err(RunError::host("making the main thread's inbox"))
    };
    let mut backstage = EventLoop::new().map_err(making())?;
    let periphery = Periphery::fit(world, &ground, &inbox, &mut backstage)?;
    let Periphery { ports, mmio, button } = periphery;
    let mut desk_loop = EventLoop::new().map_err(making())?;
    for fd in [inbox.fd(), world.signals.as_fd().as_raw_fd()] {
        // Both are read after every turn; waking up is all that the handler has to do.
        desk_loop
            .add(fd, Box::new(|_| ()))
            .map_err(RunError::host("watching for signals"))?;
    }
    let services = Services {
        ports,
        mmio,
        ram: Arc::clone(&ground.ram),
        private_backing: platform.private_memory(),
        platform: sealed,
    };
    let addresses = (0..parts.cpus).map(|_| address()).collect::<Result<_, _>>()?;
    let _events = EventThread::start(backstage, address()?, world.sandbox)
        .map_err(RunError::host("starting the event thread"))?;
    let threads = VcpuThreads::start(vcpus, &Arc::new(services), addresses, world.sandbox)
        .map_err(RunError::host("starting vCPU threads"))?;
    world.events.emit(&Event::Running {
        vcpu_threads: threads.ids(),
    });
    world.events.ready();
    let mut desk = Desk {
        inbox: &inbox,
        staging,
        events: world.events,
    };
    loop {
        desk_loop.turn(-1).map_err(RunError::host("waiting for events"))?;
        while let Some(ask) = world.signals.take().map_err(RunError::host("reading signals"))? {
            match ask {
                Ask::PowerOff(signal) => {
                    world.events.emit(&Event::Stopping { signal });
                    button.press();
                }
                Ask::End(signal) => return Ok(Ending::Forced(signal)),
            }
        }
        if let Some(ending) = desk.clear()? {
            return Ok(ending);
        }
    }
}

fn stage(world: &World<'_>, ground: &Ground) -> Result<Staging, RunError> {
    let payload = &world.parts.payload;
    let again = |file: &crate::spec::file::InputFile| file.file.try_clone();
    let content = Content {
        kernel: again(&payload.kernel).map_err(RunError::host("opening the kernel again"))?,
        initrd: payload
            .initrd
            .as_ref()
            .map(again)
            .transpose()
            .map_err(RunError::host("opening the initrd again"))?,
        vcpus: world.parts.cpus,
        ram: ground.ram.ranges().to_vec(),
    };
    Staging::place(Arc::clone(&ground.vm), content).map_err(RunError::host("staging kernel and initrd"))
}

/// Backs the private memory into which the shim copies kernel and initrd, so that it does not fault page by page.
fn back_payload(world: &World<'_>, ground: &Ground, boot: &mut Vcpu) {
    let payload = &world.parts.payload;
    let kernel = u64::from(payload.header.init_bytes).max(payload.kernel.bytes);
    let initrd = payload.initrd.as_ref().map_or(0, |file| file.bytes);
    let low_end = ground.ram.ranges().first().map_or(0, |low| low.end().0);
    let initrd_start = low_end.saturating_sub(initrd) & !layout::UNIT.wrapping_sub(1);
    for (start, bytes) in [
        (layout::KERNEL, kernel),
        (initrd_start, low_end.saturating_sub(initrd_start)),
    ] {
        if let Ok(range) = PageRange::new(Gpa(start), bytes.next_multiple_of(PAGE_SIZE)) {
            boot.populate(range);
        }
    }
}

/// Where the main thread works through its notes.
struct Desk<'a> {
    inbox: &'a Inbox,
    staging: Staging,
    events: &'a Events,
}

impl Desk<'_> {
    /// Serves all notes; the ending, once there is one.
    fn clear(&mut self) -> Result<Option<Ending>, RunError> {
        while let Some(note) = self.inbox.take() {
            match note {
                Note::Power(PowerEvent::Off) => return Ok(Some(Ending::PowerOff)),
                Note::Power(PowerEvent::Reboot) => return Ok(Some(Ending::Reboot)),
                Note::Power(PowerEvent::ShimTerminated(code)) => {
                    return Ok(Some(Ending::Terminated(shim_words(code))));
                }
                Note::Power(PowerEvent::ReleaseStaging) => {
                    self.staging
                        .release()
                        .map_err(RunError::host("releasing the staging area"))?;
                }
                Note::DeviceBroken { device, reason } => {
                    self.events.emit(&Event::DeviceBroken { device, reason })
                }
                Note::Quit => return Ok(Some(Ending::Forced(SIGINT))),
                Note::EventsFailed(e) => return Err(RunError::host("waiting for the devices' events")(e)),
                Note::VcpuEnded(VcpuEnd::Stopped) => {}
                Note::VcpuEnded(VcpuEnd::Crashed(why)) => return Ok(Some(Ending::Crashed(why))),
                Note::VcpuEnded(VcpuEnd::Terminated(why)) => return Ok(Some(Ending::Terminated(why))),
                Note::VcpuEnded(VcpuEnd::Failed(e)) => {
                    return Err(RunError::Host {
                        doing: "running the guest".into(),
                        source: io::Error::other(e),
                    });
                }
            }
        }
        Ok(None)
    }
}

/// What Ctrl-A x on the console counts as.
const SIGINT: u32 = 2;

/// The shim's reason in words.
fn shim_words(code: u32) -> String {
    match u8::try_from(code).ok().and_then(Reason::from_code) {
        Some(reason) => format!("the boot shim stopped: {reason}"),
        None => format!("the boot shim stopped for a reason that this cvmm does not know, {code:#x}"),
    }
}
