//! Bytes flow no faster than the receiver allows, and none is lost.

use std::hash::{DefaultHasher, Hasher};

use super::*;

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

/// Found by the search in `served.rs`.
#[test]
fn credit_counts_as_given_only_once_a_packet_carries_it() {
    let mut guest = guest();
    guest.post(1);
    let (key, mut socket) = guest.open_out(7);
    // One packet exactly, so that the device looks for more; but the guest has no second buffer.
    socket.write_all(&[1; 4096]).unwrap();
    guest.settle();
    let mut half = vec![0; WINDOW as usize / 2];
    for round in 0..2 {
        for piece in half.clone().chunks(32 << 10) {
            guest.send(key, op::RW, 0, piece);
        }
        socket.read_exact(&mut half).unwrap();
        let (ops, _) = guest.ops();
        let expected: &[u16] = if round == 0 {
            &[op::RW]
        } else {
            &[op::CREDIT_UPDATE]
        };
        assert_eq!(ops, expected, "round {round}");
    }
}
