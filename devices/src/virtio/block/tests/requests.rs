//! Requests of an honest driver.

use super::*;

#[test]
fn each_request_gets_its_status_and_moves_the_right_bytes() {
    Rig::each(64 << 10, |name, rig| {
        let old = pattern(64 << 10);
        let new = vec![0xc3; 1536];
        let (status, length, data) = rig.request(IN, 2, &[], 4096);
        assert_eq!((status, length), (0, 4097), "{name}");
        assert!(data == old[1024..5120], "{name}");
        assert_eq!(rig.request(OUT, 127, &new[..512], 0).0, 0, "{name}: last sector");
        assert_eq!(rig.request(OUT, 4, &new, 0), (0, 1, vec![]), "{name}");
        assert_eq!(rig.request(FLUSH, 0, &[], 0), (0, 1, vec![]), "{name}");
        assert!(rig.request(IN, 4, &[], 1536).2 == new, "{name}");
        assert_eq!(
            rig.request(DISCARD, 0, &range(16, 8, 0), 0),
            (0, 1, vec![]),
            "{name}"
        );
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(32, 8, 0), 0),
            (0, 1, vec![]),
            "{name}"
        );
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(48, 8, 1), 0),
            (0, 1, vec![]),
            "{name}"
        );
        // Refused: status, nothing filled.
        assert_eq!(
            rig.request(IN, 128, &[], 512),
            (1, 0, vec![0; 512]),
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(OUT, 125, &new[..], 512).0,
            1,
            "{name}: wrong direction"
        );
        assert_eq!(
            rig.request(OUT, 126, &new, 0),
            (1, 1, vec![]),
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(DISCARD, 0, &range(120, 9, 0), 0).0,
            1,
            "{name}: past the end"
        );
        assert_eq!(
            rig.request(DISCARD, 0, &range(0, 8, 1), 0).0,
            2,
            "{name}: unknown flag"
        );
        assert_eq!(
            rig.request(77, 0, &new, 512),
            (2, 0, vec![0; 512]),
            "{name}: unknown type"
        );

        let mut expected = old;
        expected[127 * 512..].fill(0xc3);
        expected[2048..3584].fill(0xc3);
        for sector in [16, 32, 48] {
            expected[sector * 512..(sector + 8) * 512].fill(0);
        }
        let mut all = vec![0; 64 << 10];
        rig.file.read_exact_at(&mut all, 0).unwrap();
        assert!(all == expected, "{name}: the disk differs from the model");
    });
}

#[test]
fn the_identity_fits_any_buffer() {
    Rig::each(4096, |name, rig| {
        for room in 0..24 {
            let (status, length, data) = rig.request(GET_ID, 0, &[], room);
            let count = room.min(20);
            let gap = room > 20;
            assert_eq!(status, 0, "{name} {room}");
            assert_eq!(length as usize, count + usize::from(!gap), "{name} {room}");
            assert_eq!(data[..count], ID[..count], "{name} {room}");
            assert!(data[count..].iter().all(|b| *b == 0), "{name} {room}");
        }
    });
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for (name, make) in ENGINES {
        let file = disk_file(4096);
        let Ok(mut rig) = Rig::open(&file, true, ALL, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_ne!(rig.block.features() & feature::RO, 0);
        assert_eq!(
            rig.block.features() & (feature::DISCARD | feature::WRITE_ZEROES),
            0
        );
        for (kind, data) in [
            (OUT, vec![9; 512]),
            (DISCARD, range(0, 1, 0)),
            (WRITE_ZEROES, range(0, 1, 0)),
        ] {
            assert_eq!(rig.request(kind, 0, &data, 0).0, 1, "{name} type {kind}");
        }
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
        let mut now = vec![0; 4096];
        file.read_exact_at(&mut now, 0).unwrap();
        assert!(now == pattern(4096), "{name}");
    }
}

#[test]
fn what_was_not_negotiated_is_unknown() {
    for (name, make) in ENGINES {
        let Ok(mut rig) = Rig::open(&disk_file(4096), false, 0, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_eq!(rig.request(DISCARD, 0, &range(0, 1, 0), 0).0, 2, "{name}");
        assert_eq!(rig.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 2, "{name}");
        // Each write is stable without a flush; the data must arrive all the same.
        assert_eq!(rig.request(OUT, 1, &[5; 512], 0).0, 0, "{name}");
        assert_eq!(rig.request(IN, 1, &[], 512).2, vec![5; 512], "{name}");
    }
}

#[test]
fn header_and_status_may_lie_anywhere_in_a_chain() {
    Rig::each(4096, |name, rig| {
        // The header in three buffers, the last of which holds data too; the status ends the data buffer.
        let raw = [header(OUT, 3), vec![0x77; 512]].concat();
        let (_, at) = rig.ring.send(&[&raw[..1], &raw[1..9], &raw[9..]], &[1]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[3], 1), [0], "{name}");
        let (_, at) = rig.ring.send(&[&header(IN, 3)], &[100, 413]);
        rig.kick().unwrap();
        assert_eq!(rig.wait().1, 513, "{name}");
        assert_eq!(rig.ring.read(at[1], 100), [0x77; 100], "{name}");
        let tail = rig.ring.read(at[2], 413);
        assert!(tail[..412].iter().all(|b| *b == 0x77) && tail[412] == 0, "{name}");
        // Too short for a header, but there is a place to say so.
        let (_, at) = rig.ring.send(&[&raw[..15]], &[1]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[1], 1), [1], "{name}");
        let (_, at) = rig.ring.send(&[], &[513]);
        rig.kick().unwrap();
        rig.wait();
        assert_eq!(rig.ring.read(at[0] + 512, 1), [1], "{name}");
    });
}

