//! A machine with one device on the real transport, its driver, its host and its event loop.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arch::addr::Gpa;
use arch::kvm::vm::MsiMessage;
use arch::mem::{SharedMem, Watch};
use vm_memory::Permissions;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::device::{VirtioDevice, feature};
use super::super::transport::{Fault, Kicks, Observer, VirtioPci, Wires};
use super::ring::Fields;
use super::{Ring, Schedule};
use crate::bus::Bus;
use crate::console::Console;
use crate::pci::msix::Interrupts;
use crate::pci::root::PciRoot;
use crate::pci::{ECAM_BYTES, ECAM_START};

const BAR: u64 = 0xc000_0000;
const FIRST_LINE: u32 = 64;
const MSI: u64 = 0xfee0_0000;
/// Events that the event loop takes at a time.
const BATCH: usize = 32;
/// Token of the console.
const CONSOLE: u64 = 1 << 16;
/// How long a machine with work left may be at rest, in milliseconds: longer than any timer here.
pub(crate) const REST: i32 = 100;
/// Turns until everything is served.
const TURNS: usize = 100_000;
/// Turns until a device that has nothing to do is quiet.
const LAST_TURNS: usize = 200;

/// What KVM would do: kicks and interrupts are event descriptors.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    kicks: Mutex<BTreeMap<u64, EventFd>>,
    events: Mutex<BTreeMap<u32, EventFd>>,
    broken: Mutex<Option<String>>,
}

impl Lines {
    pub(super) fn kick(&self, queue: u16) {
        let at = BAR + 0x1000 + u64::from(queue) * 4;
        if let Some(kick) = self.kicks.lock().unwrap().get(&at) {
            kick.write(1).unwrap();
        }
    }

    pub(super) fn raised(&self, queue: u16) -> bool {
        let line = FIRST_LINE + u32::from(queue) + 1;
        let events = self.events.lock().unwrap();
        events.get(&line).is_some_and(|event| event.read().is_ok())
    }
}

impl Interrupts for Lines {
    fn route(&self, _: u32, _: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, line: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.events.lock().unwrap().insert(line, event.try_clone()?);
        Ok(event)
    }
}

impl Kicks for Lines {
    fn connect(&self, at: Gpa, kick: &EventFd) -> io::Result<()> {
        self.kicks.lock().unwrap().insert(at.0, kick.try_clone()?);
        Ok(())
    }
}

impl Observer for Lines {
    fn device_broken(&self, fault: &Fault<'_>) {
        *self.broken.lock().unwrap() = Some(fault.cause.to_string());
    }
}

/// The driver of a device, and the host's processes behind it.
pub(crate) trait Outside: Send {
    /// Its rings, by queue.
    fn rings(&mut self) -> &mut Vec<Ring>;
    /// The device is up, with fresh rings.
    fn begin(&mut self, with: &Schedule);
    /// One thing that a vCPU does of itself. It may happen while the device works.
    fn drive(&mut self, with: &Schedule);
    /// A vCPU takes the interrupt of `queue`.
    fn interrupt(&mut self, queue: usize, with: &Schedule);
    /// One thing that a process of the host does.
    fn host(&mut self, with: &Schedule);
    /// All that driver and host still do when they begin nothing more; true if anything was done.
    fn answer(&mut self, with: &Schedule) -> bool;
    /// What is not served yet.
    fn left(&mut self) -> Option<String>;
    /// The driver is gone; its rings are as the device left them.
    fn end(&mut self, with: &Schedule);
}

/// The driver on another vCPU, which overtakes the device at some of its accesses to memory.
struct Overtaker {
    outside: Arc<Mutex<Box<dyn Outside>>>,
    schedule: Arc<Schedule>,
    rings: Vec<Fields>,
    plan: Mutex<Plan>,
}

/// Which accesses of the device count.
#[derive(Clone, Copy, Debug, Default)]
enum Place {
    #[default]
    Any,
    /// To a field through which device and driver tell each other where they are and what they want to hear.
    Field,
    /// To where it says whether it wants kicks.
    Wish,
}

