//! Frames between rings and a link.

use super::*;

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
        rig = super::rig(MRG_RXBUF, 64);
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
