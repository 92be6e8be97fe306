//! A driver-side mock against the device, on each engine, with real files.

mod hostile;
mod lies;
mod limits;
mod measure;
mod model;
mod requests;
mod reset;

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arch::blockio::{Action, Done, Refused};
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::mock::{
    HIGH, HIGH_END, IrqCount, LOW_END, MockRing, NEXT, WRITE, activation, memory, pages,
};
use crate::virtio::queue::QueueBroken;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const ALL: u64 = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
const ID: [u8; 20] = *b"serial-0123456789-xy";
const RING: u64 = 0x10_0000;
const LONG: Duration = Duration::from_secs(20);

type Make = fn(&Disk) -> io::Result<Box<dyn Engine>>;

const ENGINES: [(&str, Make); 3] = [
    ("io_uring", |disk| disk.uring_engine(QUEUE_SIZE)),
    ("threads", |disk| Ok(disk.thread_engine(QUEUE_SIZE, &free()))),
    ("caller", |disk| Ok(disk.inline_engine(QUEUE_SIZE))),
];

/// Threads that give up nothing.
fn free() -> Enter {
    Arc::new(|| Ok(()))
}

/// A file without a name, full of a pattern.
fn disk_file(bytes: usize) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    let file = options.open(std::env::temp_dir()).unwrap();
    file.write_all_at(&pattern(bytes), 0).unwrap();
    file
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i / 512 * 7 + i) as u8 | 1).collect()
}

/// A disk with one queue and its driver.
struct Rig {
    block: Block,
    running: Option<Box<dyn Running>>,
    ring: MockRing,
    irq: IrqCount,
    mem: SharedMem,
    visible: Arc<VisibilityMap>,
    file: File,
}

impl Rig {
    fn open(file: &File, read_only: bool, features: u64, make: Make) -> io::Result<Self> {
        let disk = Disk::open(file.try_clone()?)?;
        let engine = make(&disk)?;
        Ok(Self::start(
            file,
            Block::new(disk, vec![engine], read_only, ID)?,
            features,
        ))
    }

    /// Another driver, with a fresh ring of `size`.
    fn begin_again(&mut self, size: u16) {
        self.running = None;
        self.ring = MockRing::new(&self.mem, RING, size);
        let (with, _) = activation(&self.mem, &[&self.ring], ALL);
        self.running = Some(self.block.activate(with).unwrap());
    }

    /// Offers one request of so many buffers of 4 MiB, all in the same place; says where its status comes.
    fn offer_large(&mut self, kind: u32, buffers: u16) -> u64 {
        let at = self.ring.buffer(32);
        self.mem.write_slice(&header(kind, 0), GuestAddress(at)).unwrap();
        self.mem.write_obj(0xee_u8, GuestAddress(at + 16)).unwrap();
        let flags = if kind == IN { WRITE } else { 0 };
        self.ring.descriptor(0, at, 16, NEXT, 1);
        for i in 1..=buffers {
            self.ring.descriptor(i, 0x80_0000, 4 << 20, flags | NEXT, i + 1);
        }
        self.ring.descriptor(buffers + 1, at + 16, 1, WRITE, 0);
        self.ring.offer(0);
        at + 16
    }

    fn start(file: &File, mut block: Block, features: u64) -> Self {
        let (mem, visible) = memory();
        let ring = MockRing::new(&mem, RING, 64);
        let (with, mut irqs) = activation(&mem, &[&ring], features);
        Self {
            running: Some(block.activate(with).unwrap()),
            block,
            ring,
            irq: irqs.pop().unwrap(),
            mem,
            visible,
            file: file.try_clone().unwrap(),
        }
    }

    /// Runs `test` on a fresh disk for each engine of this host.
    fn each(bytes: usize, test: impl Fn(&str, &mut Rig)) {
        for (name, make) in ENGINES {
            match Self::open(&disk_file(bytes), false, ALL, make) {
                Ok(mut rig) => test(name, &mut rig),
                Err(e) if name == "io_uring" => eprintln!("SKIPPED: io_uring is not available here: {e}"),
                Err(e) => panic!("{name}: {e}"),
            }
        }
    }

    fn kick(&mut self) -> Result<(), QueueBroken> {
        let _batch = self.mem.batch();
        self.running.as_mut().unwrap().on_kick(0)
    }

    fn backend(&mut self) -> Result<(), QueueBroken> {
        let _batch = self.mem.batch();
        self.running.as_mut().unwrap().on_backend()
    }

    /// Waits for the next used entry the way the event thread does.
    fn wait(&mut self) -> (u32, u32) {
        let until = Instant::now() + LONG;
        loop {
            if let Some(used) = self.ring.take_used() {
                return used;
            }
            assert!(Instant::now() < until, "no answer");
            if readable(&self.block, 100) {
                self.backend().unwrap();
            }
        }
    }

    /// Sends one request and returns its status, the length reported, and the writable bytes before the
    /// status.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
        let mut readable = vec![header(kind, sector)];
        readable.extend((!data.is_empty()).then(|| data.to_vec()));
        let readable: Vec<_> = readable.iter().map(Vec::as_slice).collect();
        let mut writable = vec![1];
        if room != 0 {
            writable.insert(0, room as u32);
        }
        let (head, at) = self.ring.send(&readable, &writable);
        let status = *at.last().unwrap();
        self.mem.write_obj(0xee_u8, GuestAddress(status)).unwrap();
        self.kick().unwrap();
        let (used, length) = self.wait();
        assert_eq!(used, u32::from(head));
        let filled = match room {
            0 => vec![],
            _ => self.ring.read(at[at.len() - 2], room),
        };
        (self.ring.read(status, 1)[0], length, filled)
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut raw = vec![0; 16];
    raw[..4].copy_from_slice(&kind.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    raw
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// True if the device's backend descriptor turns readable in time.
fn readable(block: &Block, ms: i32) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let fd = block.backend().unwrap();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(ms) * 1_000_000,
    };
    // An interruption counts as "not yet".
    poll(&mut fds, Some(&limit)).is_ok_and(|count| count == 1)
}
