use std::hash::{DefaultHasher, Hasher};
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

#[test]
fn a_host_process_reaches_a_guest_port() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_in(52);
    assert!(key.host >= 1 << 30);
    socket.write_all(b"ping").unwrap();
    assert_eq!(guest.ops(), (vec![op::RW], b"ping".to_vec()));
    guest.send(key, op::RW, 0, b"pong");
    let mut answer = [0; 4];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
    socket.write_all(b"last words").unwrap();
    drop(socket);
    assert_eq!(guest.ops(), (vec![op::RW, op::SHUTDOWN], b"last words".to_vec()));
    guest.send(key, op::RST, 0, &[]);
    guest.send(key, op::RW, 0, b"?");
    assert_eq!(guest.ops().0, [op::RST], "the connection is forgotten");
}

#[test]
fn a_guest_reaches_a_host_service_and_its_last_bytes_arrive() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_out(7);
    guest.send(key, op::RW, 0, b"last words");
    guest.send(key, op::SHUTDOWN, SHUT_BOTH, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
    let mut all = vec![];
    socket.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
}

#[test]
fn either_side_closes_one_direction_and_the_other_lives_on() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_out(7);
    socket.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags, packets.len()),
        (op::SHUTDOWN, SHUT_SEND, 1)
    );
    guest.send(key, op::RW, 0, b"still there");
    let mut bytes = [0; 11];
    socket.read_exact(&mut bytes).unwrap();
    drop(socket);
    let packets = guest.receive();
    assert_eq!((packets[0].0.flags, packets.len()), (SHUT_BOTH, 1));
    guest.send(key, op::RST, 0, &[]);

    let (key, mut socket) = guest.open_out(8);
    guest.send(key, op::SHUTDOWN, SHUT_SEND, &[]);
    assert!(is_closed(&mut socket));
    socket.write_all(b"more").unwrap();
    assert_eq!(guest.ops(), (vec![op::RW], b"more".to_vec()));
    guest.send(key, op::SHUTDOWN, SHUT_RECEIVE, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
    assert!(socket.write_all(b"more").is_err());
}

#[test]
fn packets_that_do_not_belong_are_dropped_or_reset() {
    let mut guest = guest();
    guest.post(16);
    let (key, _socket) = guest.open_out(7);
    let stranger = Key { host: 9, guest: 9 };
    let base = |guest: &Guest, key, op| guest.packet(key, op, 0, 0);
    let cases: Vec<(&str, Header, &[u16])> = vec![
        (
            "spoofed source",
            Header {
                src_cid: 43,
                ..base(&guest, key, op::RST)
            },
            &[],
        ),
        (
            "source host",
            Header {
                src_cid: 2,
                ..base(&guest, key, op::RST)
            },
            &[],
        ),
        (
            "other destination",
            Header {
                dst_cid: 3,
                ..base(&guest, stranger, op::REQUEST)
            },
            &[],
        ),
        (
            "seqpacket",
            Header {
                kind: 2,
                ..base(&guest, stranger, op::REQUEST)
            },
            &[op::RST],
        ),
        ("nobody listens", base(&guest, stranger, op::REQUEST), &[op::RST]),
        ("stray data", base(&guest, stranger, op::RW), &[op::RST]),
        ("stray response", base(&guest, stranger, op::RESPONSE), &[op::RST]),
        ("stray shutdown", base(&guest, stranger, op::SHUTDOWN), &[op::RST]),
        ("stray reset", base(&guest, stranger, op::RST), &[]),
        ("stray credit", base(&guest, stranger, op::CREDIT_UPDATE), &[]),
        ("garbage", base(&guest, stranger, 0xffff), &[op::RST]),
        (
            "more length than payload",
            guest.packet(key, op::RW, 0, 1),
            &[op::RST],
        ),
    ];
    for (name, header, answer) in cases {
        guest.put(&header, &[]);
        assert_eq!(guest.ops().0, answer, "{name}");
    }
    guest.tx.send(&[&[0; HEADER_BYTES - 1]], &[]);
    assert!(guest.running.as_mut().unwrap().on_kick(1).is_err());
}

