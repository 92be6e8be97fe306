//! At each limit of the device, and one beyond.

use super::*;

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
