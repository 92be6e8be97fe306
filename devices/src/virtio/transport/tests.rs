//! A driver that behaves, and everything that one might do instead.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may end in a panic"
)]

mod access;
mod interrupts;
mod lifecycle;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arch::kvm::vm::MsiMessage;
use arch::mem::VisibilityMap;

use super::*;
use crate::pci::{ECAM_BYTES, ECAM_START};
use crate::virtio::device::feature;
use crate::virtio::mock::{self, MockRing};

const MSI: u64 = 0xfee0_0000;
const BAR: u64 = 0xc000_0000;
const QUEUES: [u16; 2] = [64, 8];
/// A feature of the toy's own.
const TOY_FEATURE: u64 = 1 << 5;

/// Records what reaches KVM.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    routes: Mutex<Vec<(u32, Option<MsiMessage>)>>,
    events: Mutex<Vec<(u32, EventFd)>>,
    kicks: Mutex<Vec<Gpa>>,
    faults: Mutex<Vec<String>>,
    /// The host has no resources left.
    refuse: AtomicBool,
}

impl Lines {
    fn ask(&self) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl Interrupts for Lines {
    fn route(&self, line: u32, message: Option<MsiMessage>) -> io::Result<()> {
        self.routes.lock().unwrap().push((line, message));
        self.ask()
    }
    fn connect(&self, line: u32) -> io::Result<EventFd> {
        self.ask()?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        self.events.lock().unwrap().push((line, event.try_clone()?));
        Ok(event)
    }
}

impl Kicks for Lines {
    fn connect(&self, at: Gpa, _: &EventFd) -> io::Result<()> {
        self.kicks.lock().unwrap().push(at);
        self.ask()
    }
}

impl Observer for Lines {
    fn device_broken(&self, fault: &Fault<'_>) {
        self.faults
            .lock()
            .unwrap()
            .push(format!("{} {}", fault.device, fault.cause));
    }
}

/// Answers each chain with one byte more than it got, in each writable byte.
struct Toy {
    backend: UnixStream,
    config: [u8; 8],
    alive: Arc<AtomicUsize>,
    refuse: bool,
    /// The host still works for a driver that is gone.
    busy: Arc<AtomicBool>,
    sizes: Vec<u16>,
    visible: Arc<VisibilityMap>,
}

struct RunningToy {
    busy: Arc<AtomicBool>,
    mem: SharedMem,
    visible: Arc<VisibilityMap>,
    queues: Vec<Option<VirtQueue>>,
    alive: Arc<AtomicUsize>,
}

impl VirtioDevice for Toy {
    fn id(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        TOY_FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.config.iter().skip(offset as usize)) {
            *to = *from;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (to, from) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *to = *from;
        }
    }
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.backend.as_fd())
    }
    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        if self.refuse {
            return Err(io::Error::other("toy box is closed"));
        }
        wait_for_batches(&self.visible);
        self.alive.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(RunningToy {
            busy: Arc::clone(&self.busy),
            mem: with.mem,
            visible: Arc::clone(&self.visible),
            queues: with.queues,
            alive: Arc::clone(&self.alive),
        }))
    }
}

/// Stands for a device that joins a thread which uses guest memory: hangs if the caller holds a batch.
fn wait_for_batches(visible: &VisibilityMap) {
    assert!(visible.drain(mock::pages(0, 0x1000), Duration::from_secs(5)));
}

impl Drop for RunningToy {
    fn drop(&mut self) {
        wait_for_batches(&self.visible);
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Running for RunningToy {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        let Some(queue) = self.queues[queue].as_mut() else {
            return Ok(());
        };
        while let Some(chain) = queue.pop(&self.mem)? {
            let mut byte = [0];
            let _ = chain.reader(&self.mem).read(&mut byte);
            let answer = vec![byte[0].wrapping_add(1); chain.writable_bytes() as usize];
            let written = chain.writer(&self.mem).write_all(&answer).is_ok();
            queue.push(
                &self.mem,
                chain.head(),
                if written { answer.len() as u32 } else { 0 },
            )?;
        }
        queue.enable_kicks(&self.mem)?;
        queue.notify(&self.mem)
    }
    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.on_kick(0)
    }
    fn stop(&mut self) -> bool {
        wait_for_batches(&self.visible);
        !self.busy.load(Ordering::SeqCst)
    }
}

impl Toy {
    /// A toy and the other end of its backend.
    fn new(visible: &Arc<VisibilityMap>, alive: &Arc<AtomicUsize>) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let toy = Self {
            backend: ours,
            config: [1, 2, 3, 4, 5, 6, 7, 8],
            alive: Arc::clone(alive),
            refuse: false,
            busy: Arc::default(),
            sizes: QUEUES.to_vec(),
            visible: Arc::clone(visible),
        };
        (toy, theirs)
    }
}

