//! Rates of a disk, and how much it does at a time.

use std::sync::atomic::AtomicU16;

use arch::addr::Gpa;
use arch::mem::Watch;
use vm_memory::Permissions;

use super::*;
use crate::virtio::device::feature::INDIRECT_DESC;
use crate::virtio::mock::INDIRECT;

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
