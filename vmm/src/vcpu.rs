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
        2 => "two exceptions met while it delivered an event",
        3 => "a fault met while it delivered an event",
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
                next = serve(vcpu.finish()?, memory, to)?;
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
        Exit::EntryFailed(reason) => return Err(VcpuError::EntryFailed(reason)),
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
mod tests {
    use std::sync::Mutex;

    use arch::exit::{PlatformExit, Reply};
    use arch::mem::map::HostRam;
    use arch::mem::{SharedMem, VisibilityMap};
    use devices::bus::BusDevice;

    use super::*;
    use crate::ram::{self, Backing};

    /// What a scripted vCPU exits with; owned, so that the exit can borrow from it.
    enum Scripted {
        PioIn(u16, usize, Vec<u8>),
        PioOut(u16, usize, Vec<u8>),
        MmioRead(u64, Vec<u8>),
        MmioWrite(u64, Vec<u8>),
        Convert(u64, u64, Visibility, [u8; 8]),
        WrongSide(u64, Visibility),
        Platform(u32, Box<[u8; 256]>),
        Shutdown,
        EntryFailed,
        Internal,
    }

    struct Script(Scripted, Vec<PageRange>);
    impl Enter for Script {
        fn populate(&mut self, range: PageRange) {
            self.1.push(range);
        }

