//! Links that end, devices that are reset, drivers that leave a queue out.

use super::super::super::mock::Late;
use super::super::super::queue::QueueBroken;
use super::*;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_peer_that_goes_or_lies_leaves_a_dead_link_that_swallows_frames() {
    for lie in [None, Some(65551_u32)] {
        let mut rig = rig(0, 16);
        rig.rx.send(&[], &[2000]);
        match lie {
            None => drop(std::mem::replace(&mut rig.peer, UnixStream::pair().unwrap().0)),
            Some(length) => rig.peer.write_all(&length.to_be_bytes()).unwrap(),
        }
        rig.settle();
        rig.tx.send(&[&[0; 12], b"frame"], &[]);
        rig.running.on_kick(1).unwrap();
        rig.settle();
        assert!(rig.tx.take_used().is_some());
        assert_eq!(rig.rx.take_used(), None);
    }
}

#[test]
fn a_dead_link_swallows_more_frames_than_one_wake_up_takes() {
    let mut rig = rig(0, 256);
    rig.rx.send(&[], &[1526]);
    drop(std::mem::replace(&mut rig.peer, UnixStream::pair().unwrap().0));
    rig.settle();
    for _ in 0..256 {
        rig.tx.send(&[&[0; 13]], &[]);
    }
    rig.running.on_kick(1).unwrap();
    rig.settle();
    assert_eq!(std::iter::from_fn(|| rig.tx.take_used()).count(), 256);
    let event: u16 = rig
        .tx
        .mem
        .read_obj(GuestAddress(rig.tx.used_ring() + 4 + 256 * 8))
        .unwrap();
    assert_eq!(event, 256, "the driver is to kick for the next frame");
}

#[test]
fn a_reset_gives_the_link_back_even_in_the_middle_of_a_frame() {
    let Rig {
        rx,
        tx,
        mut net,
        mut running,
        mut peer,
        ..
    } = rig(0, 16);
    let mem = rx.mem.clone();
    let (with, _) = activation(&mem, &[&rx, &tx], 0);
    assert!(net.activate(with).is_err(), "one driver at a time");
    peer.write_all(&[0, 0, 0, 5, b'f', b'r']).unwrap();
    running.on_backend().unwrap();
    drop(running);
    assert!(net.poll.ready().is_empty());
    let mut rx = MockRing::new(&mem, 0x10_0000, 16);
    let (with, _) = activation(&mem, &[&rx, &tx], 0);
    let mut running = net.activate(with).unwrap();
    let (_, at) = rx.send(&[], &[100]);
    peer.write_all(b"ame").unwrap();
    running.on_backend().unwrap();
    assert_eq!(rx.read(at[0] + 12, 5), b"frame");
}

/// Found by fuzzing: a frame that the last driver left in memory kept the event thread awake for ever.
#[test]
fn a_driver_without_a_receive_queue_costs_nothing_while_a_frame_waits() {
    let mut rig = rig(0, 16);
    rig.rx.send(&[], &[1526]);
    rig.arrive(&pattern(60));
    rig.arrive(&pattern(60));
    rig.settle();
    assert!(rig.rx.take_used().is_some());
    drop(std::mem::replace(&mut rig.running, Box::new(Nobody)));
    let (mut with, _) = activation(&rig.rx.mem.clone(), &[&rig.rx, &rig.tx], 0);
    with.queues[0] = None;
    rig.running = rig.net.activate(with).unwrap();
    rig.running.on_kick(0).unwrap();
    rig.settle();
}

struct Nobody;

impl Running for Nobody {
    fn on_kick(&mut self, _queue: usize) -> Result<(), QueueBroken> {
        Ok(())
    }
    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        Ok(())
    }
}

#[test]
fn buffers_that_arrive_while_the_device_asks_for_kicks_are_not_forgotten() {
    let (near, mut peer) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut net = Net::new(vec![Box::new(Stream::new(near))], 0, None, mac()).unwrap();
    let (mem, _) = memory();
    let (mut rx, tx) = (
        MockRing::new(&mem, 0x10_0000, 16),
        MockRing::new(&mem, 0x80_0000, 16),
    );
    rx.send(&[], &[1526]);
    rx.send(&[], &[70_000]);
    rx.set_available(0);
    let watched = mem.watched(Arc::new(Late::new(&rx, 2)));
    let (with, _) = activation(&watched, &[&rx, &tx], MRG_RXBUF | GUEST_CSUM | GUEST_TSO4);
    let mut running = net.activate(with).unwrap();
    peer.write_all(&[0, 0, 0, 1, 7]).unwrap();
    for _ in 0..10 {
        if !net.poll.ready().is_empty() {
            running.on_backend().unwrap();
        }
    }
    assert!(rx.take_used().is_some());
}
