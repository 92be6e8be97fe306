//! A driver-side mock against the device, on each engine, with real files.

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
    ("threads", |disk| Ok(disk.thread_engine(QUEUE_SIZE))),
    ("caller", |disk| Ok(disk.inline_engine(QUEUE_SIZE))),
];

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

#[test]
fn each_request_gets_its_status_and_moves_the_right_bytes() {
    Rig::each(64 << 10, |name, rig| {
        let old = pattern(64 << 10);
        let new = vec![0xc3; 1536];
        let (status, length, data) = rig.request(IN, 2, &[], 4096);
        assert_eq!((status, length), (0, 4097), "{name}");
        assert!(data == old[1024..5120], "{name}");
        assert_eq!(rig.request(OUT, 127, &new[..512], 0).0, 0, "{name}: last sector");
        assert_eq!(rig.request(OUT, 4, &new, 0), (0, 1, vec![]), "{name}");
        assert_eq!(rig.request(FLUSH, 0, &[], 0), (0, 1, vec![]), "{name}");
        assert!(rig.request(IN, 4, &[], 1536).2 == new, "{name}");
        assert_eq!(
            rig.request(DISCARD, 0, &range(16, 8, 0), 0),
            (0, 1, vec![]),
            "{name}"
        );
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(32, 8, 0), 0),
            (0, 1, vec![]),
            "{name}"
        );
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(48, 8, 1), 0),
            (0, 1, vec![]),
            "{name}"
        );
        // Refused: status, nothing filled.
        assert_eq!(
            rig.request(IN, 128, &[], 512),
            (1, 0, vec![0; 512]),
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(OUT, 125, &new[..], 512).0,
            1,
            "{name}: wrong direction"
        );
        assert_eq!(
            rig.request(OUT, 126, &new, 0),
            (1, 1, vec![]),
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(DISCARD, 0, &range(120, 9, 0), 0).0,
            1,
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(DISCARD, 0, &range(0, 8, 1), 0).0,
            2,
            "{name}: unknown flag"
        );
        assert_eq!(
            rig.request(77, 0, &new, 512),
            (2, 0, vec![0; 512]),
            "{name}: unknown type"
        );

        let mut expected = old;
        expected[127 * 512..].fill(0xc3);
        expected[2048..3584].fill(0xc3);
        for sector in [16, 32, 48] {
            expected[sector * 512..(sector + 8) * 512].fill(0);
        }
        let mut all = vec![0; 64 << 10];
        rig.file.read_exact_at(&mut all, 0).unwrap();
        assert!(all == expected, "{name}: the disk differs from the model");
    });
}

#[test]
fn the_identity_fits_any_buffer() {
    Rig::each(4096, |name, rig| {
        for room in 0..24 {
            let (status, length, data) = rig.request(GET_ID, 0, &[], room);
            let count = room.min(20);
            let gap = room > 20;
            assert_eq!(status, 0, "{name} {room}");
            assert_eq!(length as usize, count + usize::from(!gap), "{name} {room}");
            assert_eq!(data[..count], ID[..count], "{name} {room}");
            assert!(data[count..].iter().all(|b| *b == 0), "{name} {room}");
        }
    });
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for (name, make) in ENGINES {
        let file = disk_file(4096);
        let Ok(mut rig) = Rig::open(&file, true, ALL, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_ne!(rig.block.features() & feature::RO, 0);
        assert_eq!(
            rig.block.features() & (feature::DISCARD | feature::WRITE_ZEROES),
            0
        );
        for (kind, data) in [
            (OUT, vec![9; 512]),
            (DISCARD, range(0, 1, 0)),
            (WRITE_ZEROES, range(0, 1, 0)),
        ] {
            assert_eq!(rig.request(kind, 0, &data, 0).0, 1, "{name} type {kind}");
        }
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
        let mut now = vec![0; 4096];
        file.read_exact_at(&mut now, 0).unwrap();
        assert!(now == pattern(4096), "{name}");
    }
}

#[test]
fn what_was_not_negotiated_is_unknown() {
    for (name, make) in ENGINES {
        let Ok(mut rig) = Rig::open(&disk_file(4096), false, 0, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_eq!(rig.request(DISCARD, 0, &range(0, 1, 0), 0).0, 2, "{name}");
        assert_eq!(rig.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 2, "{name}");
        // Each write is stable without a flush; the data must arrive all the same.
        assert_eq!(rig.request(OUT, 1, &[5; 512], 0).0, 0, "{name}");
        assert_eq!(rig.request(IN, 1, &[], 512).2, vec![5; 512], "{name}");
    }
}

#[test]
fn header_and_status_may_lie_anywhere_in_a_chain() {
    Rig::each(4096, |name, rig| {
        // The header in three buffers, the last of which holds data too; the status ends the data buffer.
        let raw = [header(OUT, 3), vec![0x77; 512]].concat();
        let (_, at) = rig.ring.send(&[&raw[..1], &raw[1..9], &raw[9..]], &[1]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[3], 1), [0], "{name}");
        let (_, at) = rig.ring.send(&[&header(IN, 3)], &[100, 413]);
        rig.kick().unwrap();
        assert_eq!(rig.wait().1, 513, "{name}");
        assert_eq!(rig.ring.read(at[1], 100), [0x77; 100], "{name}");
        let tail = rig.ring.read(at[2], 413);
        assert!(tail[..412].iter().all(|b| *b == 0x77) && tail[412] == 0, "{name}");
        // Too short for a header, but there is a place to say so.
        let (_, at) = rig.ring.send(&[&raw[..15]], &[1]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[1], 1), [1], "{name}");
        let (_, at) = rig.ring.send(&[], &[513]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[0] + 512, 1), [1], "{name}");
    });
}

