//! Resets of a disk whose host does not answer.

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::hostile::Held;
use super::*;
use crate::bus::Bus;
use crate::pci::root::PciRoot;
use crate::pci::{ECAM_BYTES, ECAM_START};
use crate::virtio::device::feature as transport;
use crate::virtio::transport::tests::wires;
use crate::virtio::transport::{BACKEND, VirtioPci};

/// Far less than anybody would wait for a disk.
const AT_ONCE: Duration = Duration::from_millis(500);
const GOOD: u64 = transport::VERSION_1 | transport::ACCESS_PLATFORM | feature::FLUSH;
/// Where the driver of the disk that hangs reads to.
const DATA: u64 = 0x80_0000;

/// A disk that hangs, `disks[0]`, and one that does not.
struct Machine {
    mmio: Bus,
    mem: SharedMem,
    visible: Arc<VisibilityMap>,
    disks: Vec<VirtioPci>,
    open: Arc<AtomicBool>,
    /// Makes the notifier of the disk that hangs readable.
    host: Arc<Disk>,
}

impl Machine {
    fn new(make: Make) -> io::Result<Self> {
        let (mem, visible) = memory();
        let open = Arc::new(AtomicBool::new(false));
        let (mut root, mut mmio) = (PciRoot::default(), Bus::default());
        let mut hosts = vec![];
        let mut disks = vec![];
        for hangs in [true, false] {
            let disk = Disk::open(disk_file(64 << 10))?;
            let mut engine = make(&disk)?;
            if hangs {
                engine = Box::new(Held {
                    inner: engine,
                    open: Arc::clone(&open),
                });
            }
            let block = Block::new(disk, vec![engine], false, ID)?;
            hosts.push(Arc::clone(&block.disk));
            let wires = wires(&mem, &Arc::default());
            disks.push(VirtioPci::attach("disk", Box::new(block), &wires, &mut root, &mut mmio).unwrap());
        }
        mmio.attach(ECAM_START, ECAM_BYTES, Box::new(root)).unwrap();
        let machine = Self {
            mmio,
            mem,
            visible,
            disks,
            open,
            host: hosts.remove(0),
        };
        for disk in 0..2 {
            machine.mmio.write(ECAM_START + 0x8000 * (disk + 1) + 4, &[6, 0]);
        }
        Ok(machine)
    }

    fn set(&self, disk: u64, at: u64, value: &[u8]) {
        self.mmio.write(0xc000_0000 + disk * 0x8000 + at, value);
    }

    fn status(&self, disk: u64) -> u8 {
        let mut status = [0];
        self.mmio.read(0xc000_0000 + disk * 0x8000 + 0x14, &mut status);
        status[0]
    }

    /// Writes 0 to the status through the window in configuration space, under the root's lock.
    fn reset_by_window(&self, disk: u64) {
        let function = ECAM_START + 0x8000 * (disk + 1);
        let byte = |at: u64| {
            let mut byte = [0];
            self.mmio.read(function + at, &mut byte);
            u64::from(byte[0])
        };
        let mut at = byte(0x34);
        while byte(at + 3) != 5 || byte(at) != 9 {
            at = byte(at + 1);
        }
        self.mmio.write(function + at + 8, &0x14_u32.to_le_bytes());
        self.mmio.write(function + at + 12, &1_u32.to_le_bytes());
        self.mmio.write(function + at + 16, &[0]);
    }

    /// A driver that behaves, on a fresh ring.
    fn drive(&self, disk: u64) -> MockRing {
        let ring = MockRing::new(&self.mem, RING * (disk + 1), 64);
        for status in [1, 3] {
            self.set(disk, 0x14, &[status]);
        }
        for window in 0..2_u32 {
            self.set(disk, 0x08, &window.to_le_bytes());
            self.set(disk, 0x0c, &((GOOD >> (32 * window)) as u32).to_le_bytes());
        }
        self.set(disk, 0x14, &[11]);
        self.set(disk, 0x18, &64_u16.to_le_bytes());
        for (at, address) in [
            (0x20, ring.table()),
            (0x28, ring.avail()),
            (0x30, ring.used_ring()),
        ] {
            self.set(disk, at, &address.to_le_bytes());
        }
        self.set(disk, 0x1c, &[1, 0]);
        self.set(disk, 0x14, &[15]);
        assert_eq!(self.status(disk), 15);
        ring
    }

    /// True if a request is answered, by which time the event thread has looked a few times.
    fn answers(&self, disk: u64, ring: &mut MockRing) -> bool {
        let (head, at) = ring.send(&[&header(IN, 2)], &[512, 1]);
        self.disks[disk as usize].on_event(0);
        let until = Instant::now() + LONG;
        let used = loop {
            self.disks[disk as usize].on_event(BACKEND);
            let used = ring.take_used();
            if used.is_some() || Instant::now() > until {
                break used;
            }
        };
        used == Some((u32::from(head), 513)) && ring.read(at[1], 512) == pattern(2048)[1024..1536]
    }