#[test]
fn a_host_error_is_the_guests_error_and_nothing_else() {
    Rig::each(8192, |name, rig| {
        rig.file.set_len(4096).unwrap();
        assert_eq!(rig.request(IN, 12, &[], 512), (1, 0, vec![0; 512]), "{name}");
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
        assert_eq!(rig.request(OUT, 12, &[1; 512], 0).0, 0, "{name}");
    });
    // A disk that the host refuses to write stands for one that is full.
    for (name, make) in ENGINES {
        let file = File::open("/proc/self/exe").unwrap();
        let Ok(mut rig) = Rig::open(&file, false, ALL, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        assert_eq!(rig.request(OUT, 0, &[1; 512], 0), (1, 1, vec![]), "{name}");
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0),
            (1, 1, vec![]),
            "{name}"
        );
        assert_eq!(rig.request(IN, 0, &[], 512).0, 0, "{name}");
    }
}

#[test]
fn a_batch_gets_one_interrupt() {
    let mut rig = Rig::open(
        &disk_file(64 << 10),
        false,
        ALL,
        |disk| Ok(disk.inline_engine(64)),
    )
    .unwrap();
    for _ in 0..21 {
        rig.ring.send(&[&header(IN, 0)], &[512, 1]);
    }
    rig.kick().unwrap();
    assert_eq!(rig.irq.take(), 1);
    assert_eq!((0..21).filter_map(|_| rig.ring.take_used()).count(), 21);
}

#[test]
fn one_kick_moves_a_bounded_amount_and_asks_to_be_called_again() {
    let mut rig = Rig::open(&disk_file(1 << 20), false, ALL, |disk| Ok(disk.inline_engine(64))).unwrap();
    let data = HIGH;
    for i in 0..20_u16 {
        let at = rig.ring.buffer(32);
        rig.mem.write_slice(&header(IN, 0), GuestAddress(at)).unwrap();
        rig.ring.descriptor(i * 3, at, 16, NEXT, i * 3 + 1);
        rig.ring
            .descriptor(i * 3 + 1, data, 1 << 20, WRITE | NEXT, i * 3 + 2);
        rig.ring.descriptor(i * 3 + 2, at + 16, 1, WRITE, 0);
        rig.ring.offer(i * 3);
    }
    rig.kick().unwrap();
    for _ in 0..4 {
        assert_eq!((0..20).map_while(|_| rig.ring.take_used()).count(), 4);
        assert!(readable(&rig.block, 0));
        rig.backend().unwrap();
    }
    assert_eq!((0..20).map_while(|_| rig.ring.take_used()).count(), 4);
    assert!(!readable(&rig.block, 0));
    assert_eq!(
        rig.irq.take(),
        1,
        "the driver asked for an interrupt at the first entry only"
    );
}

/// Counts the turns that a disk in memory takes for one request, between which conversions have theirs.
fn turns(rig: &mut Rig) -> u32 {
    rig.kick().unwrap();
    let mut turns = 1;
    while rig.ring.take_used().is_none() {
        assert!(readable(&rig.block, 0), "nobody comes back");
        assert!(rig.visible.drain(pages(LOW_END - 0x1000, 0x1000), Duration::ZERO));
        rig.backend().unwrap();
        turns += 1;
    }
    assert!(!readable(&rig.block, 0));
    turns
}

#[test]
fn a_large_request_to_a_disk_in_memory_takes_many_turns() {
    let file = disk_file(256 << 20);
    let mut rig = Rig::open(&file, false, ALL, |disk| Ok(disk.inline_engine(64))).unwrap();
    for (kind, expected) in [(IN, 14), (OUT, 14)] {
        // 56 MiB in 14 buffers of 4 MiB, all in the same place.
        rig.begin_again(64);
        let status = rig.offer_large(kind, 14);
        assert_eq!(turns(&mut rig), expected);
        assert_eq!(rig.ring.read(status, 1), [0]);
    }
    let mut last = vec![0; 4 << 20];
    rig.file.read_exact_at(&mut last, 52 << 20).unwrap();
    assert!(last == rig.ring.read(0x80_0000, 4 << 20));
    // A range of 250 MiB.
    rig.ring
        .send(&[&header(WRITE_ZEROES, 0), &range(1, 250 << 11, 1)], &[1]);
    assert_eq!(turns(&mut rig), 4);
    let mut all = vec![0; 256 << 20];
    rig.file.read_exact_at(&mut all, 0).unwrap();
    let zeros = 512..512 + (250 << 20);
    assert!(all[zeros.clone()].iter().all(|byte| *byte == 0));
    assert!(all[zeros.end..].iter().all(|byte| *byte != 0) && all[..512].iter().all(|byte| *byte != 0));
}

