//! Rates of a disk, and how much it does at a time.

use std::sync::atomic::AtomicU16;

use arch::addr::Gpa;
use arch::mem::Watch;
use vm_memory::Permissions;

use super::*;
use crate::virtio::device::feature::INDIRECT_DESC;
use crate::virtio::mock::{INDIRECT, Late};

const OPERATIONS: u64 = 40;

/// A disk that keeps to [`OPERATIONS`], driven by `Rig`.
fn limited(file: &File) -> Rig {
    let disk = Disk::open(file.try_clone().unwrap()).unwrap();
    let engines = vec![disk.inline_engine(QUEUE_SIZE)];
    let rates = Rates {
        bytes: None,
        operations: Some(OPERATIONS),
    };
    let block = Block::new(disk, engines, false, ID)
        .unwrap()
        .limit(rates)
        .unwrap();
    Rig::start(file, block, ALL)
}

/// Reads until the burst is used up, and some more; gives the time that it took.
fn read(rig: &mut Rig, count: u64) -> Duration {
    let began = Instant::now();
    for _ in 0..count {
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0);
    }
    began.elapsed()
}

#[test]
fn after_a_burst_requests_wait_for_their_turn_and_all_are_served() {
    let mut rig = limited(&disk_file(4096));
    let took = read(&mut rig, OPERATIONS + 20);
    assert!(took >= Duration::from_millis(450), "{took:?}");
    assert!(took < LONG, "{took:?}");
}

#[test]
fn a_driver_cannot_reset_itself_to_a_full_bucket() {
    let file = disk_file(4096);
    let mut rig = limited(&file);
    read(&mut rig, OPERATIONS);
    rig.running = None;
    let Rig { block, .. } = rig;
    let mut again = Rig::start(&file, block, ALL);
    let took = read(&mut again, 20);
    assert!(took >= Duration::from_millis(400), "{took:?}");
}

#[test]
fn a_disk_that_waits_does_not_ask_to_be_called() {
    let mut rig = limited(&disk_file(4096));
    read(&mut rig, OPERATIONS);
    let sent: Vec<_> = (0..10)
        .map(|_| rig.ring.send(&[&header(IN, 0)], &[512, 1]))
        .collect();
    rig.kick().unwrap();
    let mut calls = 0;
    let mut served = 0;
    while served < sent.len() {
        if readable(&rig.block, 100) {
            calls += 1;
            rig.backend().unwrap();
        }
        while rig.ring.take_used().is_some() {
            served += 1;
        }
    }
    // One call for each token that came back, and for the engine's own notes.
    assert!(calls <= 3 * sent.len(), "{calls} calls");
}

#[test]
fn a_failed_disk_is_told_of_once_per_second() {
    assert_eq!(running::GATE.lines_in_a_second(), 1);
}

/// A driver on another vCPU: at each look of the device at the ring there is one request more, up to a hundred.
#[derive(Debug)]
struct Eager {
    mem: SharedMem,
    index: u64,
    offered: AtomicU16,
}

impl Watch for Eager {
    fn before(&self, at: Gpa, _: u64, access: Permissions) {
        if at.0 == self.index && access == Permissions::Read {
            let offered = self.offered.fetch_add(1, Ordering::SeqCst) + 1;
            self.mem
                .write_obj(offered.min(100), GuestAddress(self.index))
                .unwrap();
        }
    }
}

#[test]
fn one_call_serves_no_more_requests_than_the_queue_has_room_for() {
    const TABLE: u64 = 0x60_0000;
    let disk = Disk::open(disk_file(4096)).unwrap();
    let engine = disk.inline_engine(QUEUE_SIZE);
    let mut block = Block::new(disk, vec![engine], false, ID).unwrap();
    assert_eq!(block.queue_sizes(), [512], "a driver may choose fewer");
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, 64);
    mem.write_slice(&header(FLUSH, 0), GuestAddress(TABLE + 0x100))
        .unwrap();
    ring.put(TABLE, 0, TABLE + 0x100, 16, NEXT, 1);
    ring.put(TABLE, 1, TABLE + 0x200, 1, WRITE, 0);
    for head in 0..64 {
        ring.descriptor(head, TABLE, 32, INDIRECT, 0);
        ring.offer(head);
    }
    ring.set_available(0);
    let eager = Eager {
        index: ring.avail() + 2,
        mem: mem.clone(),
        offered: AtomicU16::new(0),
    };
    let watched = mem.watched(Arc::new(eager));
    let (with, _) = activation(&watched, &[&ring], ALL | INDIRECT_DESC);
    let mut running = block.activate(with).unwrap();
    running.on_kick(0).unwrap();
    assert_eq!((0..100).map_while(|_| ring.take_used()).count(), 64);
    assert!(readable(&block, 0), "it asks to be called again");
    running.on_backend().unwrap();
    assert_eq!((0..100).map_while(|_| ring.take_used()).count(), 36);
}

/// A disk with an engine for each of so many queues, and their rings.
struct Wide {
    block: Block,
    running: Box<dyn Running>,
    rings: Vec<MockRing>,
}

impl Wide {
    fn start(mut block: Block) -> Self {
        let (mem, _) = memory();
        let rings: Vec<_> = (0..block.queue_sizes().len() as u64)
            .map(|i| MockRing::new(&mem, RING + i * 0x4_0000, 64))
            .collect();
        let (with, _) = activation(&mem, &rings.iter().collect::<Vec<_>>(), ALL | feature::MQ);
        Self {
            running: block.activate(with).unwrap(),
            block,
            rings,
        }
    }

    fn answered(&mut self, queue: usize) -> usize {
        std::iter::from_fn(|| self.rings[queue].take_used()).count()
    }

