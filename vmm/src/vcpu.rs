//! One vCPU: run, decode, serve, repeat.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::exit::{Answer, Exit};
use arch::kvm::vcpu::{RunError, Vcpu};
use arch::mem::Visibility;
use arch::platform::{PlatformError, PlatformFlow, Sealed};
use devices::bus::Bus;

use crate::ram::{ConvertError, GuestRam};

/// A vCPU that can be entered. KVM in production, a script in tests.
pub trait Enter {
    /// Runs the guest until it needs something.
    ///
    /// # Errors
    /// The guest could not be entered.
    fn enter(&mut self) -> Result<Exit<'_>, RunError>;
    /// Lets KVM finish what the last exit interrupted, without running the guest.
    ///
    /// # Errors
    /// The guest could not be entered.
    fn finish(&mut self) -> Result<Exit<'_>, RunError>;
    /// Backs `range`, which has just become private, so that the guest's first touches do not exit one by one.
    fn populate(&mut self, range: PageRange);
}

impl Enter for Vcpu {
    fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        Vcpu::enter(self)
    }

    fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        Vcpu::finish(self)
    }

    fn populate(&mut self, range: PageRange) {
        if let Err(e) = self.pre_fault(range) {
            log::debug!("backing {:#x} ahead of the guest: {e}", range.start().0);
        }
    }
}

/// What an exit may touch; shared by all vCPUs of a machine.
#[derive(Debug)]
pub struct Services {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Guest memory, for conversions.
    pub ram: Arc<GuestRam>,
    /// Private pages have a backing of their own.
    pub private_backing: bool,
    /// The sealed platform.
    pub platform: Box<dyn Sealed>,
}

/// What the thread does after one exit.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// Enter the guest again.
    Resume,
    /// The guest did what no guest survives; in words.
    Crashed(String),
    /// The guest ended itself; the reason in words.
    Terminated(String),
}

/// The vCPU cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// `KVM_RUN` itself failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The CPU refused the guest state.
    #[error("the CPU refuses to enter the guest, hardware reason {0:#x}")]
    EntryFailed(u64),
    /// KVM gave up.
    #[error("KVM cannot go on: {}", internal_error(*suberror))]
    Internal {
        /// `kvm_run.internal.suberror`.
        suberror: u32,
        /// The first words of `kvm_run.internal.data`.
        data: [u64; 4],
    },
    /// Pages could not change sides.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The platform could not serve its exit.
    #[error(transparent)]
    Platform(#[from] PlatformError),
}

/// `KVM_INTERNAL_ERROR_*` in words (Linux 7.2, include/uapi/linux/kvm.h).
fn internal_error(suberror: u32) -> &'static str {
    match suberror {
        1 => {
            "it met a guest instruction that it cannot emulate (is this KVM itself a nested, paravirtual one? see `cvmm doctor`)"
        }
        2 => "two exceptions met while KVM delivered an event",
        3 => "a fault met while KVM delivered an event",
        4 => "the CPU left the guest for a reason that KVM does not know",
        _ => "internal error",
    }
}

/// Faults on one page in a row, without any other exit between, that end the VM.
const STUCK_FAULTS: u32 = 1000;

/// What one vCPU remembers between exits.
#[derive(Debug, Default)]
pub struct Memory {
    last_fault: Option<(PageRange, u32)>,
}

/// Enters the guest once and serves the exit.
///
/// # Errors
/// The VM must end. Nothing that a guest can do lands here on a sane host, but for instructions that KVM cannot emulate,
/// which only `soft` guests can cause.
pub fn step(vcpu: &mut impl Enter, memory: &mut Memory, to: &Services) -> Result<Flow, VcpuError> {
    let mut next = match vcpu.enter() {
        Ok(exit) => serve(exit, memory, to)?,
        Err(e) => return failed(e, to),
    };
    loop {
        match next {
            Served::Flow(flow) => return Ok(flow),
            Served::Finish(until_done) => {
                next = match vcpu.finish() {
                    Ok(exit) => serve(exit, memory, to)?,
                    Err(e) => return failed(e, to),
                };
                drop(until_done);
            }
            Served::Populate(range) => {
                vcpu.populate(range);
                return Ok(Flow::Resume);
            }
        }
    }
}

/// Guest or host: only the platform can tell.
fn failed(error: RunError, to: &Services) -> Result<Flow, VcpuError> {
    if let RunError::Run { source, .. } = &error
        && let Some(why) = to.platform.explain_failure(source)
    {
        return Ok(Flow::Crashed(why));
    }
    Err(error.into())
}

/// What serving an exit leads to.
enum Served {
    Flow(Flow),
    Finish(Box<dyn Send>),
    Populate(PageRange),
}

