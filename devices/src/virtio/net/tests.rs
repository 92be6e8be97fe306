mod limits;

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use super::super::mock::{IrqCount, MockRing, activation, memory};
use super::super::queue::QueueBroken;
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

#[test]
fn frames_reach_the_guest_in_as_many_buffers_as_they_need() {
    let cases: &[(&str, u64, usize, &[u32], &[u32])] = &[
        ("one byte", 0, 1, &[1526], &[13]),
        ("full frame, exact buffer", 0, 1514, &[1526], &[1526]),
        ("too small a buffer", 0, 1515, &[1526, 2000], &[]),
        ("empty frame", 0, 0, &[1526], &[]),
        ("one of two", MRG_RXBUF, 1514, &[1526, 1526], &[1526]),
        ("over two", MRG_RXBUF, 1515, &[1526, 1526], &[1526, 1]),
        (
            "over tiny buffers",
            MRG_RXBUF,
            30,
            &[12, 12, 12, 12],
            &[12, 12, 12, 6],
        ),
        ("more than all buffers", MRG_RXBUF, 40, &[12, 12, 12, 12], &[]),
        (
            "64 KiB over three",
            MRG_RXBUF,
            65535,
            &[30000, 30000, 30000],
            &[30000, 30000, 5547],
        ),
        ("the largest", MRG_RXBUF, 65550, &[65562], &[65562]),
    ];
    for (name, features, len, buffers, used) in cases {
        let mut rig = rig(*features, 16);
        let posted: Vec<_> = buffers.iter().map(|len| rig.rx.send(&[], &[*len])).collect();
        let frame = pattern(*len);
        rig.arrive(&frame);
        rig.settle();
        let mut got = vec![];
        for ((head, at), len) in posted.iter().zip(*used) {
            assert_eq!(rig.rx.take_used(), Some((u32::from(*head), *len)), "{name}");
            got.extend(rig.rx.read(at[0], *len as usize));
        }
        assert_eq!(rig.rx.take_used(), None, "{name}");
        assert_eq!(rig.irqs[0].take(), usize::from(!used.is_empty()), "{name}");
        if !used.is_empty() {
            let mut header = [0; 12];
            header[10] = used.len() as u8;
            assert_eq!(got[..12], header, "{name}");
            assert!(got[12..] == frame, "{name}");
        }
    }
}

#[test]
fn a_frame_that_grows_after_small_ones_is_intact() {
    let mut rig = rig(MRG_RXBUF, 64);
    for len in [60, 9000, 60, 40000, 1514] {
        let posted: Vec<_> = (0..40).map(|_| rig.rx.send(&[], &[1526]).1[0]).collect();
        let (frame, mut got) = (pattern(len), vec![]);
        rig.arrive(&frame);
        rig.settle();
        for at in posted {
            let Some((_, len)) = rig.rx.take_used() else { break };
            got.extend(rig.rx.read(at, len as usize));
        }
        assert!(got[12..] == frame, "{len}");
        // The buffers that were left go first next time; start afresh instead.
        rig = super::tests::rig(MRG_RXBUF, 64);
    }
}

#[test]
fn without_buffers_frames_wait_and_nothing_spins() {
    let mut rig = rig(0, 16);
    rig.arrive(b"first");
    rig.arrive(b"second");
    rig.settle();
    assert_eq!(rig.rx.take_used(), None);
    let (_, at) = rig.rx.send(&[], &[100]);
    rig.running.on_kick(0).unwrap();
    rig.settle();
    assert_eq!(rig.rx.read(at[0] + 12, 5), b"first");
    let (_, at) = rig.rx.send(&[], &[100]);
    rig.running.on_kick(0).unwrap();
    rig.settle();
    assert_eq!(rig.rx.read(at[0] + 12, 6), b"second");
}