#[test]
fn each_queue_works_and_a_disabled_one_is_left_alone() {
    let file = disk_file(64 << 10);
    let mut block = Block::open(file, false, 3, ID, &free()).unwrap();
    assert_eq!(block.queue_sizes(), [QUEUE_SIZE; 3]);
    assert_ne!(block.features() & feature::MQ, 0);
    let (mem, _) = memory();
    let mut rings = [0, 1, 2].map(|i| MockRing::new(&mem, RING + i * 0x20_0000, 64));
    let (mut with, irqs) = activation(&mem, &rings.each_ref(), ALL);
    with.queues[1] = None;
    let mut running = block.activate(with).unwrap();
    for queue in [0, 2, 1, 7] {
        if let Some(ring) = rings.get_mut(queue) {
            ring.send(&[&header(IN, queue as u64)], &[512, 1]);
        }
        running.on_kick(queue).unwrap();
    }
    let until = Instant::now() + LONG;
    for queue in [0, 2] {
        while rings[queue].take_used().is_none() {
            assert!(Instant::now() < until, "queue {queue}");
            if readable(&block, 100) {
                running.on_backend().unwrap();
            }
        }
        assert_eq!(irqs[queue].take(), 1);
    }
    assert!(rings[1].take_used().is_none());
}

#[test]
fn the_configuration_says_what_is_true() {
    let block = Block::open(disk_file(10_000), false, 4, ID, &free()).unwrap();
    assert_eq!(block.capacity_bytes(), 9728);
    let field = |at: u64, size: usize| {
        let mut raw = [0; 8];
        block.read_config(at, &mut raw[..size]);
        u64::from_le_bytes(raw)
    };
    let fields = [
        ("capacity", 0, 8, 19),
        ("size_max", 8, 4, 0),
        ("seg_max", 12, 4, 510),
        ("blk_size", 20, 4, 512),
        ("writeback", 32, 1, 0),
        ("num_queues", 34, 2, 4),
        ("max_discard_sectors", 36, 4, 1 << 22),
        ("max_discard_seg", 40, 4, 1),
        ("max_write_zeroes_sectors", 48, 4, 1 << 22),
        ("max_write_zeroes_seg", 52, 4, 1),
        ("write_zeroes_may_unmap", 56, 1, 1),
    ];
    for (name, at, size, expected) in fields {
        assert_eq!(field(at, size), expected, "{name}");
    }
    for at in [57, 60, 61, u64::MAX] {
        assert_eq!(field(at, 8), 0, "past the end at {at}");
    }
    let known = ALL | feature::SEG_MAX | feature::BLK_SIZE | feature::MQ;
    assert_eq!(block.features(), known);
    assert!(Block::open(disk_file(512), false, 0, ID, &free()).is_err());
}

#[test]
fn scattered_guest_memory_is_one_request() {
    Rig::each(1 << 20, |name, rig| {
        let mut writable = vec![512; 60];
        writable.push(1);
        let (_, at) = rig.ring.send(&[&header(IN, 5)], &writable);
        rig.kick().unwrap();
        assert_eq!(rig.wait().1, 60 * 512 + 1, "{name}");
        let got: Vec<u8> = at[1..61].iter().flat_map(|a| rig.ring.read(*a, 512)).collect();
        assert!(got == pattern(65 * 512)[5 * 512..], "{name}");
    });
}

#[test]
#[ignore = "overwrites the block device that BLOCK_DEVICE names, 64 KiB or longer; run by hand"]
fn a_block_device_is_a_disk() {
    let path = std::env::var("BLOCK_DEVICE").expect("BLOCK_DEVICE is not set");
    let file = File::options().read(true).write(true).open(path).unwrap();
    for (name, make) in ENGINES {
        let mut rig = Rig::open(&file, false, ALL, make).unwrap();
        assert!(rig.block.capacity_bytes() >= 64 << 10, "{name}");
        assert_eq!(rig.request(OUT, 8, &pattern(8192), 0).0, 0, "{name}");
        assert_eq!(rig.request(FLUSH, 0, &[], 0).0, 0, "{name}");
        assert!(rig.request(IN, 8, &[], 8192).2 == pattern(8192), "{name}");
        assert_eq!(rig.request(WRITE_ZEROES, 0, &range(8, 8, 0), 0).0, 0, "{name}");
        assert_eq!(rig.request(WRITE_ZEROES, 0, &range(16, 8, 1), 0).0, 0, "{name}");
        assert_eq!(rig.request(IN, 8, &[], 8192).2, vec![0; 8192], "{name}");
        assert!(
            matches!(rig.request(DISCARD, 0, &range(8, 8, 0), 0).0, 0 | 2),
            "{name}"
        );
        let last = rig.block.capacity_bytes() / 512 - 1;
        assert_eq!(rig.request(IN, last, &[], 512).0, 0, "{name}");
        assert_eq!(rig.request(IN, last, &[], 1024).0, 1, "{name}");
    }
}