#[test]
fn a_receive_buffer_without_room_breaks_the_queue() {
    let mut guest = guest();
    guest.rx.send(&[], &[HEADER_BYTES as u32]);
    guest.running.as_mut().unwrap().on_kick(0).unwrap();
    let stray = guest.packet(Key { host: 1, guest: 1 }, op::RW, 0, 0);
    guest.tx.send(&[&stray.bytes()], &[]);
    assert!(guest.running.as_mut().unwrap().on_kick(1).is_err());
}

#[test]
fn the_guest_gets_no_more_than_its_credit_and_is_asked_once() {
    let mut guest = guest();
    guest.post(16);
    guest.room = 100;
    let (key, mut socket) = guest.open_in(5);
    socket.write_all(&[7; 250]).unwrap();
    assert_eq!(guest.ops(), (vec![op::RW, op::CREDIT_REQUEST], vec![7; 100]));
    guest.send(key, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.ops(), (vec![], vec![]), "an update without room");
    guest.forwarded = 60;
    guest.send(key, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.ops(), (vec![op::RW, op::CREDIT_REQUEST], vec![7; 60]));
    guest.forwarded = 5000;
    guest.send(key, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.ops().1, [], "more forwarded than was sent");
    guest.forwarded = 160;
    guest.send(key, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.ops(), (vec![op::RW], vec![7; 90]));
}

#[test]
fn the_end_of_a_stream_needs_no_credit() {
    let mut guest = guest();
    guest.post(16);
    guest.room = 0;
    let (_, socket) = guest.open_in(5);
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.ops().0, [op::SHUTDOWN]);
    let (_, mut socket) = guest.open_in(6);
    socket.write_all(b"x").unwrap();
    drop(socket);
    assert_eq!(guest.ops().0, [op::CREDIT_REQUEST], "data comes first");
}

#[test]
fn a_guest_that_overruns_our_buffer_is_reset_and_one_that_does_not_loses_nothing() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_out(7);
    let chunk = [5; 0x8000];
    let mut sent = 0_usize;
    // The socket's own buffer takes some; then ours fills up.
    let last = loop {
        guest.send(key, op::RW, 0, &chunk);
        let packets = guest.receive();
        match packets.last() {
            Some((header, _)) if header.op == op::RST => break header.fwd_cnt,
            _ => sent += chunk.len(),
        }
        assert!(sent < 16 << 20, "no limit");
    };
    assert_eq!(last, 0);
    assert!(sent >= WINDOW as usize);
    let mut all = vec![];
    let _ = socket.read_to_end(&mut all);
    assert!(all.len() < sent, "a violation drops what was held");

    let (key, mut socket) = guest.open_out(8);
    let (mut sent, mut got, mut credit) = (0_u32, Vec::<u8>::new(), (WINDOW, 0_u32));
    while got.len() < 4 << 20 {
        let room = credit.0 - sent.wrapping_sub(credit.1);
        if room >= chunk.len() as u32 && sent < 4 << 20 {
            guest.send(key, op::RW, 0, &chunk);
            sent += chunk.len() as u32;
        } else {
            let mut part = [0; 0x1_0000];
            if let Ok(count) = socket.read(&mut part) {
                got.extend(&part[..count]);
            }
        }
        for (header, _) in guest.receive() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            credit = (header.buf_alloc, header.fwd_cnt);
        }
    }
    assert_eq!(got.len(), 4 << 20);
}

#[test]
fn held_bytes_outlive_the_guests_shutdown() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_out(7);
    let mut sent = vec![];
    while guest.vsock_holds_nothing(&mut sent, key) {}
    guest.send(key, op::SHUTDOWN, SHUT_BOTH, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
    let mut got = Vec::<u8>::new();
    let mut part = [0; 0x1_0000];
    loop {
        match socket.read(&mut part) {
            Ok(0) => break,
            Ok(count) => got.extend(&part[..count]),
            Err(_) => guest.settle(),
        }
    }
    assert!(got == sent);
}

impl Guest {
    /// Sends a chunk; false once the device had to keep some of 128 KiB, which it shows by credit.
    fn vsock_holds_nothing(&mut self, sent: &mut Vec<u8>, key: Key) -> bool {
        let before = sent.len();
        for i in 0..4 {
            let chunk = vec![(before / 1000 + i) as u8; 0x8000];
            sent.extend(&chunk);
            self.send(key, op::RW, 0, &chunk);
        }
        self.send(key, op::CREDIT_REQUEST, 0, &[]);
        let forwarded = self.receive().last().unwrap().0.fwd_cnt as usize;
        forwarded == sent.len()
    }
}

