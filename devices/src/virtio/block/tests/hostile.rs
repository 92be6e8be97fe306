//! Chains and timing of a hostile driver.

use super::*;

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

/// An engine that starts and finishes nothing before the test says so.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) inner: Box<dyn Engine>,
    pub(super) open: Arc<AtomicBool>,
}

impl Engine for Held {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        self.inner.submit(mem, tag, action)
    }
    fn run(&mut self, done: &mut Vec<Done>, copies: &mut u64) -> io::Result<bool> {
        match self.open.load(Ordering::SeqCst) {
            true => self.inner.run(done, copies),
            false => Ok(false),
        }
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn quiesce(&mut self, limit: Duration) -> bool {
        if self.open.load(Ordering::SeqCst) || self.in_flight() == 0 {
            return self.inner.quiesce(limit);
        }
        // Whoever waits is found out, without making the test as slow.
        std::thread::sleep(limit.min(Duration::from_secs(1)));
        false
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
            rig.begin_again(64);
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
            rig.begin_again(64);
        }
        // Other tests of this process open descriptors at the same time.
        assert!(count() < before + 500, "{name}");
    });
}

/// Addresses that a random descriptor may name: the rings, buffers, a private page, a hole, nonsense.
const PLACES: [u64; 8] = [
    RING,
    RING + 0x6000,
    0x20_0000,
    0x20_0ff0,
    0x20_1000,
    LOW_END - 16,
    LOW_END,
    u64::MAX - 8,
];

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn random_rings_neither_panic_nor_reach_private_memory(
        table in proptest::collection::vec((0_usize..8, 0_u32..1100, 0_u16..8, 0_u16..20), 16),
        kinds in proptest::collection::vec((0_u32..15, 0_u64..200), 4),
        heads in proptest::collection::vec(0_u16..20, 1..12),
    ) {
        Rig::each(64 << 10, |name, rig| {
            let private = pages(0x20_1000, 0x1000);
            let map = Arc::clone(rig.mem.mapping());
            map.write_slice(&[0x5a; 0x1000], GuestAddress(0x20_1000)).unwrap();
            rig.visible.set(private, Visibility::Private);
            for (i, (kind, sector)) in kinds.iter().enumerate() {
                let at = GuestAddress(0x20_0000 + i as u64 * 16);
                rig.mem.write_slice(&header(*kind, *sector), at).unwrap();
            }
            for (index, (place, length, flags, next)) in table.iter().enumerate() {
                // Most chains begin with a header, most lengths are whole sectors.
                let (at, length) = match length % 3 {
                    0 => (0x20_0000 + u64::from(length % 4) * 16, 16),
                    1 => (PLACES[*place], length / 400 * 512),
                    _ => (PLACES[*place], *length),
                };
                rig.ring.descriptor(index as u16, at, length, *flags, *next);
            }
            for head in &heads {
                rig.ring.offer(*head);
            }
            let alive = rig.kick().is_ok();
            let until = Instant::now() + Duration::from_millis(2);
            while alive && Instant::now() < until && readable(&rig.block, 0) {
                if rig.backend().is_err() {
                    break;
                }
            }
            rig.running = None;
            assert!(rig.visible.drain(pages(0, LOW_END), Duration::ZERO), "{name}");
            let mut seen = [0; 0x1000];
            map.read_slice(&mut seen, GuestAddress(0x20_1000)).unwrap();
            assert!(seen == [0x5a; 0x1000], "{name}: private memory was written");
        });
    }
}
