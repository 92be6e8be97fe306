//! Packets in memory that lies.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::lies::{Lie, Memory, Outside, Subject, check};
use super::super::mock::{MockRing, activation};
use super::super::queue::QueueBroken;
use super::packet::{Header, STREAM, op};
use super::*;
use arch::mem::SharedMem;

const CID: u64 = 42;
const PORT: u32 = 7;

struct Wires {
    mem: SharedMem,
    service: UnixListener,
    path: PathBuf,
    _vsock: Vsock,
}

impl Drop for Wires {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn work(running: &mut dyn Running, outside: &Outside) -> Result<(), QueueBroken> {
    let wires: &Wires = outside.downcast_ref().unwrap();
    for queue in [1, 0] {
        let _batch = wires.mem.batch();
        running.on_kick(queue)?;
    }
    let _batch = wires.mem.batch();
    running.on_backend()
}

/// All that the service got, from each connection.
fn effect(outside: &mut Outside) -> Vec<u8> {
    let wires: &mut Wires = outside.downcast_mut().unwrap();
    let mut got = vec![];
    while let Ok((mut stream, _)) = UnixListener::accept(&wires.service) {
        UnixStream::set_nonblocking(&stream, true).unwrap();
        got.push(b'(');
        let _ = stream.read_to_end(&mut got);
        got.push(b')');
    }
    got
}

fn packet(op: u16, len: u32) -> Vec<u8> {
    let header = Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: 1000,
        dst_port: PORT,
        len,
        kind: STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    };
    let mut bytes = header.bytes().to_vec();
    bytes.resize(bytes.len() + len as usize, 0x5a);
    bytes
}

/// A connection that is opened and gets data, `split` between header and payload or not.
fn subject(memory: &Memory, split: bool) -> (Subject, Vec<Lie>) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "cvmm-lies-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    let mut vsock = Vsock::open(CID, &path).unwrap();
    let path = PathBuf::from(format!("{}_{PORT}", path.display()));
    let service = UnixListener::bind(&path).unwrap();
    service.set_nonblocking(true).unwrap();
    let mut rx = MockRing::new(&memory.driver, 0x10_0000, 16);
    let mut tx = MockRing::new(&memory.driver, 0x80_0000, 16);
    let (with, _) = activation(&memory.device, &[&rx, &tx], 0);
    let running = vsock.activate(with).unwrap();
    let buffers = (0..3).map(|_| (rx.send(&[], &[1000]).1[0], 44)).collect();
    let (_, first) = tx.send(&[&packet(op::REQUEST, 0)], &[]);
    let data = packet(op::RW, 100);
    let (head, payload) = data.split_at(if split { 44 } else { data.len() });
    let pieces: Vec<&[u8]> = [head, payload]
        .into_iter()
        .filter(|piece| !piece.is_empty())
        .collect();
    let (_, second) = tx.send(&pieces, &[]);
    let mut lies = vec![];
    for at in [first[0], second[0]] {
        lies.extend([
            Lie::new("source", at, &43_u64.to_le_bytes()),
            Lie::new("destination", at + 8, &3_u64.to_le_bytes()),
            Lie::new("port", at + 20, &8_u32.to_le_bytes()),
            Lie::new("length", at + 24, &99_u32.to_le_bytes()),
            Lie::new("length", at + 24, &u32::MAX.to_le_bytes()),
            Lie::new("type", at + 28, &2_u16.to_le_bytes()),
            Lie::new("operation", at + 30, &op::RST.to_le_bytes()),
            Lie::new("operation", at + 30, &op::SHUTDOWN.to_le_bytes()),
            Lie::new("credit", at + 36, &0_u32.to_le_bytes()),
        ]);
    }
    let subject = Subject {
        rings: vec![rx, tx],
        running: Some(running),
        work,
        outside: Box::new(Wires {
            mem: memory.driver.clone(),
            service,
            path,
            _vsock: vsock,
        }),
        effect,
        buffers,
    };
    (subject, lies)
}

#[test]
fn packets_withstand_memory_that_lies() {
    for split in [false, true] {
        check("packets", &move |memory: &Memory| subject(memory, split));
    }
}