#[test]
fn a_chain_that_cannot_be_answered_breaks_the_queue() {
    Rig::each(4096, |name, rig| {
        rig.ring.send(&[&header(IN, 0), &[0; 512]], &[]);
        assert!(rig.kick().is_err(), "{name}: nothing writable");
    });
    let bad = [
        ("private data", 0x20_0000, 512),
        ("private tail", 0x1f_ff00, 512),
        ("hole", LOW_END, 512),
        ("reaches into a hole", LOW_END - 256, 512),
        ("past all memory", HIGH_END - 1, 512),
        ("wraps", u64::MAX - 100, 512),
        ("nearly 4 GiB", 0x30_0000, u32::MAX),
        ("empty", 0x30_0000, 0),
    ];
    for (what, at, length) in bad {
        Rig::each(4096, |name, rig| {
            rig.visible.set(pages(0x20_0000, 0x1000), Visibility::Private);
            let head = rig.ring.buffer(32);
            rig.mem.write_slice(&header(IN, 0), GuestAddress(head)).unwrap();
            rig.ring.descriptor(0, head, 16, NEXT, 1);
            rig.ring.descriptor(1, at, length, WRITE | NEXT, 2);
            rig.ring.descriptor(2, head + 16, 1, WRITE, 0);
            rig.ring.offer(0);
            assert!(rig.kick().is_err(), "{name}: {what}");
            rig.running = None;
            assert!(
                rig.visible.drain(pages(0, LOW_END), Duration::ZERO),
                "{name}: {what}"
            );
        });
    }
}

/// An engine that starts nothing before the test says so.
#[derive(Debug)]
struct Held {
    inner: Box<dyn Engine>,
    open: Arc<AtomicBool>,
}

impl Engine for Held {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        self.inner.submit(mem, tag, action)
    }
    fn run(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        match self.open.load(Ordering::SeqCst) {
            true => self.inner.run(done),
            false => Ok(()),
        }
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn quiesce(&mut self, limit: Duration) -> bool {
        self.inner.quiesce(limit)
    }
}

/// A rig whose disk answers once the flag is set.
fn held(make: Make) -> Option<(Rig, Arc<AtomicBool>)> {
    let file = disk_file(64 << 10);
    let disk = Disk::open(file.try_clone().unwrap()).unwrap();
    let open = Arc::new(AtomicBool::new(false));
    let Ok(inner) = make(&disk) else {
        eprintln!("SKIPPED: an engine is not available here");
        return None;
    };
    let engine = Held {
        inner,
        open: Arc::clone(&open),
    };
    let block = Block::new(disk, vec![Box::new(engine)], false, ID).unwrap();
    Some((Rig::start(&file, block, ALL), open))
}

#[test]
fn a_driver_that_rewrites_its_request_in_flight_changes_nothing() {
    for (name, make) in ENGINES {
        let Some((mut rig, open)) = held(make) else {
            continue;
        };
        let (head, at) = rig.ring.send(&[&header(IN, 2)], &[512, 1]);
        let other = rig.ring.buffer(1024);
        rig.kick().unwrap();
        rig.mem.write_slice(&header(OUT, 0), GuestAddress(at[0])).unwrap();
        for index in 0..3 {
            rig.ring.descriptor(head + index, other, 1, WRITE, 0);
        }
        open.store(true, Ordering::SeqCst);
        rig.backend().unwrap();
        assert_eq!(rig.wait(), (u32::from(head), 513), "{name}");
        assert!(rig.ring.read(at[1], 512) == pattern(2048)[1024..1536], "{name}");
        assert_eq!(rig.ring.read(at[2], 1), [0], "{name}");
        assert_eq!(rig.ring.read(other, 512), vec![0; 512], "{name}");
    }
}

