//! Rates and bounds of a network card.

use super::super::super::mock::WRITE;
use super::*;

#[test]
fn frames_beyond_a_rate_wait_and_none_is_lost() {
    const OPERATIONS: u64 = 40;
    let rates = Rates {
        bytes: None,
        operations: Some(OPERATIONS),
    };
    let mut rig = limited(0, 128, rates);
    let frames = OPERATIONS as usize + 20;
    let frame = [[0; 12].as_slice(), &[7; 60]].concat();
    for _ in 0..frames {
        rig.rx.send(&[], &[1526]);
        rig.tx.send(&[&frame], &[]);
        rig.arrive(&[9; 60]);
    }
    let began = std::time::Instant::now();
    rig.running.on_kick(0).unwrap();
    rig.running.on_kick(1).unwrap();
    rig.settle();
    let (mut received, mut sent) = (0, 0);
    let mut calls = 0;
    while received < frames || sent < frames {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{received} received, {sent} sent"
        );
        while rig.rx.take_used().is_some() {
            received += 1;
        }
        sent += rig.sent().len() / 64;
        if rig.net.poll.ready().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            calls += 1;
            rig.running.on_backend().unwrap();
        }
    }
    assert!(
        began.elapsed() >= Duration::from_millis(450),
        "{:?}",
        began.elapsed()
    );
    assert!(calls <= 6 * frames, "{calls} calls");
}

#[test]
fn a_failed_link_is_told_of_once_per_second() {
    assert_eq!(rx::GATE.lines_in_a_second(), 1);
}

#[test]
fn one_wake_up_is_bounded_and_one_interrupt_tells_of_a_batch() {
    let mut rig = rig(0, 256);
    for _ in 0..200 {
        rig.rx.send(&[], &[100]);
    }
    rig.peer.write_all(&[0, 0, 0, 2, 7, 7].repeat(200)).unwrap();
    rig.running.on_backend().unwrap();
    assert_eq!(std::iter::from_fn(|| rig.rx.take_used()).count(), 64);
    assert_eq!(rig.irqs[0].take(), 1);
    rig.settle();
    assert_eq!(std::iter::from_fn(|| rig.rx.take_used()).count(), 136);
}

#[test]
fn a_full_link_holds_frames_back_without_losing_one() {
    let mut rig = rig(0, 512);
    let frame = pattern(9000);
    let mut expected = vec![];
    for i in 0..100_u8 {
        rig.tx.send(&[&[0; 12], &[i], &frame], &[]);
        expected.extend(9001_u32.to_be_bytes());
        expected.push(i);
        expected.extend(&frame);
    }
    rig.running.on_kick(1).unwrap();
    let at_once = std::iter::from_fn(|| rig.tx.take_used()).count();
    assert!(at_once < 100, "the socket took all: the test tests nothing");
    let mut sent = rig.sent();
    assert!(
        at_once * 9005 - sent.len() < 9005,
        "more than the rest of a frame"
    );
    while sent.len() < expected.len() {
        let before = sent.len();
        rig.running.on_backend().unwrap();
        sent.extend(rig.sent());
        assert!(sent.len() > before, "nothing moves");
    }
    assert!(sent == expected);
    assert_eq!(at_once + std::iter::from_fn(|| rig.tx.take_used()).count(), 100);
    rig.settle();
}

#[test]
fn one_wake_up_takes_at_most_256_frames_from_the_guest() {
    let mut rig = rig(0, 512);
    for _ in 0..300 {
        // Without a frame behind its header it is dropped, so that no link fills up.
        rig.tx.send(&[&[0; 12]], &[]);
    }
    let mut rounds = vec![];
    rig.running.on_kick(1).unwrap();
    for _ in 0..2 {
        rounds.push(std::iter::from_fn(|| rig.tx.take_used()).count());
        rig.running.on_backend().unwrap();
    }
    assert_eq!(rounds, [256, 44]);
}

#[test]
fn buffers_held_ready_are_one_or_enough_for_the_largest_frame() {
    // 43 of 1,526 bytes hold 65,562.
    for (features, most) in [(0, 1), (MRG_RXBUF, 43)] {
        let mut rig = rig(features, 256);
        let posted: Vec<_> = (0..200).map(|_| rig.rx.send(&[], &[1526]).1[0]).collect();
        rig.arrive(&[6; 60]);
        rig.settle();
        // Those that the device holds are where they were; the driver moves the others.
        let elsewhere = rig.rx.buffer(1526);
        for head in 1..200 {
            rig.rx.descriptor(head, elsewhere, 1526, WRITE, 0);
        }
        for _ in 0..100 {
            rig.arrive(&[7; 60]);
            rig.settle();
        }
        let held = posted.iter().filter(|at| rig.rx.read(**at + 12, 60) == [7; 60]);
        assert_eq!(held.count(), most);
    }
}

#[test]
fn a_stream_is_read_ahead_by_128_kib() {
    let (near, mut peer) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    peer.set_nonblocking(true).unwrap();
    let unread = near.try_clone().unwrap();
    let mut net = Net::new(vec![Box::new(Stream::new(near))], 0, None, mac()).unwrap();
    let (mem, _) = memory();
    let mut rx = MockRing::new(&mem, 0x10_0000, 16);
    let tx = MockRing::new(&mem, 0x80_0000, 16);
    let (with, _) = activation(&mem, &[&rx, &tx], 0);
    let mut running = net.activate(with).unwrap();
    let frame = [&1000_u32.to_be_bytes(), pattern(1000).as_slice()].concat();
    let sent = peer.write(&frame.repeat(200)).unwrap();
    for _ in 0..2 {
        rx.send(&[], &[1526]);
        running.on_kick(0).unwrap();
        running.on_backend().unwrap();
        let left = rustix::io::ioctl_fionread(&unread).unwrap();
        assert_eq!(sent as u64 - left, 128 << 10);
    }
}