#[test]
fn one_wake_up_is_bounded_and_one_interrupt_tells_of_a_batch() {
    let mut rig = rig(0, 256);
    for _ in 0..200 {
        rig.rx.send(&[], &[100]);
    }
    rig.peer.write_all(&[0, 0, 0, 2, 7, 7].repeat(200)).unwrap();
    rig.running.on_backend().unwrap();
    assert_eq!(std::iter::from_fn(|| rig.rx.take_used()).count(), 64);
    assert_eq!(rig.irqs[0].take(), 1);
    rig.settle();
    assert_eq!(std::iter::from_fn(|| rig.rx.take_used()).count(), 136);
}

#[test]
fn guest_frames_leave_whole_or_not_at_all() {
    let big = pattern(65551);
    let cases: &[(&str, &[&[u8]], Option<usize>)] = &[
        ("one buffer", &[&[&[0; 12], b"abc".as_slice()].concat()], Some(3)),
        ("header apart", &[&[0; 12], b"abc", b"d"], Some(4)),
        ("header in pieces", &[&[0; 5], &[0; 7], b"x"], Some(1)),
        ("header only", &[&[0; 12]], None),
        ("the largest", &[&[0; 12], &big[..65550]], Some(65550)),
        ("too large", &[&[0; 12], &big], None),
        (
            "segmentation not negotiated",
            &[&[1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], &big[..9000]],
            None,
        ),
    ];
    for (name, buffers, len) in cases {
        let mut rig = rig(0, 16);
        let (head, _) = rig.tx.send(buffers, &[]);
        rig.running.on_kick(1).unwrap();
        assert_eq!(rig.tx.take_used(), Some((u32::from(head), 0)), "{name}");
        let sent = rig.sent();
        let Some(len) = len else {
            assert!(sent.is_empty(), "{name}");
            continue;
        };
        let whole = buffers.concat();
        assert_eq!(sent[..4], (*len as u32).to_be_bytes(), "{name}");
        assert!(sent[4..] == whole[12..], "{name}");
    }
}

#[test]
fn a_chain_of_more_buffers_than_one_call_takes_is_sent() {
    let mut rig = rig(0, 256);
    let bytes = pattern(200);
    let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
    let mut buffers: Vec<&[u8]> = vec![&[0; 12]];
    buffers.extend(pieces);
    rig.tx.send(&buffers, &[]);
    rig.running.on_kick(1).unwrap();
    assert!(rig.sent()[4..] == bytes);
}

#[test]
fn chains_without_room_for_a_header_break_the_queue() {
    let mut short_tx = rig(0, 16);
    short_tx.tx.send(&[&[0; 11]], &[]);
    assert!(short_tx.running.on_kick(1).is_err());
    let mut short_rx = rig(0, 16);
    short_rx.rx.send(&[], &[11]);
    short_rx.arrive(b"frame");
    assert!(short_rx.running.on_backend().is_err());
}

#[test]
fn a_full_link_holds_frames_back_without_losing_one() {
    let mut rig = rig(0, 512);
    let frame = pattern(9000);
    let mut expected = vec![];
    for i in 0..100_u8 {
        rig.tx.send(&[&[0; 12], &[i], &frame], &[]);
        expected.extend(9001_u32.to_be_bytes());
        expected.push(i);
        expected.extend(&frame);
    }
    rig.running.on_kick(1).unwrap();
    let at_once = std::iter::from_fn(|| rig.tx.take_used()).count();
    assert!(at_once < 100, "the socket took all: the test tests nothing");
    let mut sent = rig.sent();
    while sent.len() < expected.len() {
        let before = sent.len();
        rig.running.on_backend().unwrap();
        sent.extend(rig.sent());
        assert!(sent.len() > before, "nothing moves");
    }
    assert!(sent == expected);
    assert_eq!(at_once + std::iter::from_fn(|| rig.tx.take_used()).count(), 100);
    rig.settle();
}

