//! A guest, a device and processes of the host.

mod connections;
mod credit;
mod limits;
mod orders;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::mock::{MockRing, WRITE, activation, memory};
use super::packet::{HEADER_BYTES, Header, Key, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM, op};
use super::run::VsockRunning;
use super::*;

const CID: u64 = 42;
const RING: u16 = 64;
const BUFFER: u64 = 4096 + HEADER_BYTES as u64;
/// Room that the guest announces unless a test says otherwise.
const ROOM: u32 = 1 << 20;

/// A driver that recycles its buffers, and its device.
struct Guest {
    rx: MockRing,
    tx: MockRing,
    tx_next: u16,
    vsock: Vsock,
    running: Option<VsockRunning>,
    path: PathBuf,
    room: u32,
    forwarded: u32,
}

fn guest() -> Guest {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(format!("cvmm-vsock-{}-{}", id.0, id.1));
    let (mem, _) = memory();
    let mut guest = Guest {
        rx: MockRing::new(&mem, 0x10_0000, RING),
        tx: MockRing::new(&mem, 0x80_0000, RING),
        tx_next: 0,
        vsock: Vsock::open(CID, &path).unwrap(),
        running: None,
        path,
        room: ROOM,
        forwarded: 0,
    };
    guest.start();
    guest
}

impl Guest {
    fn start(&mut self) {
        let mem = self.rx.mem.clone();
        self.rx = MockRing::new(&mem, 0x10_0000, RING);
        self.tx = MockRing::new(&mem, 0x80_0000, RING);
        self.tx_next = 0;
        let (with, _) = activation(&mem, &[&self.rx, &self.tx], 0);
        let host = Arc::clone(&self.vsock.host);
        self.running = Some(VsockRunning::start(with, CID, host).unwrap());
    }

    fn post(&mut self, count: u16) {
        for index in 0..count {
            let at = self.rx.buffer(BUFFER as usize);
            self.rx.descriptor(index, at, BUFFER as u32, WRITE, 0);
            self.rx.offer(index);
        }
        self.running.as_mut().unwrap().on_kick(0).unwrap();
    }

    fn address(&self, index: u32) -> u64 {
        self.rx
            .mem
            .read_obj(GuestAddress(self.rx.table() + u64::from(index) * 16))
            .unwrap()
    }

    /// Lets the device work until it asks for nothing more.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.vsock.host.poll.ready().is_empty() {
                return;
            }
            self.running.as_mut().unwrap().on_backend().unwrap();
        }
        panic!("the device spins");
    }

    /// Packets that arrived; their buffers are given back.
    fn arrived(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = vec![];
        while let Some((head, len)) = self.rx.take_used() {
            let bytes = self.rx.read(self.address(head), len as usize);
            let (header, payload) = bytes.split_first_chunk().unwrap();
            let header = Header::parse(header);
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (2, CID, STREAM));
            assert_eq!(header.len as usize, payload.len());
            packets.push((header, payload.to_vec()));
            self.rx.offer(u16::try_from(head).unwrap());
        }
        if !packets.is_empty() {
            self.running.as_mut().unwrap().on_kick(0).unwrap();
        }
        packets
    }

    /// All packets until nothing more comes.
    fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = vec![];
        loop {
            self.settle();
            let packets = self.arrived();
            if packets.is_empty() {
                return all;
            }
            all.extend(packets);
        }
    }

    /// Operations of what arrives, and all payload.
    fn ops(&mut self) -> (Vec<u16>, Vec<u8>) {
        let packets = self.receive();
        let ops = packets.iter().map(|(header, _)| header.op).collect();
        (
            ops,
            packets.into_iter().flat_map(|(_, payload)| payload).collect(),
        )
    }

    fn packet(&self, key: Key, op: u16, flags: u32, len: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: key.guest,
            dst_port: key.host,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.room,
            fwd_cnt: self.forwarded,
        }
    }

    fn put(&mut self, header: &Header, payload: &[u8]) {
        let at = self.tx.base + 0x1_0000 + u64::from(self.tx_next) * 0x1_0000;
        let bytes = [&header.bytes(), payload].concat();
        self.tx.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
        self.tx.descriptor(self.tx_next, at, bytes.len() as u32, 0, 0);
        self.tx.offer(self.tx_next);
        self.tx_next = (self.tx_next + 1) % RING;
        self.running.as_mut().unwrap().on_kick(1).unwrap();
        assert!(self.tx.take_used().is_some());
    }

    fn send(&mut self, key: Key, op: u16, flags: u32, payload: &[u8]) {
        let header = self.packet(key, op, flags, payload.len() as u32);
        self.put(&header, payload);
    }

    fn service(&self, port: u32) -> (UnixListener, PathBuf) {
        let path = PathBuf::from(format!("{}_{port}", self.path.display()));
        let _ = std::fs::remove_file(&path);
        (UnixListener::bind(&path).unwrap(), path)
    }

    /// A connection that the guest opened to a service on `port`.
    fn open_out(&mut self, port: u32) -> (Key, UnixStream) {
        let (listener, path) = self.service(port);
        let key = Key {
            host: port,
            guest: 1000 + port,
        };
        self.send(key, op::REQUEST, 0, &[]);
        assert_eq!(self.ops().0, [op::RESPONSE]);
        std::fs::remove_file(path).unwrap();
        let socket = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        (key, socket)
    }

    /// A connection that a host process opened to guest `port`.
    fn open_in(&mut self, port: u32) -> (Key, UnixStream) {
        let mut socket = UnixStream::connect(&self.path).unwrap();
        socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let packets = self.receive();
        assert_eq!(packets.len(), 1);
        let header = packets[0].0;
        assert_eq!((header.op, header.dst_port), (op::REQUEST, port));
        let key = Key {
            host: header.src_port,
            guest: port,
        };
        self.send(key, op::RESPONSE, 0, &[]);
        let mut line = [0; 64];
        let len = socket.read(&mut line).unwrap();
        assert_eq!(line[..len], *format!("OK {}\n", key.host).as_bytes());
        socket.set_nonblocking(true).unwrap();
        (key, socket)
    }
}

fn is_closed(socket: &mut UnixStream) -> bool {
    let mut bytes = [0; 64];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) => return e.kind() == ErrorKind::ConnectionReset,
        }
    }
}
