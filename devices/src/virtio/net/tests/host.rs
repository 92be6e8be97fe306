//! Taps and passt of this host.

use std::net::UdpSocket;
use std::process::Command;

use super::*;

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