#[test]
fn a_peer_that_goes_or_lies_leaves_a_dead_link_that_swallows_frames() {
    for lie in [None, Some(65551_u32)] {
        let mut rig = rig(0, 16);
        rig.rx.send(&[], &[2000]);
        match lie {
            None => drop(std::mem::replace(&mut rig.peer, UnixStream::pair().unwrap().0)),
            Some(length) => rig.peer.write_all(&length.to_be_bytes()).unwrap(),
        }
        rig.settle();
        rig.tx.send(&[&[0; 12], b"frame"], &[]);
        rig.running.on_kick(1).unwrap();
        rig.settle();
        assert!(rig.tx.take_used().is_some());
        assert_eq!(rig.rx.take_used(), None);
    }
}

#[test]
fn a_reset_gives_the_link_back_even_in_the_middle_of_a_frame() {
    let Rig {
        rx,
        tx,
        mut net,
        mut running,
        mut peer,
        ..
    } = rig(0, 16);
    let mem = rx.mem.clone();
    let (with, _) = activation(&mem, &[&rx, &tx], 0);
    assert!(net.activate(with).is_err(), "one driver at a time");
    peer.write_all(&[0, 0, 0, 5, b'f', b'r']).unwrap();
    running.on_backend().unwrap();
    drop(running);
    assert!(net.poll.ready().is_empty());
    let mut rx = MockRing::new(&mem, 0x10_0000, 16);
    let (with, _) = activation(&mem, &[&rx, &tx], 0);
    let mut running = net.activate(with).unwrap();
    let (_, at) = rx.send(&[], &[100]);
    peer.write_all(b"ame").unwrap();
    running.on_backend().unwrap();
    assert_eq!(rx.read(at[0] + 12, 5), b"frame");
}

#[test]
fn the_control_queue_takes_pair_counts_only() {
    let cases: &[(&str, &[u8], u8)] = &[
        ("two pairs", &[4, 0, 2, 0], 0),
        ("one pair", &[4, 0, 1, 0], 0),
        ("no pair", &[4, 0, 0, 0], 1),
        ("too many", &[4, 0, 3, 0], 1),
        ("very many", &[4, 0, 0xff, 0xff], 1),
        ("short", &[4, 0, 2], 1),
        ("long", &[4, 0, 2, 0, 0], 1),
        ("promiscuous mode", &[0, 0, 1], 1),
        ("garbage", &[0xff; 64], 1),
    ];
    let links: Vec<Box<dyn Link>> = (0..2)
        .map(|_| -> Box<dyn Link> { Box::new(Stream::new(UnixStream::pair().unwrap().0)) })
        .collect();
    let mut net = Net::new(links, 0, None, mac()).unwrap();
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 64]);
    let (mem, _) = memory();
    let mut rings: Vec<_> = (0..5)
        .map(|i| MockRing::new(&mem, 0x10_0000 * (i + 1), 64))
        .collect();
    let (with, irqs) = activation(&mem, &rings.iter().collect::<Vec<_>>(), MQ | CTRL_VQ);
    let mut running = net.activate(with).unwrap();
    for (name, command, ack) in cases {
        let (_, at) = rings[4].send(&[command], &[1]);
        running.on_kick(4).unwrap();
        assert_eq!(rings[4].read(at[1], 1), [*ack], "{name}");
    }
    assert!(irqs[4].take() > 0);
    rings[4].send(&[&[4, 0, 1, 0]], &[]);
    assert!(running.on_kick(4).is_err(), "no room for the answer");
    running.on_kick(99).unwrap();
}

#[test]
fn configuration_space_holds_address_status_pairs_and_mtu() {
    let (near, _far) = UnixStream::pair().unwrap();
    let net = Net::new(vec![Box::new(Stream::new(near))], 0, Some(1500), mac()).unwrap();
    let mut all = [0xee; 14];
    net.read_config(0, &mut all);
    assert_eq!(all, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5, 0xee, 0xee]);
    net.read_config(u64::MAX, &mut all);
    assert_eq!(net.features(), MAC | STATUS | MRG_RXBUF | MTU);
}

