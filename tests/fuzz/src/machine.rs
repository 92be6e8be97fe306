//! The host around one device: RAM, buses, the event loop, and pages that change sides.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::kvm::vm::MsiMessage;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use devices::bus::Bus;
use devices::pci::msix::Interrupts;
use devices::pci::root::PciRoot;
use devices::pci::{ECAM_BYTES, ECAM_START, WINDOW_START};
use devices::virtio::transport::{Fault, Kicks, Observer, VirtioPci, Wires};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::peer::Host;

/// RAM is `[0, LOW_END)` and `[HIGH, HIGH_END)`, a hole between them.
pub const LOW_END: u64 = 0x8_0000;
/// Start of the second range.
pub const HIGH: u64 = 0x10_0000;
/// End of the second range.
pub const HIGH_END: u64 = 0x14_0000;
/// The device's registers.
pub const BAR: u64 = WINDOW_START;
/// The device's configuration space.
pub const CONFIG: u64 = ECAM_START + (1 << 15);

/// What private pages hold; nobody but the machine writes it there.
const CANARY: u8 = 0xc5;
/// Events that one thing the guest does may lead to. A queue's worth of work takes far fewer.
const EVENTS: usize = 20_000;
/// Event of the device's outside, behind those of the device.
const OUTSIDE: u64 = 0x2_0000;

#[derive(Debug)]
struct Wiring;

impl Interrupts for Wiring {
    fn route(&self, _line: u32, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, _line: u32) -> io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

impl Kicks for Wiring {
    fn connect(&self, _at: Gpa, _kick: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl Observer for Wiring {
    fn device_broken(&self, fault: &Fault<'_>) {
        assert!(!fault.cause.to_string().is_empty());
    }
}

/// A machine with one device.
pub struct Machine {
    ram: HostRam,
    visible: Arc<VisibilityMap>,
    private: BTreeSet<u64>,
    pci: VirtioPci,
    mmio: Bus,
    epoll: Epoll,
    /// The other end of the device.
    pub host: Host,
}

/// A page range that is known to be good.
fn pages(start: u64, bytes: u64) -> PageRange {
    PageRange::new(Gpa(start), bytes).unwrap()
}

impl Machine {
    /// All of its RAM is shared and zero.
    pub fn new(mut host: Host) -> Self {
        let ranges = [pages(0, LOW_END), pages(HIGH, HIGH_END - HIGH)];
        let ram = HostRam::allocate(&ranges).unwrap();
        let visible = Arc::new(VisibilityMap::new(&ranges, Visibility::Shared));
        let wires = Wires {
            mem: SharedMem::new(Arc::clone(ram.map()), Arc::clone(&visible)),
            interrupts: Arc::new(Wiring),
            kicks: Arc::new(Wiring),
            observer: Arc::new(Wiring),
        };
        let (mut root, mut mmio) = (PciRoot::default(), Bus::default());
        let device = host.device.take().unwrap();
        let pci = VirtioPci::attach("fuzzed", device, &wires, &mut root, &mut mmio).unwrap();
        mmio.attach(ECAM_START, ECAM_BYTES, Box::new(root)).unwrap();
        let epoll = Epoll::new().unwrap();
        pci.watch(&epoll, 0).unwrap();
        if let Some(fd) = host.outside.descriptor() {
            let event = EpollEvent::new(EventSet::IN, OUTSIDE);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        }
        Self {
            ram,
            visible,
            private: BTreeSet::new(),
            pci,
            mmio,
            epoll,
            host,
        }
    }

    /// The guest writes to its memory; it does not reach pages that it made private this way.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        if self.visible.all_shared(Gpa(at), bytes.len() as u64) {
            self.ram.map().write_slice(bytes, GuestAddress(at)).unwrap();
        }
    }

    /// The guest reads its memory; `None` where that is private or no RAM.
    pub fn read<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        if !self.visible.all_shared(Gpa(at), N as u64) {
            return None;
        }
        let mut bytes = [0; N];
        self.ram.map().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Some(bytes)
    }

    /// The guest writes a register.
    pub fn set(&self, at: u64, bytes: &[u8]) {
        self.mmio.write(at, bytes);
    }

    /// The guest reads a register of up to 8 bytes.
    pub fn get(&self, at: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.mmio.read(at, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    /// A wake-up for which there may be no reason.
    pub fn event(&self, source: u16) {
        self.pci.on_event(source);
    }

    /// The event thread's work, until there is none.
    ///
    /// # Panics
    /// It does not end.
    pub fn settle(&mut self) {
        let mut left = EVENTS;
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            if count == 0 {
                return;
            }
            for event in &events[..count] {
                match u16::try_from(event.data()) {
                    Ok(source) => self.pci.on_event(source),
                    Err(_) => self.host.outside.service(),
                }
            }
            left = left.checked_sub(count).expect("the device spins");
        }
    }

    /// The guest moves pages to the private side; the host refuses while they are busy.
    pub fn hide(&mut self, start: u64, bytes: u64) {
        let range = pages(start, bytes);
        if !self.visible.covers(range) {
            return;
        }
        let hidden = self.visible.hide(range);
        if !self.visible.drain(range, Duration::from_millis(1)) {
            self.visible.show(hidden);
            return;
        }
        for frame in range.frames() {
            if self.private.insert(frame) {
                self.ram
                    .map()
                    .write_slice(&[CANARY; PAGE_SIZE as usize], GuestAddress(frame * PAGE_SIZE))
                    .unwrap();
            }
        }
    }

    /// The guest moves pages to the shared side.
    pub fn show(&mut self, start: u64, bytes: u64) {
        let range = pages(start, bytes);
        if !self.visible.covers(range) {
            return;
        }
        for frame in range.frames() {
            if self.private.remove(&frame) {
                self.check_frame(frame);
            }
        }
        self.ram.discard(range).unwrap();
        self.visible.set(range, Visibility::Shared);
    }

    /// # Panics
    /// The device wrote to a private page.
    pub fn check(&self) {
        for frame in &self.private {
            self.check_frame(*frame);
        }
    }

    fn check_frame(&self, frame: u64) {
        let mut bytes = [0; PAGE_SIZE as usize];
        let at = GuestAddress(frame * PAGE_SIZE);
        self.ram.map().read_slice(&mut bytes, at).unwrap();
        assert!(
            bytes == [CANARY; PAGE_SIZE as usize],
            "the device wrote to private frame {frame:#x}"
        );
    }
}
