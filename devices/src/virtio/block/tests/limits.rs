//! Rates of a disk.

use super::*;

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
