//! A disk of 64 KiB.

use std::fs::File;
use std::sync::Arc;

use arch::blockio::Enter;
use devices::virtio::block::Block;
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};

use super::{Chain, Host, Void};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

const BYTES: u64 = 64 << 10;
const QUEUES: u16 = 2;
/// Kinds of request: the six that exist, three that are unknown.
const KINDS: [u32; 9] = [0, 1, 4, 8, 11, 13, 10, 14, 0x8000_0000];

/// A disk whose requests are over at once.
pub fn disk_in_memory() -> Host {
    host(memfd_create("fuzzed", MemfdFlags::CLOEXEC).unwrap().into(), false)
}

/// A disk whose requests are in flight for a while, on io_uring where the kernel has that.
pub fn disk_on_ring() -> Host {
    let dir = std::env::var_os("CVMM_FUZZ_DIR").unwrap_or_else(|| "/var/tmp".into());
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    host(rustix::fs::open(dir, flags, mode).unwrap().into(), false)
}

fn host(file: File, read_only: bool) -> Host {
    file.set_len(BYTES).unwrap();
    let enter: Enter = Arc::new(|| Ok(()));
    let block = Block::open(file, read_only, QUEUES, *b"serial-0123456789-xy", &enter).unwrap();
    Host {
        device: Some(Box::new(block)),
        outside: Box::new(Void),
        typical,
        probe,
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut raw = vec![0; 16];
    raw[..4].copy_from_slice(&kind.to_le_bytes());
    raw[8..].copy_from_slice(&sector.to_le_bytes());
    raw
}

fn typical(input: &mut Input<'_>) -> Chain {
    let (kind, sector, sectors) = (input.u8(), u64::from(input.u8()), u32::from(input.u8() & 31));
    let queue = u16::from(kind >> 7);
    let kind = KINDS[usize::from(kind) % KINDS.len()];
    let mut buffers = vec![Buffer::Readable(header(kind, sector))];
    match kind {
        0 if sectors != 0 => buffers.push(Buffer::Writable(sectors * 512)),
        1 if sectors != 0 => buffers.push(Buffer::Readable(vec![7; sectors as usize * 512])),
        8 => buffers.push(Buffer::Writable(20)),
        11 | 13 => {
            let mut range = sector.to_le_bytes().to_vec();
            range.extend(sectors.to_le_bytes());
            range.extend(u32::from(input.u8() & 3).to_le_bytes());
            buffers.push(Buffer::Readable(range));
        }
        _ => {}
    }
    buffers.push(Buffer::Writable(1));
    (queue, buffers)
}

fn probe(run: &mut Run) {
    let buffers = [
        Buffer::Readable(header(0, 1)),
        Buffer::Writable(512),
        Buffer::Writable(1),
    ];
    let sent = run.guest.send(&run.machine, 0, &buffers, false);
    let (_, places) = sent.expect("an empty queue has room");
    run.machine.write(places[2], &[0xee]);
    run.guest.kick(&run.machine, 0);
    let began = std::time::Instant::now();
    while run.guest.recycle(&run.machine, 0) == 0 {
        run.machine.settle();
        assert!(
            began.elapsed().as_secs() < 5,
            "the disk does not answer a good request"
        );
    }
    assert_eq!(
        run.machine.read(places[2]),
        Some([0]),
        "the disk fails a good request"
    );
}
