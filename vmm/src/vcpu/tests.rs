//! Exits as a script has them.

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
    EntryFailed(u64),
    Internal(u32),
    RunFails(i32),
}

struct Script(Scripted, Vec<PageRange>);
impl Enter for Script {
    fn populate(&mut self, range: PageRange) {
        self.1.push(range);
    }

    fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        Err(run_error(libc::EIO))
    }
    fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        Ok(match &mut self.0 {
            Scripted::RunFails(errno) => return Err(run_error(*errno)),
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
            Scripted::EntryFailed(reason) => Exit::EntryFailed(*reason),
            Scripted::Internal(suberror) => Exit::Internal {
                suberror: *suberror,
                data: [0; 4],
            },
        })
    }
}

fn run_error(errno: i32) -> RunError {
    let source = io::Error::from_raw_os_error(errno);
    RunError::Run { index: 0, source }
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
        if exit.reason == 43 {
            return Ok(PlatformFlow::Finish(Box::new(())));
        }
        Ok(PlatformFlow::Terminated(format!("reason {}", exit.reason)))
    }
    fn explain_failure(&self, error: &io::Error) -> Option<String> {
        (error.raw_os_error() == Some(libc::EIO)).then(|| "its pages are bad".into())
    }
    fn explain_entry_failure(&self, reason: u64) -> Option<String> {
        (reason == u64::MAX).then(|| "its registers are bad".into())
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
        (2, Visibility::Private, 1),
        (512, Visibility::Private, 1),
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
            end @ (Flow::Crashed(_) | Flow::Terminated(_)) => break end,
        }
    };
    assert!(matches!(end, Flow::Terminated(why) if why.contains("0x2000")));
    assert_eq!(turns, 1000);
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
    let refused = once(Scripted::EntryFailed(7), &to).0.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the CPU refuses to enter the guest, hardware reason 0x7"
    );
    assert!(
        once(Scripted::Internal(1), &to)
            .0
            .unwrap_err()
            .to_string()
            .contains("cvmm doctor")
    );
}

/// Else whoever supervises the host takes it out of service for what a guest did.
#[test]
fn what_the_guest_did_is_no_failure_of_the_host() {
    let (to, _) = services(Works);
    let crashed = |script| match once(script, &to).0 {
        Ok(Flow::Crashed(why)) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(crashed(Scripted::RunFails(libc::EIO)), "its pages are bad");
    assert!(once(Scripted::RunFails(libc::ENOMEM), &to).0.is_err());
    // Not only entering fails: what an exit interrupted may, too.
    let certificates = Scripted::Platform(43, Box::new([0; 256]));
    assert_eq!(crashed(certificates), "its pages are bad");
    assert_eq!(crashed(Scripted::EntryFailed(u64::MAX)), "its registers are bad");
    for suberror in [2, 3] {
        assert!(crashed(Scripted::Internal(suberror)).contains("delivered an event"));
    }
    assert!(once(Scripted::Internal(4), &to).0.is_err());
}