    /// A request of the disk that hangs, which names the page at [`DATA`].
    fn hang(&self, ring: &mut MockRing) {
        let at = ring.buffer(32);
        self.mem.write_slice(&header(IN, 0), GuestAddress(at)).unwrap();
        ring.descriptor(0, at, 16, NEXT, 1);
        ring.descriptor(1, DATA, 4096, WRITE | NEXT, 2);
        ring.descriptor(2, at + 16, 1, WRITE, 0);
        ring.offer(0);
        self.disks[0].on_event(0);
    }

    /// True if nothing is in flight on the page at [`DATA`].
    fn is_free(&self) -> bool {
        self.visible.drain(pages(DATA, 0x1000), Duration::from_millis(2))
    }
}

/// Runs `test` for each engine that this host has.
fn each(test: impl Fn(&str, &Machine)) {
    for (name, make) in ENGINES {
        match Machine::new(make) {
            Ok(machine) => test(name, &machine),
            Err(e) if name == "io_uring" => eprintln!("SKIPPED: io_uring is not available here: {e}"),
            Err(e) => panic!("{name}: {e}"),
        }
    }
}

#[test]
fn a_reset_of_a_disk_that_hangs_holds_nobody_up_and_is_done_when_the_host_is() {
    each(|name, machine| {
        for by_window in [false, true] {
            machine.open.store(false, Ordering::SeqCst);
            let mut old = machine.drive(0);
            machine.hang(&mut old);
            let began = Instant::now();
            for _ in 0..3 {
                if by_window {
                    machine.reset_by_window(0);
                } else {
                    machine.set(0, 0x14, &[0]);
                }
                assert_eq!(machine.status(0), 15, "{name}");
            }
            machine.disks[0].on_event(0);
            machine.disks[0].on_event(BACKEND);
            let mut other = machine.drive(1);
            assert!(machine.answers(1, &mut other), "{name}");
            machine.set(1, 0x14, &[0]);
            assert_eq!(machine.status(1), 0, "{name}");
            assert!(began.elapsed() < AT_ONCE, "{name}: {:?}", began.elapsed());
            assert!(!machine.is_free(), "{name}: the host may still write to the page");
            // The next driver, a kexec later, hears the same.
            machine.set(0, 0x14, &[1]);
            assert_eq!(machine.status(0), 15, "{name}");

            machine.open.store(true, Ordering::SeqCst);
            let until = Instant::now() + LONG;
            while machine.status(0) != 0 {
                assert!(Instant::now() < until, "{name}: the reset never ends");
            }
            assert!(machine.is_free(), "{name}");
            assert_eq!(old.take_used(), None, "{name}");
            let seen = old.read(DATA, 4096);
            let mut new = machine.drive(0);
            assert!(machine.answers(0, &mut new), "{name}");
            assert_eq!(new.take_used(), None, "{name}");
            assert!(new.read(DATA, 4096) == seen, "{name}: written after the reset");
            machine.set(0, 0x14, &[0]);
            assert_eq!(machine.status(0), 0, "{name}");
        }
    });
}

#[test]
fn pages_of_a_driver_that_is_gone_are_free_without_its_asking() {
    each(|name, machine| {
        let epoll = Epoll::new().unwrap();
        machine.disks[0].watch(&epoll, 0).unwrap();
        let mut events = [EpollEvent::default(); 4];
        let mut old = machine.drive(0);
        machine.hang(&mut old);
        machine.set(0, 0x14, &[0]);
        assert!(!machine.is_free(), "{name}");
        machine.open.store(true, Ordering::SeqCst);
        machine.host.wake();
        let until = Instant::now() + LONG;
        while !machine.is_free() {
            assert!(Instant::now() < until, "{name}: pinned for ever");
            let count = epoll.wait(100, &mut events).unwrap_or(0);
            for event in &events[..count] {
                machine.disks[0].on_event(event.data() as u16);
            }
        }
        assert_eq!(machine.status(0), 0, "{name}");
        // And nothing keeps the event thread awake.
        machine.host.wake();
        let _edges = epoll.wait(0, &mut events);
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0, "{name}");
    });
}

#[test]
fn the_end_of_a_machine_waits_for_its_disks_only_so_long() {
    for (_, make) in ENGINES {
        let Ok(machine) = Machine::new(make) else {
            eprintln!("SKIPPED: an engine is not available here");
            continue;
        };
        let mut ring = machine.drive(0);
        machine.hang(&mut ring);
        machine.set(0, 0x14, &[0]);
        let visible = Arc::clone(&machine.visible);
        let began = Instant::now();
        drop(machine);
        // The engine of the test waits a tenth as long as it is told, and is asked once.
        assert!(began.elapsed() < Duration::from_secs(3));
        assert!(!visible.drain(pages(DATA, 0x1000), Duration::ZERO));
    }
}
