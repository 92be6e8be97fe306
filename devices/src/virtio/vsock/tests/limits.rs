//! At each limit of the device, and one beyond. The numbers are those of THREAT_MODEL.md.

use super::*;

/// A guest whose queues are longer than a wake-up.
fn long_queues() -> Guest {
    let mut guest = guest();
    let mem = guest.rx.mem.clone();
    guest.running = None;
    guest.rx = MockRing::new(&mem, 0x10_0000, 512);
    guest.tx = MockRing::new(&mem, 0x80_0000, 512);
    let (with, _) = activation(&mem, &[&guest.rx, &guest.tx], 0);
    let host = Arc::clone(&guest.vsock.host);
    guest.running = Some(VsockRunning::start(with, CID, host).unwrap());
    guest
}

/// Sends all that the connection has credit for; gives the window that the guest was told.
fn fill(guest: &mut Guest, key: Key) -> u32 {
    let mut sent = 0_u32;
    loop {
        guest.send(key, op::CREDIT_REQUEST, 0, &[]);
        let (header, _) = guest.receive().pop().unwrap();
        assert_eq!(header.op, op::CREDIT_UPDATE);
        let room = header.buf_alloc - (sent - header.fwd_cnt);
        if room == 0 {
            return header.buf_alloc;
        }
        let chunk = room.min(0x8000);
        guest.send(key, op::RW, 0, &vec![5; chunk as usize]);
        sent += chunk;
    }
}

fn held(guest: &mut Guest) -> usize {
    guest.running.as_mut().unwrap().mux.held()
}

#[test]
fn one_wake_up_takes_at_most_256_packets_from_the_guest() {
    let mut guest = long_queues();
    let spoofed = Header {
        src_cid: 43,
        ..guest.packet(Key { host: 1, guest: 1 }, op::RW, 0, 0)
    };
    for _ in 0..300 {
        guest.tx.send(&[&spoofed.bytes()], &[]);
    }
    let running = guest.running.as_mut().unwrap();
    running.on_kick(1).unwrap();
    assert_eq!(std::iter::from_fn(|| guest.tx.take_used()).count(), 256);
    running.on_backend().unwrap();
    assert_eq!(std::iter::from_fn(|| guest.tx.take_used()).count(), 44);
}

#[test]
fn one_wake_up_has_256_turns_of_at_most_16_packets() {
    let mut guest = long_queues();
    for port in 0..256 {
        let stranger = Key { host: 9, guest: port };
        guest.send(stranger, op::RW, 0, b"x");
    }
    let (_listener, path) = guest.service(7);
    guest.send(Key { host: 7, guest: 1 }, op::REQUEST, 0, &[]);
    for _ in 0..300 {
        guest.rx.send(&[], &[BUFFER as u32]);
    }
    let running = guest.running.as_mut().unwrap();
    running.on_kick(0).unwrap();
    assert_eq!(std::iter::from_fn(|| guest.rx.take_used()).count(), 256);
    running.on_backend().unwrap();
    assert_eq!(std::iter::from_fn(|| guest.rx.take_used()).count(), 1);
    std::fs::remove_file(path).unwrap();

    let mut guest = long_queues();
    guest.post(512);
    let sockets = [5, 6].map(|port| guest.open_in(port).1);
    for mut socket in &sockets {
        assert!(socket.write(&[1; 64 * 4096]).unwrap() > 31 * 4096);
    }
    let packets = guest.receive();
    let turns = packets.chunk_by(|a, b| a.0.src_port == b.0.src_port);
    assert_eq!(turns.map(<[_]>::len).max(), Some(16));
}