#[test]
fn a_head_that_is_in_flight_already_breaks_the_queue() {
    for (_, make) in ENGINES {
        let Some((mut rig, _)) = held(make) else { continue };
        let (head, _) = rig.ring.send(&[&header(IN, 2)], &[512, 1]);
        rig.kick().unwrap();
        rig.ring.offer(head);
        assert!(rig.kick().is_err());
    }
}

#[test]
fn a_conversion_waits_for_the_request_and_later_requests_are_refused() {
    for (name, make) in ENGINES {
        let Some((mut rig, open)) = held(make) else {
            continue;
        };
        let page = pages(0x40_0000, 0x1000);
        let head = rig.ring.buffer(32);
        rig.mem.write_slice(&header(IN, 0), GuestAddress(head)).unwrap();
        rig.ring.descriptor(0, head, 16, NEXT, 1);
        rig.ring.descriptor(1, 0x40_0000, 4096, WRITE | NEXT, 2);
        rig.ring.descriptor(2, head + 16, 1, WRITE, 0);
        rig.ring.offer(0);
        rig.kick().unwrap();
        rig.visible.set(page, Visibility::Private);
        assert!(!rig.visible.drain(page, Duration::from_millis(2)), "{name}");
        open.store(true, Ordering::SeqCst);
        rig.backend().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(head + 16, 1), [0], "{name}");
        assert!(rig.visible.drain(page, Duration::ZERO), "{name}");
        rig.ring.offer(0);
        assert!(rig.kick().is_err(), "{name}");
    }
}

#[test]
fn a_status_byte_that_turned_private_is_not_written() {
    for (name, make) in ENGINES {
        let Some((mut rig, open)) = held(make) else {
            continue;
        };
        let map = Arc::clone(rig.mem.mapping());
        let (data, status) = (rig.ring.buffer(1024), 0x40_0000);
        rig.mem.write_slice(&header(IN, 0), GuestAddress(data)).unwrap();
        rig.ring.descriptor(0, data, 16, NEXT, 1);
        rig.ring.descriptor(1, data + 16, 512, WRITE | NEXT, 2);
        rig.ring.descriptor(2, status, 1, WRITE, 0);
        map.write_obj(0xee_u8, GuestAddress(status)).unwrap();
        rig.ring.offer(0);
        rig.kick().unwrap();
        rig.visible.set(pages(status, 0x1000), Visibility::Private);
        open.store(true, Ordering::SeqCst);
        rig.backend().unwrap();
        assert_eq!(rig.wait(), (0, 512), "{name}");
        assert_eq!(map.read_obj::<u8>(GuestAddress(status)).unwrap(), 0xee, "{name}");
    }
}

#[test]
fn a_reset_in_flight_ends_all_access_and_the_next_driver_works() {
    Rig::each(1 << 20, |name, rig| {
        for round in 0..30_u64 {
            for _ in 0..16 {
                rig.ring.send(&[&header(IN, 0)], &[32 << 10, 1]);
            }
            rig.kick().unwrap();
            rig.running = None;
            assert!(
                rig.visible.drain(pages(0, LOW_END), Duration::ZERO),
                "{name} {round}"
            );
            assert!(!readable(&rig.block, 0), "{name} {round}");
            let zeros = vec![0; 1 << 20];
            rig.mem.write_slice(&zeros, GuestAddress(RING)).unwrap();
            std::thread::sleep(Duration::from_micros(100));
            assert!(
                rig.ring.read(RING, 1 << 20) == zeros,
                "{name} {round}: written after the reset"
            );
            rig.ring = MockRing::new(&rig.mem, RING, 64);
            let (with, _) = activation(&rig.mem, &[&rig.ring], ALL);
            rig.running = Some(rig.block.activate(with).unwrap());
        }
        assert!(rig.request(IN, 1, &[], 512).2 == pattern(1024)[512..], "{name}");
    });
}

