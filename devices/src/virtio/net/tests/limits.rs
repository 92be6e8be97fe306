//! Rates and bounds of a network card.

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