#[test]
fn a_guest_that_overruns_our_buffer_is_reset_and_one_that_does_not_loses_nothing() {
    let mut guest = guest();
    guest.post(16);
    let (key, mut socket) = guest.open_out(7);
    // The socket's own buffer takes some; then ours fills up.
    assert_eq!(fill(&mut guest, key), 256 << 10);
    assert_eq!(held(&mut guest), 256 << 10);
    guest.send(key, op::RW, 0, b"x");
    assert_eq!(guest.ops().0, [op::RST]);
    assert_eq!(held(&mut guest), 0, "a violation drops what was held");
    assert!(is_closed(&mut socket));

    let chunk = [5; 0x8000];
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
    assert_eq!(guest.ops().0, [op::RST; 256]);
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
fn a_connection_waits_for_one_turn_however_often_it_is_due() {
    let mut guest = guest();
    let (_listener, path) = guest.service(7);
    let key = Key { host: 7, guest: 1 };
    guest.send(key, op::REQUEST, 0, &[]);
    for _ in 0..100 {
        guest.send(key, op::CREDIT_REQUEST, 0, &[]);
    }
    assert_eq!(guest.running.as_ref().unwrap().mux.ready.len(), 1);
    std::fs::remove_file(path).unwrap();
}

/// What was waited for stays on the list after it came; the list must not grow with all that came and went.
#[test]
fn what_is_waited_for_is_bounded_however_much_comes_and_goes() {
    let mut guest = guest();
    let (began, mut most) = (Instant::now(), 0);
    for _ in 0..5000 {
        drop(UnixStream::connect(&guest.path).unwrap());
        guest.settle();
        most = most.max(guest.running.as_ref().unwrap().mux.deadlines.len());
    }
    assert!(most <= 4096, "{most}");
    assert!(most == 4096 || began.elapsed() > TIME_LIMIT, "too slow to tell");
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
    let (mut kept, mut all) = (vec![], 0);
    for port in 0..1024 {
        let key = Key { host: 7, guest: port };
        guest.send(key, op::REQUEST, 0, &[]);
        let packets = guest.receive();
        assert_eq!(packets[0].0.op, op::RESPONSE, "{port}");
        let window = if port < 65 { 256 << 10 } else { 16 << 10 };
        assert_eq!(packets[0].0.buf_alloc, window, "{port}");
        all += window;
        kept.push(listener.accept().unwrap().0);
    }
    assert!(all <= 32 << 20, "all of them together");
    let one_more = Key { host: 7, guest: 5000 };
    let is_refused = |guest: &mut Guest| {
        guest.send(one_more, op::REQUEST, 0, &[]);
        assert_eq!(guest.ops().0, [op::RST]);
        let mut process = UnixStream::connect(&guest.path).unwrap();
        process.set_nonblocking(true).unwrap();
        guest.settle();
        assert!(is_closed(&mut process));
    };
    is_refused(&mut guest);
    // One that is closing still counts while a process has bytes of it to read.
    let closing = Key { host: 7, guest: 1023 };
    assert_eq!(fill(&mut guest, closing), 16 << 10);
    guest.send(closing, op::SHUTDOWN, SHUT_BOTH, &[]);
    assert_eq!(guest.ops().0, [op::RST]);
    is_refused(&mut guest);
    kept.pop();
    guest.settle();
    guest.send(one_more, op::REQUEST, 0, &[]);
    assert_eq!(guest.ops().0, [op::RESPONSE]);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn silence_is_not_waited_for_for_ever() {
    let mut guest = guest();
    guest.post(32);
    let began = Instant::now();
    let mut quiet: Vec<_> = (0..64)
        .map(|_| UnixStream::connect(&guest.path).unwrap())
        .collect();
    guest.settle();
    let mut beyond = UnixStream::connect(&guest.path).unwrap();
    beyond.set_nonblocking(true).unwrap();
    guest.settle();
    assert!(is_closed(&mut beyond));
    quiet[0].write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(guest.ops().0, [op::REQUEST]);
    quiet
        .iter()
        .for_each(|socket| socket.set_nonblocking(true).unwrap());
    assert!(quiet.iter_mut().all(|socket| !is_closed(socket)));
    let until = Instant::now() + Duration::from_millis(2200);
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
        let ops = guest.ops().0;
        if !ops.is_empty() {
            assert_eq!(ops, [op::RST]);
            assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
            break;
        }
    }
    guest.settle();
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
