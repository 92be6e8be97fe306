//! Rates of a network card.

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