        fn finish(&mut self) -> Result<Exit<'_>, RunError> {
            Ok(Exit::Interrupted)
        }
        fn enter(&mut self) -> Result<Exit<'_>, RunError> {
            Ok(match &mut self.0 {
                Scripted::PioIn(port, size, data) => Exit::PioIn {
                    port: *port,
                    size: *size,
                    data,
                },
                Scripted::PioOut(port, size, data) => Exit::PioOut {
                    port: *port,
                    size: *size,
                    data,
                },
                Scripted::MmioRead(gpa, data) => Exit::MmioRead { gpa: Gpa(*gpa), data },
                Scripted::MmioWrite(gpa, data) => Exit::MmioWrite { gpa: Gpa(*gpa), data },
                Scripted::Convert(gpa, pages, to, ret) => Exit::Convert {
                    gpa: *gpa,
                    pages: *pages,
                    to: *to,
                    reply: Reply(ret),
                },
                Scripted::WrongSide(gpa, wants) => Exit::WrongSide {
                    range: PageRange::new(Gpa(*gpa), 0x1000).unwrap(),
                    wants: *wants,
                },
                Scripted::Platform(reason, body) => Exit::Platform(PlatformExit {
                    vcpu: 0,
                    reason: *reason,
                    body,
                }),
                Scripted::Shutdown => Exit::Shutdown,
                Scripted::EntryFailed => Exit::EntryFailed(7),
                Scripted::Internal => Exit::Internal {
                    suberror: 1,
                    data: [0; 4],
                },
            })
        }
    }

    #[derive(Debug)]
    struct Works;
    impl Backing for Works {
        fn set_attribute(&self, _: PageRange, _: Visibility) -> std::io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: PageRange, _: Visibility) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[derive(Debug)]
    struct HostFails;
    impl Backing for HostFails {
        fn set_attribute(&self, _: PageRange, _: Visibility) -> std::io::Result<()> {
            Err(std::io::Error::other("no"))
        }
        fn discard(&self, _: PageRange, _: Visibility) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Ends;
    impl Sealed for Ends {
        fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
            Ok(PlatformFlow::Terminated(format!("reason {}", exit.reason)))
        }
    }

    type Log = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;
    struct Recorder(Log);
    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn services(backing: impl Backing + 'static) -> (Services, Log) {
        let log = Log::default();
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        ports.attach(0x100, 8, Box::new(Recorder(log.clone()))).unwrap();
        mmio.attach(0xc000_0000, 0x1000, Box::new(Recorder(log.clone())))
            .unwrap();
        let all = ram::ranges(4 << 20).unwrap();
        let host = HostRam::allocate(&all).unwrap();
        let visible = Arc::new(VisibilityMap::new(&all, Visibility::Shared));
        let shared = SharedMem::new(host.map().clone(), visible.clone());
        let ram = Arc::new(GuestRam::new(shared, visible, Box::new(backing)));
        (
            Services {
                ports,
                mmio,
                ram,
                private_backing: true,
                platform: Box::new(Ends),
            },
            log,
        )
    }

    fn once(script: Scripted, to: &Services) -> (Result<Flow, VcpuError>, Scripted) {
        let mut vcpu = Script(script, vec![]);
        let flow = step(&mut vcpu, &mut Memory::default(), to);
        (flow, vcpu.0)
    }

    #[test]
    fn string_io_reaches_the_port_element_by_element() {
        let (to, log) = services(Works);
        once(Scripted::PioOut(0x102, 2, vec![1, 2, 3, 4, 5, 6]), &to)
            .0
            .unwrap();
        assert_eq!(
            *log.lock().unwrap(),
            [(2, vec![1, 2]), (2, vec![3, 4]), (2, vec![5, 6])]
        );
        let (_, after) = once(Scripted::PioIn(0x107, 1, vec![0; 3]), &to);
        assert!(matches!(after, Scripted::PioIn(_, _, data) if data == [7, 7, 7]));
    }

    #[test]
    fn undecoded_addresses_read_as_ones_and_swallow_writes() {
        let (to, log) = services(Works);
        let (_, after) = once(Scripted::PioIn(0x80, 4, vec![0; 4]), &to);
        assert!(matches!(after, Scripted::PioIn(_, _, data) if data == [0xff; 4]));
        let (_, after) = once(Scripted::MmioRead(0xd000_0000, vec![0; 8]), &to);
        assert!(matches!(after, Scripted::MmioRead(_, data) if data == [0xff; 8]));
        once(Scripted::MmioWrite(u64::MAX - 7, vec![0; 8]), &to)
            .0
            .unwrap();
        assert!(log.lock().unwrap().is_empty());
        once(Scripted::MmioWrite(0xc000_0008, vec![9; 4]), &to).0.unwrap();
        assert_eq!(log.lock().unwrap().len(), 1);
    }

    /// KVM takes 0, 11 and 22 only.
    #[test]
    fn conversion_answers_are_what_kvm_accepts() {
        let (to, _) = services(Works);
        let cases = [
            (0x1000, 1, 0),
            (0x1001, 1, 22),
            (0x1000, 0, 22),
            (1 << 40, 1, 22),
            (0x1000, u64::MAX, 22),
        ];
        for (gpa, pages, expected) in cases {
            let (flow, after) = once(Scripted::Convert(gpa, pages, Visibility::Private, [0xee; 8]), &to);
            assert_eq!(flow.unwrap(), Flow::Resume);
            assert!(matches!(after, Scripted::Convert(.., ret) if u64::from_ne_bytes(ret) == expected));
        }
        let pin = to.ram.shared().pin(Gpa(0x3000), 1).unwrap();
        let (_, after) = once(Scripted::Convert(0x3000, 1, Visibility::Private, [0; 8]), &to);
        assert!(matches!(after, Scripted::Convert(.., ret) if u64::from_ne_bytes(ret) == 11));
        drop(pin);
    }

    #[test]
    fn what_a_guest_is_about_to_use_is_backed_at_once() {
        let (to, _) = services(Works);
        let cases = [
            (1, Visibility::Private, 0),
            (16, Visibility::Private, 1),
            (16, Visibility::Shared, 0),
            (513, Visibility::Private, 0),
        ];
        for (pages, side, times) in cases {
            let mut vcpu = Script(Scripted::Convert(0x1000, pages, side, [0; 8]), vec![]);
            let _ = step(&mut vcpu, &mut Memory::default(), &to).unwrap();
            assert_eq!(vcpu.1.len(), times, "{pages} pages to {side:?}");
        }
    }

    #[test]
    fn a_host_that_cannot_convert_ends_the_vm() {
        let (to, _) = services(HostFails);
        let (flow, _) = once(Scripted::Convert(0x1000, 1, Visibility::Private, [0; 8]), &to);
        assert!(matches!(flow, Err(VcpuError::Convert(ConvertError::Host(_)))));
    }

    #[test]
    fn a_touch_on_the_wrong_side_converts_the_page() {
        let (to, _) = services(Works);
        once(Scripted::WrongSide(0x2000, Visibility::Private), &to)
            .0
            .unwrap();
        assert!(!to.ram.shared().all_shared(Gpa(0x2000), 1));
        let (flow, _) = once(Scripted::WrongSide(1 << 40, Visibility::Private), &to);
        assert!(matches!(flow, Ok(Flow::Terminated(why)) if why.contains("does not have")));
    }

    /// C54: a page that faults for ever does not spin for ever.
    #[test]
    fn the_same_fault_again_and_again_ends_the_vm() {
        let (to, _) = services(Works);
        let mut vcpu = Script(Scripted::WrongSide(0x2000, Visibility::Shared), vec![]);
        let mut memory = Memory::default();
        let mut turns = 0;
        let end = loop {
            match step(&mut vcpu, &mut memory, &to).unwrap() {
                Flow::Resume => turns += 1,
                end => break end,
            }
        };
        assert!(matches!(end, Flow::Terminated(why) if why.contains("0x2000")));
        assert_eq!(turns, STUCK_FAULTS);
    }

    #[test]
    fn endings() {
        let (to, _) = services(Works);
        assert_eq!(
            once(Scripted::Shutdown, &to).0.unwrap(),
            Flow::Crashed("triple fault".into())
        );
        let (flow, _) = once(Scripted::Platform(24, Box::new([0; 256])), &to);
        assert_eq!(flow.unwrap(), Flow::Terminated("reason 24".into()));
        let refused = once(Scripted::EntryFailed, &to).0.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the CPU refuses to enter the guest, hardware reason 0x7"
        );
        assert!(
            once(Scripted::Internal, &to)
                .0
                .unwrap_err()
                .to_string()
                .contains("cvmm doctor")
        );
    }
}