fn serve(exit: Exit<'_>, memory: &mut Memory, to: &Services) -> Result<Served, VcpuError> {
    if !matches!(exit, Exit::WrongSide { .. } | Exit::Interrupted) {
        memory.last_fault = None;
    }
    match exit {
        Exit::PioIn { port, size, data } => {
            for element in data.chunks_mut(size.max(1)) {
                to.ports.read(port.into(), element);
            }
        }
        Exit::PioOut { port, size, data } => {
            for element in data.chunks(size.max(1)) {
                to.ports.write(port.into(), element);
            }
        }
        Exit::MmioRead { gpa, data } => to.mmio.read(gpa.0, data),
        Exit::MmioWrite { gpa, data } => to.mmio.write(gpa.0, data),
        Exit::Convert {
            gpa,
            pages,
            to: side,
            reply,
        } => match to.ram.convert_request(gpa, pages, side) {
            Ok(()) => {
                reply.set(Answer::Done);
                return Ok(match worth_backing(gpa, pages, side) {
                    Some(range) if to.private_backing => Served::Populate(range),
                    Some(_) | None => Served::Flow(Flow::Resume),
                });
            }
            Err(ConvertError::BadRange(_) | ConvertError::NotRam { .. }) => reply.set(Answer::Invalid),
            Err(ConvertError::Busy) => reply.set(Answer::Retry),
            Err(e @ ConvertError::Host(_)) => return Err(e.into()),
        },
        Exit::WrongSide { range, wants } => return wrong_side(range, wants, memory, to).map(Served::Flow),
        Exit::Platform(exit) => {
            return Ok(match to.platform.handle_exit(exit)? {
                PlatformFlow::Resume => Served::Flow(Flow::Resume),
                PlatformFlow::Finish(until_done) => Served::Finish(until_done),
                PlatformFlow::Terminated(why) => Served::Flow(Flow::Terminated(why)),
            });
        }
        Exit::Interrupted => {}
        Exit::Shutdown => return Ok(Served::Flow(Flow::Crashed("triple fault".into()))),
        Exit::EntryFailed(reason) => {
            let guests = to.platform.explain_entry_failure(reason).map(Flow::Crashed);
            return guests.map(Served::Flow).ok_or(VcpuError::EntryFailed(reason));
        }
        // Whose stack or descriptor tables are no memory.
        Exit::Internal {
            suberror: suberror @ (2 | 3),
            ..
        } => {
            return Ok(Served::Flow(Flow::Crashed(internal_error(suberror).into())));
        }
        Exit::Internal { suberror, data } => return Err(VcpuError::Internal { suberror, data }),
    }
    Ok(Served::Flow(Flow::Resume))
}

/// Most pages that a conversion backs at once: what a guest converts in one go because it is about to use it. A
/// guest that gives all its memory back before a kexec does not get it all backed.
const POPULATE_PAGES: u64 = 512;

fn worth_backing(gpa: u64, pages: u64, side: Visibility) -> Option<PageRange> {
    let wanted = side == Visibility::Private && (2..=POPULATE_PAGES).contains(&pages);
    wanted.then(|| PageRange::new(Gpa(gpa), pages.checked_mul(PAGE_SIZE)?).ok())?
}

/// Converts on first touch; a page that already is where the guest wants it may just have been converted by
/// another vCPU, so that only many faults in a row are an error.
fn wrong_side(
    range: PageRange,
    wants: Visibility,
    memory: &mut Memory,
    to: &Services,
) -> Result<Flow, VcpuError> {
    let count = match memory.last_fault {
        Some((last, count)) if last == range => count.saturating_add(1),
        Some(_) | None => 0,
    };
    if count >= STUCK_FAULTS {
        // Two vCPUs that want one page on different sides get here too, so it is the guest's doing.
        let start = range.start().0;
        return Ok(Flow::Terminated(format!(
            "it touched {start:#x} on the wrong side {STUCK_FAULTS} times in a row, and converting did not help"
        )));
    }
    memory.last_fault = Some((range, count));
    match to.ram.convert_touched(range, wants) {
        Ok(()) | Err(ConvertError::Busy) => Ok(Flow::Resume),
        Err(e @ (ConvertError::NotRam { .. } | ConvertError::BadRange(_))) => Ok(Flow::Terminated(format!(
            "it used memory that it does not have: {e}"
        ))),
        Err(e @ ConvertError::Host(_)) => Err(e.into()),
    }
}

/// Why a vCPU thread ended.
#[derive(Debug)]
pub enum VcpuEnd {
    /// It was told to stop.
    Stopped,
    /// The guest did what no guest survives; in words.
    Crashed(String),
    /// The guest ended itself; the reason in words.
    Terminated(String),
    /// The vCPU cannot go on.
    Failed(VcpuError),
}

/// Runs `vcpu` on this thread until the guest ends or `stop` is set (set it, then kick the thread). `confine` gives up
/// what the thread does not need any more before it enters the guest.
pub fn run(
    vcpu: &mut Vcpu,
    to: &Services,
    stop: &AtomicBool,
    confine: impl FnOnce() -> io::Result<()>,
) -> VcpuEnd {
    let listening = vcpu.listen_for_kicks();
    let _kicks = match listening.and_then(|kicks| confine().map(|()| kicks)) {
        Ok(guard) => guard,
        Err(source) => {
            let index = vcpu.index();
            return VcpuEnd::Failed(RunError::Run { index, source }.into());
        }
    };
    let mut memory = Memory::default();
    while !stop.load(Ordering::Acquire) {
        match step(vcpu, &mut memory, to) {
            Ok(Flow::Resume) => {}
            Ok(Flow::Crashed(why)) => return VcpuEnd::Crashed(why),
            Ok(Flow::Terminated(why)) => return VcpuEnd::Terminated(why),
            Err(e) => return VcpuEnd::Failed(e),
        }
    }
    VcpuEnd::Stopped
}

#[cfg(test)]
mod tests;