    fn all_answered(&mut self) -> usize {
        (0..self.rings.len()).map(|queue| self.answered(queue)).sum()
    }

    /// Offers a read of 4 MiB from the start of the disk.
    fn offer_4_mib(&mut self, queue: usize, slot: u16) {
        let ring = &mut self.rings[queue];
        let at = ring.buffer(32);
        ring.mem.write_slice(&header(IN, 0), GuestAddress(at)).unwrap();
        ring.descriptor(slot * 3, at, 16, NEXT, slot * 3 + 1);
        ring.descriptor(slot * 3 + 1, 0x80_0000, 4 << 20, WRITE | NEXT, slot * 3 + 2);
        ring.descriptor(slot * 3 + 2, at + 16, 1, WRITE, 0);
        ring.offer(slot * 3);
    }
}

#[test]
fn all_queues_of_a_disk_in_memory_together_move_4_mib_in_a_turn() {
    let disk = Disk::open(disk_file(4 << 20)).unwrap();
    let engines = (0..16).map(|_| disk.inline_engine(QUEUE_SIZE)).collect();
    let mut wide = Wide::start(Block::new(disk, engines, false, ID).unwrap());
    for queue in 0..16 {
        wide.offer_4_mib(queue, 0);
        wide.offer_4_mib(queue, 1);
        wide.running.on_kick(queue).unwrap();
        assert_eq!(wide.answered(queue), 1);
    }
    for turn in 0..16 {
        assert!(readable(&wide.block, 0), "{turn}: it asks to be called again");
        wide.running.on_backend().unwrap();
        assert_eq!(wide.all_answered(), 1, "{turn}");
    }
}

/// Notes what is begun and finishes nothing.
#[derive(Debug)]
struct Sink(Arc<AtomicU16>);

impl Engine for Sink {
    fn submit(&mut self, _: &SharedMem, _: u64, _: Action<'_>) -> Result<(), Refused> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn run(&mut self, _: &mut Vec<Done>, _: &mut u64) -> io::Result<bool> {
        Ok(false)
    }
    fn in_flight(&self) -> usize {
        0
    }
    fn quiesce(&mut self, _: Duration) -> bool {
        true
    }
}

#[test]
fn all_queues_together_begin_16_mib_in_a_call_and_each_gets_its_turn() {
    let disk = Disk::open(disk_file(4 << 20)).unwrap();
    let begun: Vec<Arc<AtomicU16>> = (0..3).map(|_| Arc::default()).collect();
    let engines = begun
        .iter()
        .map(|count| Box::new(Sink(Arc::clone(count))) as Box<dyn Engine>)
        .collect();
    let mut wide = Wide::start(Block::new(disk, engines, false, ID).unwrap());
    let mut expected = [4, 4, 4];
    for queue in 0..3 {
        for slot in 0..14 {
            wide.offer_4_mib(queue, slot);
        }
        wide.running.on_kick(queue).unwrap();
    }
    let now = || [0, 1, 2].map(|i: usize| begun[i].load(Ordering::SeqCst));
    for turn in 0..6 {
        assert_eq!(now(), expected, "{turn}");
        wide.running.on_backend().unwrap();
        expected[turn % 3] += 4;
    }
}

#[test]
fn a_queue_that_is_always_full_leaves_something_of_the_rate_to_others() {
    let disk = Disk::open(disk_file(4096)).unwrap();
    let engines = (0..2).map(|_| disk.inline_engine(QUEUE_SIZE)).collect();
    let rates = Rates {
        bytes: None,
        operations: Some(OPERATIONS),
    };
    let block = Block::new(disk, engines, false, ID).unwrap();
    let mut wide = Wide::start(block.limit(rates).unwrap());
    let offer = |ring: &mut MockRing| ring.send(&[&header(FLUSH, 0)], &[1]);
    for _ in 0..30 {
        offer(&mut wide.rings[0]);
    }
    wide.running.on_kick(0).unwrap();
    let (mut first, mut second, mut burst) = (0, 0, true);
    while second < 5 {
        if readable(&wide.block, 20) {
            wide.running.on_backend().unwrap();
        }
        let count = wide.answered(0);
        for _ in 0..count {
            offer(&mut wide.rings[0]);
        }
        first += count;
        second += wide.answered(1);
        if burst {
            wide.running.on_kick(0).unwrap();
        }
        if burst && first >= OPERATIONS as usize {
            burst = false;
            for _ in 0..5 {
                offer(&mut wide.rings[1]);
            }
            wide.running.on_kick(1).unwrap();
        }
        assert!(first < OPERATIONS as usize + 60, "{second} of the second queue");
    }
}

/// A driver on another vCPU that has the next range ready whenever the device has done one.
#[test]
fn one_call_frees_no_more_of_a_disk_in_memory_than_64_mib() {
    let file = disk_file(512);
    file.set_len(64 << 20).unwrap();
    let disk = Disk::open(file).unwrap();
    let engine = disk.inline_engine(QUEUE_SIZE);
    let mut block = Block::new(disk, vec![engine], false, ID).unwrap();
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, 64);
    for _ in 0..20 {
        ring.send(&[&header(DISCARD, 0), &range(0, 64 << 11, 0)], &[1]);
    }
    ring.set_available(1);
    let watched = mem.watched(Arc::new(Late::new(&ring, 20)));
    let (with, _) = activation(&watched, &[&ring], ALL);
    let mut running = block.activate(with).unwrap();
    running.on_kick(0).unwrap();
    assert_eq!((0..100).map_while(|_| ring.take_used()).count(), 1);
    assert!(readable(&block, 0), "it asks to be called again");
}