#[test]
fn many_drivers_cost_no_descriptors() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    Rig::each(4096, |name, rig| {
        let before = count();
        for _ in 0..2000 {
            rig.running = None;
            rig.ring = MockRing::new(&rig.mem, RING, 64);
            let (with, _) = activation(&rig.mem, &[&rig.ring], ALL);
            rig.running = Some(rig.block.activate(with).unwrap());
        }
        // Other tests of this process open descriptors at the same time.
        assert!(count() < before + 500, "{name}");
    });
}

#[test]
fn a_host_error_is_the_guests_error_and_nothing_else() {
    Rig::each(8192, |name, rig| {
        rig.file.set_len(4096).unwrap();
        assert_eq!(rig.request(IN, 12, &[], 512), (1, 0, vec![0; 512]), "{name}");
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
        assert_eq!(rig.request(OUT, 12, &[1; 512], 0).0, 0, "{name}");
    });
    // A disk that the host refuses to write stands for one that is full.
    for (name, make) in ENGINES {
        let file = File::open("/proc/self/exe").unwrap();
        let Ok(mut rig) = Rig::open(&file, false, ALL, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_eq!(rig.request(OUT, 0, &[1; 512], 0), (1, 1, vec![]), "{name}");
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0),
            (1, 1, vec![]),
            "{name}"
        );
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
    }
}

#[test]
fn a_batch_gets_one_interrupt() {
    let mut rig = Rig::open(
        &disk_file(64 << 10),
        false,
        ALL,
        |disk| Ok(disk.inline_engine(64)),
    )
    .unwrap();
    for _ in 0..21 {
        rig.ring.send(&[&header(IN, 0)], &[512, 1]);
    }
    rig.kick().unwrap();
    assert_eq!(rig.irq.take(), 1);
    assert_eq!((0..21).filter_map(|_| rig.ring.take_used()).count(), 21);
}

#[test]
fn one_kick_moves_a_bounded_amount_and_asks_to_be_called_again() {
    let mut rig = Rig::open(&disk_file(1 << 20), false, ALL, |disk| Ok(disk.inline_engine(64))).unwrap();
    let data = HIGH;
    for i in 0..20_u16 {
        let at = rig.ring.buffer(32);
        rig.mem.write_slice(&header(IN, 0), GuestAddress(at)).unwrap();
        rig.ring.descriptor(i * 3, at, 16, NEXT, i * 3 + 1);
        rig.ring
            .descriptor(i * 3 + 1, data, 1 << 20, WRITE | NEXT, i * 3 + 2);
        rig.ring.descriptor(i * 3 + 2, at + 16, 1, WRITE, 0);
        rig.ring.offer(i * 3);
    }
    rig.kick().unwrap();
    let first = (0..20).map_while(|_| rig.ring.take_used()).count();
    assert_eq!(first, 16);
    assert!(readable(&rig.block, 0));
    rig.backend().unwrap();
    assert_eq!((0..20).map_while(|_| rig.ring.take_used()).count(), 4);
    assert!(!readable(&rig.block, 0));
    assert_eq!(
        rig.irq.take(),
        1,
        "the driver asked for an interrupt at the first entry only"
    );
}

#[test]
fn each_queue_works_and_a_disabled_one_is_left_alone() {
    let file = disk_file(64 << 10);
    let mut block = Block::open(file, false, 3, ID).unwrap();
    assert_eq!(block.queue_sizes(), [QUEUE_SIZE; 3]);
    assert_ne!(block.features() & feature::MQ, 0);
    let (mem, _) = memory();
    let mut rings = [0, 1, 2].map(|i| MockRing::new(&mem, RING + i * 0x20_0000, 64));
    let (mut with, irqs) = activation(&mem, &rings.each_ref(), ALL);
    with.queues[1] = None;
    let mut running = block.activate(with).unwrap();
    for queue in [0, 2, 1, 7] {
        if let Some(ring) = rings.get_mut(queue) {
            ring.send(&[&header(IN, queue as u64)], &[512, 1]);
        }
        running.on_kick(queue).unwrap();
    }
    let until = Instant::now() + LONG;
    for queue in [0, 2] {
        while rings[queue].take_used().is_none() {
            assert!(Instant::now() < until, "queue {queue}");
            if readable(&block, 100) {
                running.on_backend().unwrap();
            }
        }
        assert_eq!(irqs[queue].take(), 1);
    }
    assert!(rings[1].take_used().is_none());
}