/// Wires to `lines`.
pub(crate) fn wires(mem: &SharedMem, lines: &Arc<Lines>) -> Wires {
    Wires {
        mem: mem.clone(),
        interrupts: lines.clone(),
        kicks: lines.clone(),
        observer: lines.clone(),
    }
}

/// A machine with one toy, and a driver's hands.
struct Bench {
    mmio: Bus,
    pci: VirtioPci,
    lines: Arc<Lines>,
    mem: SharedMem,
    visible: Arc<VisibilityMap>,
    alive: Arc<AtomicUsize>,
    backend: UnixStream,
    rings: Vec<MockRing>,
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Toy)) -> Self {
        let (mem, visible) = mock::memory();
        let alive = Arc::new(AtomicUsize::new(0));
        let (mut toy, backend) = Toy::new(&visible, &alive);
        change(&mut toy);
        let lines = Arc::new(Lines::default());
        let wires = wires(&mem, &lines);
        let (mut root, mut mmio) = (PciRoot::default(), Bus::default());
        let pci = VirtioPci::attach("toy0", Box::new(toy), &wires, &mut root, &mut mmio).unwrap();
        mmio.attach(ECAM_START, ECAM_BYTES, Box::new(root)).unwrap();
        let rings = vec![
            MockRing::new(&mem, 0x10_0000, 64),
            MockRing::new(&mem, 0x20_0000, 8),
        ];
        Self {
            mmio,
            pci,
            lines,
            mem,
            visible,
            alive,
            backend,
            rings,
        }
    }

    fn get(&self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(at, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn set(&self, at: u64, len: usize, value: u64) {
        self.mmio.write(at, &value.to_le_bytes()[..len]);
    }

    /// Common configuration.
    fn common(&self, at: u64, len: usize) -> u64 {
        self.get(BAR + at, len)
    }

    fn set_common(&self, at: u64, len: usize, value: u64) {
        self.set(BAR + at, len, value);
    }

    fn status(&self) -> u64 {
        self.common(0x14, 1)
    }

    fn set_status(&self, value: u64) -> u64 {
        self.set_common(0x14, 1, value);
        self.status()
    }

    /// Registers of the function in slot 1.
    fn config(&self, at: u64, len: usize) -> u64 {
        self.get(ECAM_START + 0x8000 + at, len)
    }

    fn set_config(&self, at: u64, len: usize, value: u64) {
        self.set(ECAM_START + 0x8000 + at, len, value);
    }

    /// Offset of the capability of that ID, or of that virtio structure.
    fn capability(&self, id: u64, kind: Option<u64>) -> u64 {
        let mut at = self.config(0x34, 1);
        while at != 0 {
            if self.config(at, 1) == id && kind.is_none_or(|k| self.config(at + 3, 1) == k) {
                return at;
            }
            at = self.config(at + 1, 1);
        }
        panic!("no capability {id:#x} {kind:?}");
    }

    fn set_msix(&self, control: u64) {
        self.set_config(self.capability(0x11, None) + 2, 2, control);
    }

    /// Programs a vector as Linux does.
    fn set_vector(&self, vector: u64, message: MsiMessage, masked: bool) {
        let at = BAR + 0x4000 + vector * 16;
        self.set(at + 12, 4, 1);
        self.set(at, 4, message.address & 0xffff_ffff);
        self.set(at + 4, 4, message.address >> 32);
        self.set(at + 8, 4, u64::from(message.data));
        self.set(at + 12, 4, u64::from(masked));
    }

    /// Interrupts on that vector since the last call.
    fn interrupts(&self, vector: u32) -> u64 {
        let events = self.lines.events.lock().unwrap();
        let event = events.iter().find(|(line, _)| *line == 64 + vector);
        event.map_or(0, |(_, event)| event.read().unwrap_or(0))
    }

    /// As far as FEATURES_OK. Returns the status.
    fn negotiate(&self, features: u64) -> u64 {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for window in 0..2 {
            self.set_common(8, 4, window);
            self.set_common(12, 4, (features >> (32 * window)) & 0xffff_ffff);
        }
        self.set_status(11)
    }

    fn place(&self, queue: usize) {
        let ring = &self.rings[queue];
        self.set_common(0x16, 2, queue as u64);
        self.set_common(0x18, 2, u64::from(ring.size));
        self.set_common(0x1a, 2, queue as u64 + 1);
        for (at, address) in [
            (0x20, ring.table()),
            (0x28, ring.avail()),
            (0x30, ring.used_ring()),
        ] {
            self.set_common(at, 4, address);
            self.set_common(at + 4, 4, 0);
        }
        self.set_common(0x1c, 2, 1);
    }

    /// All that a good driver does before its first request: vectors 0 (configuration), 1 and 2.
    fn start(&mut self) {
        self.set_config(4, 2, 6);
        self.set_msix(0x8000);
        for vector in 0..3 {
            let message = MsiMessage {
                address: MSI,
                data: 0x30 + vector as u32,
            };
            self.set_vector(vector, message, false);
        }
        assert_eq!(self.negotiate(GOOD), 11);
        self.set_common(0x10, 2, 0);
        for (queue, size) in QUEUES.into_iter().enumerate() {
            self.rings[queue] = MockRing::new(&self.mem, self.rings[queue].base, size);
            self.place(queue);
        }
        assert_eq!(self.set_status(15), 15);
    }

    /// What the event thread does now.
    fn run_events(&self, epoll: &Epoll) -> Vec<u64> {
        let mut events = [EpollEvent::default(); 8];
        let count = epoll.wait(0, &mut events).unwrap();
        let seen: Vec<u64> = events[..count].iter().map(|event| event.data()).collect();
        for event in &seen {
            self.pci.on_event(*event as u16);
        }
        seen
    }

    fn epoll(&self) -> Epoll {
        let epoll = Epoll::new().unwrap();
        self.pci.watch(&epoll, 0x5_0000).unwrap();
        epoll
    }

    fn kick(&self, queue: u64) {
        self.set(BAR + 0x1000 + queue * 4, 2, queue);
    }

    fn faults(&self) -> Vec<String> {
        self.lines.faults.lock().unwrap().clone()
    }

    /// True if a request on queue 0 is answered.
    fn answers(&mut self) -> bool {
        let (head, at) = self.rings[0].send(&[b"A"], &[3]);
        self.pci.on_event(0);
        self.rings[0].take_used() == Some((u32::from(head), 3)) && self.rings[0].read(at[1], 3) == b"BBB"
    }
}

const GOOD: u64 = feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::EVENT_IDX | feature::INDIRECT_DESC;

#[test]
fn a_good_driver_finds_drives_and_leaves_the_device() {
    let mut bench = Bench::new();
    assert_eq!(bench.config(0, 4), 0x1044_1af4);
    assert_eq!(bench.config(8, 1), 1);
    let bars: Vec<u64> = (1..=4)
        .map(|kind| {
            let at = bench.capability(9, Some(kind));
            assert_eq!(bench.config(at + 4, 1), 0);
            bench.config(at + 8, 4)
        })
        .collect();
    assert_eq!(bars, [0, 0x1000, 0x2000, 0x3000]);
    let msix = bench.capability(0x11, None);
    let table = (
        bench.config(msix + 2, 2),
        bench.config(msix + 4, 4),
        bench.config(msix + 8, 4),
    );
    assert_eq!(table, (2, 0x4000, 0x5000));
    let epoll = bench.epoll();
    bench.start();
    assert_eq!(bench.alive.load(Ordering::SeqCst), 1);
    assert_eq!(
        bench.lines.kicks.lock().unwrap().as_slice(),
        [Gpa(BAR + 0x1000), Gpa(BAR + 0x1004)]
    );
    let (head, at) = bench.rings[0].send(&[b"A"], &[3]);
    bench.kick(0);
    assert!(bench.run_events(&epoll).contains(&0x5_0000));
    assert_eq!(bench.rings[0].take_used(), Some((u32::from(head), 3)));
    assert_eq!(bench.rings[0].read(at[1], 3), b"BBB");
    assert_eq!(
        (bench.interrupts(1), bench.interrupts(0), bench.interrupts(2)),
        (1, 0, 0)
    );
    let message = MsiMessage {
        address: MSI,
        data: 0x31,
    };
    assert_eq!(
        bench.lines.routes.lock().unwrap().as_slice(),
        [(65, Some(message))]
    );
    assert_eq!(bench.set_status(0), 0);
    assert_eq!(bench.alive.load(Ordering::SeqCst), 0);
}

#[test]
fn devices_that_do_not_fit_are_refused_by_name() {
    let (mem, visible) = mock::memory();
    let wires = wires(&mem, &Arc::new(Lines::default()));
    let alive = Arc::new(AtomicUsize::new(0));
    let (mut root, mut mmio) = (PciRoot::default(), Bus::default());
    let mut attach = |name: &str, queues: usize, mmio: &mut Bus| {
        let (mut toy, _) = Toy::new(&visible, &alive);
        toy.sizes = vec![2; queues];
        VirtioPci::attach(name, Box::new(toy), &wires, &mut root, mmio)
    };
    let error = attach("wide", MAX_QUEUES + 1, &mut mmio).unwrap_err();
    assert!(matches!(error, AttachError::Queues { name, count: 257 } if name == "wide"));
    for number in 1..32 {
        // As many queues as are allowed share the vectors that a slot has.
        let device = attach(&format!("d{number}"), MAX_QUEUES, &mut mmio).unwrap();
        assert_eq!(device.0.slot.number, number);
    }
    let error = attach("last", 1, &mut mmio).unwrap_err();
    assert!(matches!(error, AttachError::Slot { name, .. } if name == "last"));
    let mut data = [0; 2];
    mmio.read(0xc000_0000 + 30 * 0x8000 + 0x12, &mut data);
    assert_eq!(u16::from_le_bytes(data), 256);
}
