//! Connections are opened, refused, closed and reset.

use super::*;

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