#[test]
fn addresses_parse_print_and_differ_by_device() {
    assert_eq!(mac().to_string(), ADDRESS);
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:00:00",
        "03:00:00:00:00:00",
        "00:00:00:00:00:00",
        "2:0:0:0:0:0",
        "+2:00:00:00:00:00",
    ] {
        assert!(bad.parse::<MacAddress>().is_err(), "{bad:?}");
    }
    assert_ne!(MacAddress::of_device(1), MacAddress::of_device(2));
    assert_eq!(MacAddress::of_device(1).bytes()[0] & 3, 2);
}

#[test]
fn what_cannot_be_opened_is_refused_with_the_reason() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let nowhere = || Backend::Passt("/nonexistent/passt".into());
    assert!(matches!(
        Net::open(nowhere(), mac(), 1),
        Err(NetError::Passt { .. })
    ));
    assert!(matches!(
        Net::open(nowhere(), mac(), 2),
        Err(NetError::Pairs { limit: 1, .. })
    ));
    assert!(matches!(
        Net::open(Backend::TapFds(vec![null()]), mac(), 1),
        Err(NetError::Tap(_))
    ));
    assert!(matches!(
        Net::open(Backend::TapFds(vec![null(), null()]), mac(), 1),
        Err(NetError::Pairs { .. })
    ));
    assert!(matches!(
        Net::open(Backend::Tap("x".into()), mac(), 0),
        Err(NetError::Pairs { .. })
    ));
}