#[test]
fn the_configuration_says_what_is_true() {
    let block = Block::open(disk_file(10_000), false, 4, ID).unwrap();
    assert_eq!(block.capacity_bytes(), 9728);
    let field = |at: u64, size: usize| {
        let mut raw = [0; 8];
        block.read_config(at, &mut raw[..size]);
        u64::from_le_bytes(raw)
    };
    let fields = [
        ("capacity", 0, 8, 19),
        ("size_max", 8, 4, 0),
        ("seg_max", 12, 4, 510),
        ("blk_size", 20, 4, 512),
        ("writeback", 32, 1, 0),
        ("num_queues", 34, 2, 4),
        ("max_discard_sectors", 36, 4, 1 << 22),
        ("max_discard_seg", 40, 4, 1),
        ("max_write_zeroes_sectors", 48, 4, 1 << 22),
        ("max_write_zeroes_seg", 52, 4, 1),
        ("write_zeroes_may_unmap", 56, 1, 1),
    ];
    for (name, at, size, expected) in fields {
        assert_eq!(field(at, size), expected, "{name}");
    }
    for at in [57, 60, 61, u64::MAX] {
        assert_eq!(field(at, 8), 0, "past the end at {at}");
    }
    let known = ALL | feature::SEG_MAX | feature::BLK_SIZE | feature::MQ;
    assert_eq!(block.features(), known);
    assert!(Block::open(disk_file(512), false, 0, ID).is_err());
}

/// One step of the model check.
#[derive(Clone, Debug)]
enum Op {
    Read(u64, usize),
    Write(u64, usize, u8),
    Discard(u64, u32),
    Zero(u64, u32, u32),
    Flush,
}

fn op() -> impl proptest::strategy::Strategy<Value = Op> {
    use proptest::prelude::*;
    prop_oneof![
        (0_u64..66, 1_usize..20).prop_map(|(s, n)| Op::Read(s, n)),
        (0_u64..66, 1_usize..20, any::<u8>()).prop_map(|(s, n, b)| Op::Write(s, n, b)),
        (0_u64..66, 0_u32..20).prop_map(|(s, n)| Op::Discard(s, n)),
        (0_u64..66, 0_u32..20, 0_u32..2).prop_map(|(s, n, f)| Op::Zero(s, n, f)),
        Just(Op::Flush),
    ]
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn the_disk_behaves_like_a_vector_of_bytes(ops in proptest::collection::vec(op(), 1..40)) {
        const SECTORS: usize = 64;
        Rig::each(SECTORS * 512, |name, rig| {
            let mut model = pattern(SECTORS * 512);
            for op in &ops {
                let span = |sector: u64, count: usize| {
                    let start = sector as usize * 512;
                    let inside = count != 0 && sector as usize + count <= SECTORS;
                    inside.then_some(start..start + count * 512)
                };
                let (at, answer) = match *op {
                    Op::Read(s, n) => (span(s, n), rig.request(IN, s, &[], n * 512)),
                    Op::Write(s, n, b) => (span(s, n), rig.request(OUT, s, &vec![b; n * 512], 0)),
                    Op::Discard(s, n) => (span(s, n as usize), rig.request(DISCARD, 0, &range(s, n, 0), 0)),
                    Op::Zero(s, n, f) => (span(s, n as usize), rig.request(WRITE_ZEROES, 0, &range(s, n, f), 0)),
                    Op::Flush => (Some(0..0), rig.request(FLUSH, 0, &[], 0)),
                };
                assert_eq!(answer.0, u8::from(at.is_none()), "{name} {op:?}");
                let Some(at) = at else { continue };
                match *op {
                    Op::Read(..) => assert!(answer.2 == model[at], "{name} {op:?}"),
                    Op::Write(_, _, b) => model[at].fill(b),
                    Op::Discard(..) | Op::Zero(..) => model[at].fill(0),
                    Op::Flush => {}
                }
            }
            let mut all = vec![0; SECTORS * 512];
            rig.file.read_exact_at(&mut all, 0).unwrap();
            assert!(all == model, "{name}: the disk differs from the model");
        });
    }
}

#[test]
fn scattered_guest_memory_is_one_request() {
    Rig::each(1 << 20, |name, rig| {
        let mut writable = vec![512; 60];
        writable.push(1);
        let (_, at) = rig.ring.send(&[&header(IN, 5)], &writable);
        rig.kick().unwrap();
        assert_eq!(rig.wait().1, 60 * 512 + 1, "{name}");
        let got: Vec<u8> = at[1..61].iter().flat_map(|a| rig.ring.read(*a, 512)).collect();
        assert!(got == pattern(65 * 512)[5 * 512..], "{name}");
    });
}