/// When the driver overtakes the device.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// How many times more.
    times: usize,
    place: Place,
    /// After how many accesses.
    accesses: usize,
    /// How many accesses lie between two times.
    apart: usize,
    /// Steps that the driver takes each time.
    steps: usize,
}

impl std::fmt::Debug for Overtaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Overtaker")
    }
}

impl Watch for Overtaker {
    fn before(&self, at: Gpa, _: u64, _: Permissions) {
        let Ok(mut plan) = self.plan.try_lock() else {
            return;
        };
        let counts = match plan.place {
            Place::Any => true,
            Place::Field => self.rings.iter().any(|ring| ring.contain(at.0)),
            Place::Wish => self.rings.iter().any(|ring| ring.are_a_wish(at.0)),
        };
        if plan.times == 0 || !counts {
            return;
        }
        if plan.accesses != 0 {
            plan.accesses -= 1;
            return;
        }
        (plan.times, plan.accesses) = (plan.times - 1, plan.apart);
        let mut outside = self.outside.lock().unwrap();
        self.schedule.tell(|| "meanwhile:".into());
        for _ in 0..plan.steps {
            drive(&mut **outside, &self.schedule);
        }
    }
}

/// A vCPU takes an interrupt or does something else.
fn drive(outside: &mut dyn Outside, with: &Schedule) {
    let raised = outside.rings().iter().position(Ring::interrupted);
    match raised {
        Some(queue) => interrupt(outside, queue, with),
        None => outside.drive(with),
    }
}

fn interrupt(outside: &mut dyn Outside, queue: usize, with: &Schedule) {
    with.tell(|| format!("interrupt {queue}"));
    outside.interrupt(queue, with);
}

/// What a machine is made of.
pub(crate) struct Wired {
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) outside: Box<dyn Outside>,
    pub(crate) mem: SharedMem,
    pub(crate) lines: Arc<Lines>,
    /// Feature bits of the device that its driver accepts.
    pub(crate) features: u64,
    /// Watched by the event loop too.
    pub(crate) console: Option<Console>,
    /// How long it may be at rest with work left, in milliseconds.
    pub(crate) rest: i32,
}

/// One machine.
pub(crate) struct Machine {
    outside: Arc<Mutex<Box<dyn Outside>>>,
    overtaker: Arc<Overtaker>,
    schedule: Arc<Schedule>,
    lines: Arc<Lines>,
    mmio: Bus,
    pci: VirtioPci,
    epoll: Epoll,
    events: VecDeque<u64>,
    features: u64,
    console: Option<Console>,
    queues: usize,
    rest: i32,
}