/// An Ethernet frame with a UDP datagram from 198.18.`net`.2 to 198.18.`net`.1.
fn datagram(net: u8, to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let udp = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 198, 18, net, 2, 198, 18, net, 1]);
    let sum: u32 = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&to[..], &mac().bytes(), &[8, 0], &ip].concat();
    frame.extend(5000_u16.to_be_bytes());
    frame.extend(6000_u16.to_be_bytes());
    frame.extend(udp.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

fn ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn a_tap_carries_datagrams_both_ways_on_one_queue_and_on_two() {
    for (pairs, name, third) in [(1, "cvmmt1", 71_u8), (2, "cvmmt2", 72)] {
        let mut net = match Net::open(Backend::Tap(name.into()), mac(), pairs) {
            Ok(net) => net,
            Err(e) => {
                eprintln!("SKIPPED: no tap interface here: {e}");
                return;
            }
        };
        assert!(net.features() & (GUEST_TSO4 | HOST_TSO4 | MTU) == GUEST_TSO4 | HOST_TSO4 | MTU);
        assert!(ip(&format!("link set {name} address 02:00:00:00:00:99 up")));
        assert!(ip(&format!("address add 198.18.{third}.1/24 dev {name}")));
        assert!(ip(&format!(
            "neighbour replace 198.18.{third}.2 lladdr {ADDRESS} dev {name} nud permanent"
        )));
        let socket = UdpSocket::bind((format!("198.18.{third}.1"), 6000)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();

        let (mem, _) = memory();
        let mut rings: Vec<_> = (0..5)
            .map(|i| MockRing::new(&mem, 0x20_0000 * (i + 1), 64))
            .collect();
        let count = usize::from(pairs) * 2 + usize::from(pairs > 1);
        let features = net.features();
        let (with, _) = activation(&mem, &rings[..count].iter().collect::<Vec<_>>(), features);
        let mut running = net.activate(with).unwrap();
        if pairs == 2 {
            let (_, at) = rings[4].send(&[&[4, 0, 2, 0]], &[1]);
            running.on_kick(4).unwrap();
            assert_eq!(rings[4].read(at[1], 1), [0]);
        }
        let posted: Vec<_> = (0..pairs)
            .flat_map(|pair| std::iter::repeat_n(usize::from(pair) * 2, 48))
            .map(|ring| (ring, rings[ring].send(&[], &[2048]).1[0]))
            .collect();

        let frame = datagram(third, [2, 0, 0, 0, 0, 0x99], b"from the guest");
        let tx = usize::from(pairs) * 2 - 1;
        rings[tx].send(&[&[0; 12], &frame], &[]);
        running.on_kick(tx).unwrap();
        let mut got = [0; 100];
        let (len, from) = socket.recv_from(&mut got).unwrap();
        assert_eq!((&got[..len], from.port()), (&b"from the guest"[..], 5000));

        socket
            .send_to(b"to the guest", (format!("198.18.{third}.2"), 5000))
            .unwrap();
        let mut found = false;
        for _ in 0..100 {
            running.on_backend().unwrap();
            found = posted.iter().any(|(ring, at)| {
                let bytes = rings[*ring].read(*at, 200);
                bytes[10] == 1 && bytes.windows(12).any(|w| w == b"to the guest")
            });
            if found {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(found);
        drop(running);
        let rings: Vec<_> = (0..count as u64)
            .map(|i| MockRing::new(&mem, 0x20_0000 * (i + 1), 64))
            .collect();
        let (with, _) = activation(&mem, &rings.iter().collect::<Vec<_>>(), features);
        net.activate(with).unwrap();
    }
}

#[test]
fn queues_that_the_driver_left_unused_serve_the_next_device() {
    let open = || Tap::open("cvmmt3", true);
    let (Ok(first), Ok(second)) = (open(), open()) else {
        eprintln!("SKIPPED: no tap interface here");
        return;
    };
    for _ in 0..2 {
        let fds = [&first, &second].map(|tap| tap.fd().try_clone_to_owned().unwrap());
        let mut net = Net::open(Backend::TapFds(fds.into()), mac(), 2).unwrap();
        let (mem, _) = memory();
        let rings = [0x10_0000, 0x20_0000].map(|at| MockRing::new(&mem, at, 64));
        let (with, _) = activation(&mem, &rings.each_ref(), 0);
        net.activate(with).unwrap();
    }
}

/// Says of every frame that its checksum is valid, as a tap does.
#[derive(Debug)]
struct Valid(Stream);

impl Link for Valid {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
    fn attach(&mut self, features: Option<u64>) -> io::Result<()> {
        self.0.attach(features)
    }
    fn lead<'a>(&self, header: &'a mut [u8; 12], frame: usize) -> &'a mut [u8] {
        self.0.lead(header, frame)
    }
    fn receive(&mut self, into: &arch::iov::Parts<'_>) -> io::Result<usize> {
        let count = self.0.receive(into)?;
        into.fill(0, &[2]);
        Ok(count)
    }
    fn send(&mut self, frame: &arch::iov::Parts<'_>) -> io::Result<()> {
        self.0.send(frame)
    }
    fn held(&mut self) -> link::Held {
        self.0.held()
    }
}

#[test]
fn flags_about_checksums_need_their_feature() {
    for (features, flags) in [(0, 0), (GUEST_CSUM, 2)] {
        let (near, mut peer) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let mut net = Net::new(vec![Box::new(Valid(Stream::new(near)))], 0, None, mac()).unwrap();
        let (mem, _) = memory();
        let (mut rx, tx) = (
            MockRing::new(&mem, 0x10_0000, 16),
            MockRing::new(&mem, 0x80_0000, 16),
        );
        let (with, _) = activation(&mem, &[&rx, &tx], features);
        let mut running = net.activate(with).unwrap();
        let (_, at) = rx.send(&[], &[100]);
        peer.write_all(&[0, 0, 0, 1, 7]).unwrap();
        running.on_backend().unwrap();
        assert_eq!(rx.read(at[0], 13), [flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7]);
    }
}

/// Ends a child process with the test.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn passt_answers_frames() {
    let path = std::env::temp_dir().join(format!("cvmm-passt-{}", std::process::id()));
    let started = Command::new("passt")
        .args(["--foreground", "--quiet", "--socket"])
        .arg(&path)
        .spawn();
    let Ok(_passt) = started.map(Child) else {
        eprintln!("SKIPPED: passt is not installed");
        return;
    };
    let until = std::time::Instant::now() + Duration::from_secs(5);
    let mut net = loop {
        match Net::open(Backend::Passt(path.clone()), mac(), 1) {
            Ok(net) => break net,
            Err(_) if std::time::Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => {
                eprintln!("SKIPPED: passt does not start here, it needs a network interface: {e}");
                return;
            }
        }
    };
    let (mem, _) = memory();
    let (mut rx, mut tx) = (
        MockRing::new(&mem, 0x10_0000, 64),
        MockRing::new(&mem, 0x80_0000, 64),
    );
    let (with, _) = activation(&mem, &[&rx, &tx], net.features());
    let mut running = net.activate(with).unwrap();
    let posted: Vec<_> = (0..48).map(|_| rx.send(&[], &[2048]).1[0]).collect();
    // Any address but our own is passt's.
    let mut arp = [
        &[0xff; 6][..],
        &mac().bytes(),
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac().bytes(),
    ]
    .concat();
    arp.extend([198, 18, 73, 2, 0, 0, 0, 0, 0, 0, 198, 18, 73, 1]);
    tx.send(&[&[0; 12], &arp], &[]);
    running.on_kick(1).unwrap();
    let answered = |at: &u64| {
        let frame = rx.read(*at + 12, 42);
        frame[..6] == mac().bytes() && frame[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]
    };
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while !posted.iter().any(answered) {
        assert!(std::time::Instant::now() < until, "no answer");
        running.on_backend().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = std::fs::remove_file(path);
}

proptest::proptest! {
    #[test]
    fn no_guest_header_or_buffer_layout_harms_the_device(
        raw in proptest::array::uniform12(proptest::num::u8::ANY),
        pieces in proptest::collection::vec(1_usize..3000, 1..40),
        buffers in proptest::collection::vec(12_u32..4000, 1..40),
        features in proptest::num::u64::ANY,
        frame in 0_usize..70_000,
    ) {
        let mut rig = rig(features & 0x7f_ffff & !(MQ | CTRL_VQ), 64);
        let bytes = pattern(pieces.iter().sum::<usize>());
        let (mut whole, mut chain) = (&bytes[..], vec![&raw[..]]);
        for piece in pieces {
            let (now, later) = whole.split_at(piece);
            chain.push(now);
            whole = later;
        }
        rig.tx.send(&chain, &[]);
        rig.running.on_kick(1).unwrap();
        rig.sent();
        rig.settle();
        rig.sent();
        proptest::prop_assert!(rig.tx.take_used().is_some());

        let posted: Vec<_> = buffers.iter().map(|len| rig.rx.send(&[], &[*len]).1[0]).collect();
        rig.running.on_kick(0).unwrap();
        let frame = pattern(frame.min(65550));
        rig.arrive(&frame);
        rig.settle();
        let mut got = vec![];
        for at in posted {
            if let Some((_, len)) = rig.rx.take_used() {
                got.extend(rig.rx.read(at, len as usize));
            }
        }
        // Whole or not at all.
        proptest::prop_assert!(got.is_empty() || got[12..] == frame);
    }
}

/// Found by fuzzing: a frame that the last driver left in memory kept the event thread awake for ever.
#[test]
fn a_driver_without_a_receive_queue_costs_nothing_while_a_frame_waits() {
    let mut rig = rig(0, 16);
    rig.rx.send(&[], &[1526]);
    rig.arrive(&pattern(60));
    rig.arrive(&pattern(60));
    rig.settle();
    assert!(rig.rx.take_used().is_some());
    drop(std::mem::replace(&mut rig.running, Box::new(Nobody)));
    let (mut with, _) = activation(&rig.rx.mem.clone(), &[&rig.rx, &rig.tx], 0);
    with.queues[0] = None;
    rig.running = rig.net.activate(with).unwrap();
    rig.running.on_kick(0).unwrap();
    rig.settle();
}

struct Nobody;

impl Running for Nobody {
    fn on_kick(&mut self, _queue: usize) -> Result<(), QueueBroken> {
        Ok(())
    }
    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        Ok(())
    }
}
