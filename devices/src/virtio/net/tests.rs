//! A card on a stream.

mod config;
mod frames;
mod host;
mod lifecycle;
mod limits;
mod several;

use std::io::{Read, Write};
use std::time::Duration;

use super::super::mock::{IrqCount, MockRing, activation, memory};
use super::*;

/// A device on a stream, with the far end of the stream.
struct Rig {
    rx: MockRing,
    tx: MockRing,
    irqs: Vec<IrqCount>,
    net: Net,
    running: Box<dyn Running>,
    peer: UnixStream,
}

const ADDRESS: &str = "02:00:00:00:00:07";

fn mac() -> MacAddress {
    ADDRESS.parse().unwrap()
}

fn rig(features: u64, size: u16) -> Rig {
    limited(features, size, Rates::default())
}

/// A rig whose device keeps to `rates` in both directions.
fn limited(features: u64, size: u16, rates: Rates) -> Rig {
    let (near, peer) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    peer.set_nonblocking(true).unwrap();
    let (mem, _) = memory();
    let rx = MockRing::new(&mem, 0x10_0000, size);
    let tx = MockRing::new(&mem, 0x80_0000, size);
    let net = Net::new(vec![Box::new(Stream::new(near))], 0, None, mac()).unwrap();
    let mut net = net.limit(rates, rates).unwrap();
    let (with, irqs) = activation(&mem, &[&rx, &tx], features);
    let running = net.activate(with).unwrap();
    Rig {
        rx,
        tx,
        irqs,
        net,
        running,
        peer,
    }
}

impl Rig {
    /// Runs the backend until the device no longer asks for it; panics if it never stops asking.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.net.poll.ready().is_empty() {
                return;
            }
            self.running.on_backend().unwrap();
        }
        panic!("the device spins");
    }

    fn arrive(&mut self, frame: &[u8]) {
        let bytes = [&(frame.len() as u32).to_be_bytes(), frame].concat();
        self.peer.write_all(&bytes).unwrap();
    }

    /// What the far end got.
    fn sent(&mut self) -> Vec<u8> {
        let mut bytes = vec![];
        let mut part = [0; 65536];
        while let Ok(count) = self.peer.read(&mut part) {
            bytes.extend_from_slice(&part[..count]);
        }
        bytes
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}