#[test]
fn request_lines_may_come_in_pieces_and_nothing_behind_them_is_lost() {
    let mut guest = guest();
    guest.post(16);
    let mut socket = UnixStream::connect(&guest.path).unwrap();
    for piece in ["CON", "NECT 5", "2\nearly"] {
        socket.write_all(piece.as_bytes()).unwrap();
        guest.settle();
    }
    let packets = guest.receive();
    assert_eq!(packets[0].0.op, op::REQUEST);
    let key = Key {
        host: packets[0].0.src_port,
        guest: 52,
    };
    guest.send(key, op::RESPONSE, 0, &[]);
    assert_eq!(guest.ops(), (vec![op::RW], b"early".to_vec()));

    for bad in [
        "CONNECT x\n",
        "GET / HTTP/1.1\n",
        "CONNECT 0000000000000000000000000000000001\n",
        "\n",
    ] {
        let mut socket = UnixStream::connect(&guest.path).unwrap();
        socket.write_all(bad.as_bytes()).unwrap();
        guest.settle();
        assert!(is_closed(&mut socket), "{bad:?}");
        assert_eq!(guest.ops().0, [0_u16; 0], "{bad:?}");
    }
}

#[test]
fn a_refused_request_closes_the_process_socket() {
    let mut guest = guest();
    guest.post(16);
    let mut socket = UnixStream::connect(&guest.path).unwrap();
    socket.write_all(b"CONNECT 9\n").unwrap();
    let header = guest.receive()[0].0;
    guest.send(
        Key {
            host: header.src_port,
            guest: 9,
        },
        op::RST,
        0,
        &[],
    );
    assert!(is_closed(&mut socket));
    let mut socket = UnixStream::connect(&guest.path).unwrap();
    socket.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(guest.ops().0, [op::REQUEST]);
    drop(socket);
    assert_eq!(guest.ops().0, [op::RST], "the process gave up");
}

#[test]
fn without_receive_buffers_everything_waits_and_nothing_spins() {
    let mut guest = guest();
    let mut socket = UnixStream::connect(&guest.path).unwrap();
    socket.write_all(b"CONNECT 9\n").unwrap();
    guest.settle();
    guest.post(1);
    let header = guest.receive()[0].0;
    let key = Key {
        host: header.src_port,
        guest: 9,
    };
    guest.send(key, op::RESPONSE, 0, &[]);
    socket.write_all(&[1; 10_000]).unwrap();
    let (ops, data) = guest.ops();
    assert!(ops.len() >= 3, "one buffer at a time");
    assert_eq!(data, [1; 10_000]);
}

#[test]
fn a_storm_is_answered_within_limits() {
    let mut guest = guest();
    for port in 0..5000 {
        guest.send(
            Key {
                host: port,
                guest: port,
            },
            op::RW,
            0,
            b"x",
        );
    }
    guest.post(32);
    assert_eq!(guest.ops().0, [op::RST; RESETS]);
    guest.send(Key { host: 1, guest: 1 }, op::RW, 0, b"x");
    assert_eq!(guest.ops().0, [op::RST]);
}

