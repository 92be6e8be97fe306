//! What the driver reads and asks for beside frames.

use super::*;

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
