//! Frames in memory that lies.

use std::io::{Read, Write};

use super::super::lies::{Lie, Memory, Outside, Subject, check};
use super::super::mock::MockRing;
use super::super::mock::activation;
use super::super::queue::QueueBroken;
use super::*;
use arch::mem::SharedMem;

const HEADER: [u8; 12] = [0; 12];

struct Wires {
    mem: SharedMem,
    peer: UnixStream,
    _net: Net,
}

fn work(running: &mut dyn Running, outside: &Outside) -> Result<(), QueueBroken> {
    let wires: &Wires = outside.downcast_ref().unwrap();
    for queue in [1, 0] {
        let _batch = wires.mem.batch();
        running.on_kick(queue)?;
    }
    for _ in 0..2 {
        let _batch = wires.mem.batch();
        running.on_backend()?;
    }
    Ok(())
}

fn effect(outside: &mut Outside) -> Vec<u8> {
    let wires: &mut Wires = outside.downcast_mut().unwrap();
    let mut sent = vec![];
    let _ = wires.peer.read_to_end(&mut sent);
    sent
}

/// A frame in `pieces`, and two that arrive for buffers of these lengths.
fn subject(memory: &Memory, features: u64, pieces: &[&[u8]], rooms: &[&[u32]]) -> (Subject, Vec<Lie>) {
    let (near, peer) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    peer.set_nonblocking(true).unwrap();
    let mut rx = MockRing::new(&memory.driver, 0x10_0000, 16);
    let mut tx = MockRing::new(&memory.driver, 0x80_0000, 16);
    let mut net = Net::new(
        vec![Box::new(Stream::new(near))],
        CSUM,
        None,
        MacAddress::of_device(1),
    )
    .unwrap();
    let (with, _) = activation(&memory.device, &[&rx, &tx], features);
    let running = net.activate(with).unwrap();
    let mut buffers = vec![];
    for room in rooms {
        let (_, at) = rx.send(&[], room);
        buffers.extend(at.into_iter().zip(room.iter().map(|len| *len as usize)));
    }
    let (_, at) = tx.send(pieces, &[]);
    for len in [60_u32, 400] {
        let mut frame = len.to_be_bytes().to_vec();
        frame.resize(len as usize + 4, 0x5a);
        (&peer).write_all(&frame).unwrap();
    }
    let lies = vec![
        Lie::new("flags", at[0], &[1]),
        Lie::new("offload", at[0] + 1, &[3]),
        Lie::new("checksum offset", at[0] + 8, &[0xff, 0xff]),
    ];
    let subject = Subject {
        rings: vec![rx, tx],
        running: Some(running),
        work,
        outside: Box::new(Wires {
            mem: memory.driver.clone(),
            peer,
            _net: net,
        }),
        effect,
        buffers,
    };
    (subject, lies)
}

#[test]
fn frames_withstand_memory_that_lies() {
    let whole = [&HEADER[..], &[0xa5; 200]].concat();
    let many: Vec<&[u8]> = std::iter::once(&HEADER[..])
        .chain(whole[12..].chunks(50))
        .collect();
    let summed = [&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0][..], &[0xa5; 200]].concat();
    check("one piece", &|memory: &Memory| {
        subject(memory, 0, &[&whole], &[&[1526], &[1526]])
    });
    check("pieces", &|memory: &Memory| {
        subject(memory, 0, &many, &[&[12, 1500], &[100, 400]])
    });
    check("merged buffers", &|memory: &Memory| {
        subject(
            memory,
            net_feature::MRG_RXBUF | CSUM,
            &[&summed],
            &[&[50], &[50], &[300], &[400]],
        )
    });
}