/// A guest without receive buffers that opens and drops connections must not make the queue of turns grow.
#[test]
fn connections_that_are_gone_wait_for_no_turn() {
    let mut guest = guest();
    let (listener, path) = guest.service(7);
    for _ in 0..100 {
        guest.send(Key { host: 7, guest: 1 }, op::REQUEST, 0, &[]);
        drop(listener.accept().unwrap());
        guest.send(Key { host: 7, guest: 1 }, op::RST, 0, &[]);
        guest.settle();
    }
    let mux = &guest.running.as_ref().unwrap().mux;
    assert_eq!((mux.len(), mux.ready.len()), (0, 0));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn connections_beyond_the_limit_are_refused_and_come_back_with_room() {
    let files = rustix::process::Resource::Nofile;
    let mut limit = rustix::process::getrlimit(files);
    limit.current = limit.maximum;
    rustix::process::setrlimit(files, limit).unwrap();
    let mut guest = guest();
    guest.post(32);
    let (listener, path) = guest.service(7);
    let mut kept = vec![];
    for port in 0..CONNECTIONS as u32 {
        let key = Key { host: 7, guest: port };
        guest.send(key, op::REQUEST, 0, &[]);
        let packets = guest.receive();
        assert_eq!(packets[0].0.op, op::RESPONSE, "{port}");
        let wide = (port as usize) < WIDE_CONNECTIONS + 1;
        assert_eq!(packets[0].0.buf_alloc, if wide { WINDOW } else { NARROW_WINDOW });
        kept.push(listener.accept().unwrap().0);
    }
    let one_more = Key { host: 7, guest: 5000 };
    guest.send(one_more, op::REQUEST, 0, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
    let mut process = UnixStream::connect(&guest.path).unwrap();
    guest.settle();
    assert!(is_closed(&mut process));
    guest.send(Key { host: 7, guest: 3 }, op::RST, 0, &[]);
    guest.send(one_more, op::REQUEST, 0, &[]);
    assert_eq!(guest.ops().0, [op::RESPONSE]);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn silence_is_not_waited_for_for_ever() {
    let mut guest = guest();
    guest.post(32);
    let mut quiet: Vec<_> = (0..PENDING_LINES)
        .map(|_| UnixStream::connect(&guest.path).unwrap())
        .collect();
    guest.settle();
    let mut beyond = UnixStream::connect(&guest.path).unwrap();
    guest.settle();
    assert!(is_closed(&mut beyond));
    quiet[0].write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(guest.ops().0, [op::REQUEST]);
    quiet
        .iter()
        .for_each(|socket| socket.set_nonblocking(true).unwrap());
    assert!(quiet.iter_mut().all(|socket| !is_closed(socket)));
    let until = Instant::now() + TIME_LIMIT + Duration::from_millis(200);
    let mut ops = vec![];
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
        ops.extend(guest.ops().0);
    }
    assert_eq!(ops, [op::RST]);
    assert!(quiet.iter_mut().all(is_closed));
}

#[test]
fn a_guest_that_still_reads_is_not_reset_by_the_time_limit() {
    let mut guest = guest();
    guest.post(32);
    let (key, mut socket) = guest.open_in(5);
    socket.write_all(b"slowly read").unwrap();
    drop(socket);
    assert_eq!(guest.ops().0, [op::RW, op::SHUTDOWN]);
    std::thread::sleep(TIME_LIMIT + Duration::from_millis(200));
    assert_eq!(guest.ops().0, [0_u16; 0]);
    guest.send(key, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.ops().0, [0_u16; 0]);
    guest.send(key, op::SHUTDOWN, SHUT_BOTH, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
}

#[test]
fn a_driver_reset_closes_all_connections_and_keeps_the_listener() {
    let mut guest = guest();
    guest.post(16);
    let (_, mut socket) = guest.open_in(5);
    let (with, _) = activation(&guest.rx.mem.clone(), &[&guest.rx, &guest.tx], 0);
    assert!(guest.vsock.activate(with).is_err(), "one driver at a time");
    guest.running = None;
    assert!(is_closed(&mut socket));
    let mut early = UnixStream::connect(&guest.path).unwrap();
    early.write_all(b"CONNECT 6\n").unwrap();
    assert!(guest.vsock.host.poll.ready().is_empty());
    guest.start();
    guest.post(16);
    assert_eq!(guest.ops().0, [op::REQUEST]);
    let path = guest.path.clone();
    drop(guest);
    assert!(!path.exists());
}

fn pattern(from: u64, bytes: &mut [u8]) {
    for (at, word) in (from / 8..).zip(bytes.as_chunks_mut::<8>().0) {
        *word = at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    }
}

fn digest(from: u64, len: u64) -> u64 {
    let (mut hasher, mut part) = (DefaultHasher::new(), vec![0; 1 << 16]);
    for at in (0..len).step_by(1 << 16) {
        pattern(from + at, &mut part);
        hasher.write(&part);
    }
    hasher.finish()
}

#[test]
fn a_hundred_mebibytes_go_both_ways_intact() {
    const TOTAL: u64 = 100 << 20;
    let mut guest = guest();
    guest.post(RING);
    let (key, socket) = guest.open_in(5);
    socket.set_nonblocking(false).unwrap();
    let mut writer = socket.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let mut part = vec![0; 1 << 16];
        for at in (0..TOTAL).step_by(1 << 16) {
            pattern(at, &mut part);
            writer.write_all(&part).unwrap();
        }
    });
    let mut reader = socket;
    let reading = std::thread::spawn(move || {
        let (mut hasher, mut part) = (DefaultHasher::new(), vec![0; 1 << 16]);
        for _ in (0..TOTAL).step_by(1 << 16) {
            reader.read_exact(&mut part).unwrap();
            hasher.write(&part);
        }
        (hasher.finish(), reader)
    });
    let (mut sent, mut got) = (0_u64, 0_u64);
    let (mut hasher, mut block) = (DefaultHasher::new(), vec![]);
    let mut credit = (WINDOW, 0_u32);
    let mut part = vec![0; 1 << 15];
    let until = Instant::now() + Duration::from_secs(120);
    while sent < TOTAL || got < TOTAL || credit.1 != TOTAL as u32 {
        assert!(Instant::now() < until, "stuck at {sent} sent, {got} received");
        let room = credit.0.saturating_sub((sent as u32).wrapping_sub(credit.1));
        if sent < TOTAL && room >= part.len() as u32 {
            pattern((1 << 40) + sent, &mut part);
            guest.send(key, op::RW, 0, &part);
            sent += part.len() as u64;
        } else if sent == TOTAL {
            guest.send(key, op::CREDIT_REQUEST, 0, &[]);
        }
        guest.running.as_mut().unwrap().on_backend().unwrap();
        for (header, payload) in guest.arrived() {
            credit = (header.buf_alloc, header.fwd_cnt);
            got += payload.len() as u64;
            block.extend(payload);
        }
        while let Some(whole) = block.get(..1 << 16) {
            hasher.write(whole);
            block.drain(..1 << 16);
        }
        if (got as u32).wrapping_sub(guest.forwarded) > ROOM / 2 {
            guest.forwarded = got as u32;
            guest.send(key, op::CREDIT_UPDATE, 0, &[]);
        }
    }
    writing.join().unwrap();
    let (read, _socket) = reading.join().unwrap();
    assert_eq!(read, digest(1 << 40, TOTAL));
    assert_eq!(hasher.finish(), digest(0, TOTAL));
}

/// One step of a hostile day.
#[derive(Clone, Debug)]
enum Step {
    Packet {
        host: u32,
        guest: u32,
        op: u16,
        flags: u32,
        len: u32,
        payload: usize,
        room: u32,
        forwarded: u32,
    },
    Connect(u32),
    Line(usize, Vec<u8>),
    Write(usize, usize),
    Read(usize),
    Shut(usize, bool),
    Close(usize),
    Buffers(u16),
    Reset,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    let size = prop_oneof![Just(0_u32), 1_u32..5000, Just(WINDOW), any::<u32>()];
    let packet = (
        0_u32..4,
        0_u32..3,
        0_u16..9,
        0_u32..5,
        size.clone(),
        0_usize..9000,
        size,
        0_u32..9000,
    );
    let packet = packet.prop_map(
        |(host, guest, op, flags, len, payload, room, forwarded)| Step::Packet {
            host,
            guest,
            op,
            flags,
            // Mostly honest lengths.
            len: if len.is_multiple_of(4) {
                len
            } else {
                payload as u32
            },
            payload,
            room,
            forwarded,
        },
    );
    prop_oneof![
        12 => packet,
        3 => (0_u32..3).prop_map(Step::Connect),
        1 => (0_usize..8, proptest::collection::vec(any::<u8>(), 0..50)).prop_map(|(i, line)| Step::Line(i, line)),
        4 => (0_usize..8, 1_usize..300_000).prop_map(|(i, len)| Step::Write(i, len)),
        3 => (0_usize..8).prop_map(Step::Read),
        1 => (0_usize..8, any::<bool>()).prop_map(|(i, write)| Step::Shut(i, write)),
        1 => (0_usize..8).prop_map(Step::Close),
        3 => (0_u16..40).prop_map(Step::Buffers),
        1 => Just(Step::Reset),
    ]
}

/// The guest's side of a hostile day.
struct Day {
    guest: Guest,
    listener: UnixListener,
    sockets: Vec<UnixStream>,
    /// Keys on which the device has asked for a connection.
    asked: Vec<Key>,
    posted: u16,
}

impl Day {
    fn run(&mut self, step: Step) {
        let guest = &mut self.guest;
        let count = self.sockets.len().max(1);
        match step {
            Step::Packet {
                host,
                guest: port,
                op,
                flags,
                len,
                payload,
                room,
                forwarded,
            } => {
                // Host port 0 stands for the last connection that a process asked for.
                let key = match self.asked.last() {
                    Some(key) if host == 0 => *key,
                    _ => Key {
                        host: 6 + host,
                        guest: port,
                    },
                };
                let header = Header {
                    buf_alloc: room,
                    fwd_cnt: forwarded,
                    ..guest.packet(key, op, flags, len)
                };
                guest.put(&header, &vec![op as u8; payload]);
            }
            Step::Connect(port) => {
                let mut socket = UnixStream::connect(&guest.path).unwrap();
                socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
                self.sockets.push(socket);
            }
            Step::Line(_, line) => {
                let mut socket = UnixStream::connect(&guest.path).unwrap();
                socket.write_all(&line).unwrap();
                self.sockets.push(socket);
            }
            Step::Write(i, len) => {
                if let Some(mut socket) = self.sockets.get(i % count) {
                    socket.set_nonblocking(true).unwrap();
                    let _ = socket.write(&vec![1; len]);
                }
            }
            Step::Read(i) => {
                if let Some(mut socket) = self.sockets.get(i % count) {
                    socket.set_nonblocking(true).unwrap();
                    let _ = socket.read(&mut vec![0; 300_000]);
                }
            }
            Step::Shut(i, write) => {
                if let Some(socket) = self.sockets.get(i % count) {
                    let _ = socket.shutdown(if write { Shutdown::Write } else { Shutdown::Read });
                }
            }
            Step::Close(i) if i < self.sockets.len() => drop(self.sockets.swap_remove(i)),
            Step::Close(_) => {}
            Step::Buffers(count) if self.posted == 0 => {
                guest.post(count);
                self.posted = count;
            }
            Step::Buffers(_) => {
                let packets = guest.arrived();
                let requests = packets.iter().filter(|(header, _)| header.op == op::REQUEST);
                self.asked.extend(requests.map(|(header, _)| Key {
                    host: header.src_port,
                    guest: header.dst_port,
                }));
            }
            Step::Reset => {
                guest.running = None;
                guest.start();
                self.posted = 0;
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(150))]
    #[test]
    fn no_order_of_events_stops_spins_or_bloats_the_device(steps in proptest::collection::vec(step(), 1..120)) {
        let guest = guest();
        let (listener, service) = guest.service(7);
        listener.set_nonblocking(true).unwrap();
        let mut day = Day { guest, listener, sockets: vec![], asked: vec![], posted: 0 };
        for step in steps {
            day.run(step);
            day.guest.settle();
            day.sockets.extend(day.listener.accept().map(|(socket, _)| socket));
            let held = day.guest.running.as_mut().unwrap().mux.held();
            proptest::prop_assert!(held <= day.sockets.len().max(20) * WINDOW as usize);
        }
        // When all processes are gone and the guest resets what it knows of, only the time limit is left.
        day.sockets.clear();
        drop(day.listener);
        std::fs::remove_file(service).unwrap();
        if day.posted == 0 {
            day.guest.post(32);
        }
        day.guest.receive();
        for host in 6..10 {
            day.asked.extend((0..3).map(|guest| Key { host, guest }));
        }
        for key in day.asked {
            day.guest.send(key, op::RST, 0, &[]);
        }
        let mux = &mut day.guest.running.as_mut().unwrap().mux;
        mux.expire(Instant::now() + TIME_LIMIT);
        day.guest.receive();
        day.guest.running.as_mut().unwrap().mux.expire(Instant::now() + TIME_LIMIT);
        let left = day.guest.running.as_mut().unwrap().mux.len();
        proptest::prop_assert_eq!(left, 0);
    }
}