impl Machine {
    pub(super) fn new(parts: Wired, schedule: &Arc<Schedule>) -> Self {
        let mut outside = parts.outside;
        let queues = outside.rings().len();
        let rings = outside.rings().iter().map(Ring::fields).collect();
        let outside = Arc::new(Mutex::new(outside));
        let overtaker = Arc::new(Overtaker {
            outside: Arc::clone(&outside),
            schedule: Arc::clone(schedule),
            rings,
            plan: Mutex::default(),
        });
        let wires = Wires {
            mem: parts.mem.watched(Arc::<Overtaker>::clone(&overtaker)),
            interrupts: parts.lines.clone(),
            kicks: parts.lines.clone(),
            observer: parts.lines.clone(),
        };
        let (mut root, mut mmio) = (PciRoot::default(), Bus::default());
        let pci = VirtioPci::attach("it", parts.device, &wires, &mut root, &mut mmio).unwrap();
        mmio.attach(ECAM_START, ECAM_BYTES, Box::new(root)).unwrap();
        let epoll = Epoll::new().unwrap();
        pci.watch(&epoll, 0).unwrap();
        if let Some(console) = &parts.console {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&console.descriptor());
            let event = EpollEvent::new(EventSet::IN, CONSOLE);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        }
        Self {
            outside,
            overtaker,
            schedule: Arc::clone(schedule),
            lines: parts.lines,
            mmio,
            pci,
            epoll,
            events: VecDeque::new(),
            features: parts.features,
            console: parts.console,
            queues,
            rest: parts.rest,
        }
    }

    fn set(&self, at: u64, len: usize, value: u64) {
        self.mmio.write(at, &value.to_le_bytes()[..len]);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.mmio.read(BAR + 0x14, &mut status);
        status[0]
    }

    fn set_mask(&self, queue: usize, masked: bool) {
        let at = BAR + 0x4000 + (queue as u64 + 1) * 16;
        self.set(at + 12, 4, u64::from(masked));
    }

    /// All that a driver does before its first request.
    fn begin(&self) {
        let event_idx = self.schedule.pick(2) == 0;
        self.schedule
            .tell(|| format!("a driver begins, event index {event_idx}"));
        let mut features =
            self.features | feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::INDIRECT_DESC;
        if event_idx {
            features |= feature::EVENT_IDX;
        }
        for value in [0, 1, 3] {
            self.set(BAR + 0x14, 1, value);
        }
        for window in 0..2 {
            self.set(BAR + 8, 4, window);
            self.set(BAR + 12, 4, (features >> (32 * window)) & 0xffff_ffff);
        }
        self.set(BAR + 0x14, 1, 11);
        let mut outside = self.outside.lock().unwrap();
        for (queue, ring) in outside.rings().iter_mut().enumerate() {
            ring.interrupted();
            ring.begin(event_idx);
            self.set(BAR + 0x16, 2, queue as u64);
            self.set(BAR + 0x18, 2, u64::from(ring.size()));
            self.set(BAR + 0x1a, 2, queue as u64 + 1);
            let mock = &ring.mock;
            for (at, address) in [
                (0x20, mock.table()),
                (0x28, mock.avail()),
                (0x30, mock.used_ring()),
            ] {
                self.set(BAR + at, 8, address);
            }
            self.set(BAR + 0x1c, 2, 1);
            let vector = BAR + 0x4000 + (queue as u64 + 1) * 16;
            self.set(vector, 8, MSI);
            self.set(vector + 8, 4, 0x30 + queue as u64);
            self.set_mask(queue, false);
        }
        self.set(BAR + 0x14, 1, 15);
        assert_eq!(self.status(), 15, "{:?}", self.lines.broken.lock().unwrap());
        outside.begin(&self.schedule);
    }

    /// Finds the function, and switches memory, bus mastering and MSI-X on.
    fn find(&self) {
        let at = ECAM_START + 0x8000;
        self.set(at + 4, 2, 6);
        let byte = |offset: u64| {
            let mut byte = [0];
            self.mmio.read(at + offset, &mut byte);
            u64::from(byte[0])
        };
        let mut capability = byte(0x34);
        while byte(capability) != 0x11 {
            capability = byte(capability + 1);
        }
        self.set(at + capability + 2, 2, 0x8000);
    }

    /// Handles one event as the event loop does, if there is one within `wait` milliseconds.
    fn turn(&mut self, wait: i32) -> bool {
        if self.events.is_empty() {
            let mut events = [EpollEvent::default(); BATCH];
            let count = match self.epoll.wait(wait, &mut events) {
                // As io_uring does.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
                other => other.unwrap(),
            };
            self.events
                .extend(events.iter().take(count).map(|event| event.data()));
        }
        let Some(event) = self.events.pop_front() else {
            return false;
        };
        if event == CONSOLE {
            self.schedule.tell(|| "console".into());
            self.console.as_ref().map(Console::service);
            return true;
        }
        self.schedule.tell(|| match event as u16 {
            super::super::transport::BACKEND => "backend".into(),
            queue => format!("kick {queue}"),
        });
        *self.overtaker.plan.lock().unwrap() = self.plan();
        self.pci.on_event(event as u16);
        *self.overtaker.plan.lock().unwrap() = Plan::default();
        true
    }

    /// Half of the calls are overtaken.
    fn plan(&self) -> Plan {
        let pick = |count| self.schedule.pick(count);
        let (place, most) = match pick(8) {
            _ if self.schedule.is_over() => return Plan::default(),
            0 => (Place::Any, 64),
            1 => (Place::Field, 12),
            2 | 3 => (Place::Wish, 2),
            _ => return Plan::default(),
        };
        Plan {
            times: 1 + pick(3),
            place,
            accesses: pick(most),
            apart: pick(2),
            steps: 1 + pick(3),
        }
    }

    fn reset(&mut self) {
        self.schedule.tell(|| "reset".into());
        self.set(BAR + 0x14, 1, 0);
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while self.status() != 0 {
            assert!(std::time::Instant::now() < until, "a reset hangs");
            std::thread::sleep(Duration::from_micros(100));
        }
        self.outside.lock().unwrap().end(&self.schedule);
        for _ in 0..self.schedule.pick(4) {
            self.outside.lock().unwrap().host(&self.schedule);
            self.turn(0);
        }
        self.begin();
    }

    /// One step, of the event loop, a vCPU, the host or something rare, as often as `odds` says.
    fn step(&mut self, odds: [usize; 3]) {
        let [events, drives, hosts] = odds;
        let at = self.schedule.pick(events + drives + hosts + 2);
        if at < events {
            self.turn(0);
        } else if at < events + drives {
            drive(&mut **self.outside.lock().unwrap(), &self.schedule);
        } else if at < events + drives + hosts {
            self.outside.lock().unwrap().host(&self.schedule);
        } else {
            self.rare();
        }
    }

    fn rare(&mut self) {
        match self.schedule.pick(8) {
            0..=2 => {
                let queue = self.schedule.pick(self.queues);
                let masked = self.schedule.pick(2) == 0;
                self.schedule.tell(|| format!("mask {queue}: {masked}"));
                self.set_mask(queue, masked);
            }
            3..=5 => {
                self.schedule.tell(|| "a while".into());
                std::thread::sleep(Duration::from_micros(300));
            }
            6 if self.schedule.pick(2) == 0 => self.reset(),
            _ => {}
        }
    }

    /// Plays a schedule to its end, and on until all is served or nothing happens any more.
    pub(super) fn play(&mut self) -> Result<(), String> {
        self.find();
        self.begin();
        let odds = [0; 3].map(|_| self.schedule.one(&[2, 6, 12]));
        while !self.schedule.is_over() {
            self.step(odds);
        }
        self.schedule.calm.store(true, Ordering::Relaxed);
        self.schedule.tell(|| "nothing is begun any more".into());
        for queue in 0..self.queues {
            self.set_mask(queue, false);
        }
        self.settle()?;
        for _ in 0..LAST_TURNS {
            if !self.turn(0) {
                return self.schedule.verdict();
            }
        }
        Err("the event loop spins".into())
    }

    fn settle(&mut self) -> Result<(), String> {
        for _ in 0..TURNS {
            self.schedule.verdict()?;
            if let Some(why) = self.lines.broken.lock().unwrap().take() {
                return Err(format!("the device broke: {why}"));
            }
            let mut busy = self.turn(0);
            let mut outside = self.outside.lock().unwrap();
            for queue in 0..self.queues {
                if outside.rings()[queue].interrupted() {
                    interrupt(&mut **outside, queue, &self.schedule);
                    busy = true;
                }
            }
            busy |= outside.answer(&self.schedule);
            if busy {
                continue;
            }
            let unheard = outside.rings().iter().position(Ring::is_unheard);
            let left = unheard.map(|queue| format!("no interrupt for queue {queue}"));
            let Some(left) = left.or_else(|| outside.left()) else {
                return Ok(());
            };
            drop(outside);
            if !self.turn(self.rest) {
                return Err(format!("nothing happens any more, but: {left}"));
            }
        }
        Err("no end in sight".into())
    }
}
