//! Rings: where they are, what they name, when they interrupt.

use super::*;

#[test]
fn available_rings() {
    type Act = fn(&mut MockRing);
    let cases: &[(&str, Act, Result<bool, &str>)] = &[
        ("empty", |_| {}, Ok(false)),
        ("C04 head is the size", |r| r.offer(SIZE), Err("Head")),
        ("C04 head far outside", |r| r.offer(0xffff), Err("Head")),
        ("C11 jump by the size", |r| r.set_available(SIZE), Ok(true)),
        ("C11 jump by more", |r| r.set_available(SIZE + 1), Err("Ring")),
        ("C11 backwards", |r| r.set_available(0xffff), Err("Ring")),
    ];
    for (name, act, expected) in cases {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, RING, SIZE);
        ring.descriptor(0, BUFFER, 16, 0, 0);
        let (mut queue, _) = ring.device_side(0, 0);
        act(&mut ring);
        for _ in 0..2 {
            // A broken queue stays broken, and is not walked on.
            let result = queue
                .pop(&mem)
                .map(|chain| chain.is_some())
                .map_err(|e| kind(&e.source));
            assert_eq!(result, expected.map_err(str::to_owned), "{name}");
            if result.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn c10_a_head_in_flight_twice_is_refused_and_one_returned_is_not() {
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    ring.descriptor(5, BUFFER, 16, 0, 0);
    let (mut queue, _) = ring.device_side(0, 0);
    for _ in 0..3 {
        ring.offer(5);
        assert_eq!(queue.pop(&mem).unwrap().unwrap().head(), 5);
        queue.push(&mem, 5, 0).unwrap();
    }
    ring.offer(5);
    ring.offer(5);
    assert!(queue.pop(&mem).unwrap().is_some());
    assert_eq!(kind(&queue.pop(&mem).unwrap_err().source), "Twice");
    assert_eq!(queue.in_flight(), 1);
}

#[test]
fn an_unpopped_chain_comes_again() {
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    let (mut queue, _) = ring.device_side(0, 0);
    ring.send(&[b"a"], &[]);
    ring.send(&[b"b"], &[]);
    let first = queue.pop(&mem).unwrap();
    queue.unpop();
    queue.unpop();
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(queue.pop(&mem).unwrap(), first);
    assert_eq!(queue.pop(&mem).unwrap().unwrap().head(), 1);
    assert_eq!(queue.in_flight(), 2);
}

#[test]
fn c50_c51_private_pages_stop_the_queue_at_every_step() {
    // Which page turns private after the queue was set up, and which call notices.
    let cases = [
        ("table", RING, "NotShared"),
        ("available ring", RING + 0x4000, "Ring"),
    ];
    for (name, page, expected) in cases {
        let (mem, visible) = memory();
        let mut ring = MockRing::new(&mem, RING, SIZE);
        let (mut queue, _) = ring.device_side(0, feature::EVENT_IDX);
        ring.send(&[b"x"], &[4]);
        visible.set(pages(page, 0x1000), Visibility::Private);
        let broken = queue.pop(&mem).unwrap_err();
        assert_eq!(kind(&broken.source), expected, "{name}");
    }
    let (mem, visible) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    let (mut queue, irq) = ring.device_side(0, feature::EVENT_IDX);
    let (_, at) = ring.send(&[b"x"], &[4]);
    let chain = queue.pop(&mem).unwrap().unwrap();
    visible.set(pages(at[0] & !0xfff, 0x1000), Visibility::Private);
    assert!(chain.reader(&mem).read(&mut [0]).is_err());
    assert!(chain.writer(&mem).write(&[0]).is_err());
    visible.set(pages(RING + 0x6000, 0x1000), Visibility::Private);
    assert_eq!(
        kind(&queue.push(&mem, chain.head(), 0).unwrap_err().source),
        "Ring"
    );
    assert_eq!(kind(&queue.enable_kicks(&mem).unwrap_err().source), "Ring");
    assert_eq!(irq.take(), 0);
}

#[test]
fn an_entry_of_the_available_ring_in_a_private_page_is_not_the_end_of_the_ring() {
    // The ring's index is still shared, the entry is on the next page.
    let (mem, visible) = memory();
    let at = RING + 0x5000 - 4;
    let place = Placement {
        size: SIZE,
        table: RING,
        driver: at,
        device: RING + 0x8000,
    };
    let queue = place.check(SIZE, &mem).unwrap();
    let mut queue = VirtQueue::new(0, queue, 0, Box::new(crate::virtio::mock::IrqCount::default()));
    mem.write_obj(1_u16, GuestAddress(at + 2)).unwrap();
    visible.set(pages(RING + 0x5000, 0x1000), Visibility::Private);
    assert_eq!(kind(&queue.pop(&mem).unwrap_err().source), "Ring");
}

#[test]
fn c13_placements() {
    let good = Placement {
        size: 8,
        table: 0x1000,
        driver: 0x2000,
        device: 0x3000,
    };
    let end = HIGH_END;
    let cases = [
        ("good", good, Ok(())),
        ("smallest", Placement { size: 1, ..good }, Ok(())),
        ("at address 0", Placement { table: 0, ..good }, Ok(())),
        (
            "table ends with RAM",
            Placement {
                table: end - 128,
                ..good
            },
            Ok(()),
        ),
        (
            "available ring ends with RAM",
            Placement {
                driver: end - 22,
                ..good
            },
            Ok(()),
        ),
        (
            "used ring ends with RAM",
            Placement {
                device: end - 72,
                ..good
            },
            Ok(()),
        ),
        ("size 0", Placement { size: 0, ..good }, Err("Ring")),
        ("size 3", Placement { size: 3, ..good }, Err("Ring")),
        ("size 65535", Placement { size: 65535, ..good }, Err("Ring")),
        (
            "size above the device's",
            Placement { size: 16, ..good },
            Err("Ring"),
        ),
        (
            "table misaligned",
            Placement {
                table: 0x1008,
                ..good
            },
            Err("Ring"),
        ),
        (
            "available ring misaligned",
            Placement {
                driver: 0x2001,
                ..good
            },
            Err("Ring"),
        ),
        (
            "used ring misaligned",
            Placement {
                device: 0x3002,
                ..good
            },
            Err("Ring"),
        ),
        (
            "table straddles the end",
            Placement {
                table: end - 112,
                ..good
            },
            Err("Outside"),
        ),
        (
            "available ring straddles it",
            Placement {
                driver: end - 20,
                ..good
            },
            Err("Outside"),
        ),
        (
            "used ring straddles it",
            Placement {
                device: end - 68,
                ..good
            },
            Err("Outside"),
        ),
        (
            "table in a hole",
            Placement {
                table: LOW_END,
                ..good
            },
            Err("Outside"),
        ),
        (
            "used ring in a BAR",
            Placement {
                device: 0xc000_8000,
                ..good
            },
            Err("Outside"),
        ),
        (
            "used ring in ECAM",
            Placement {
                device: 0xe000_0000,
                ..good
            },
            Err("Outside"),
        ),
        (
            "table wraps",
            Placement {
                table: u64::MAX - 15,
                ..good
            },
            Err("Outside"),
        ),
        (
            "C50 private",
            Placement {
                driver: PRIVATE,
                ..good
            },
            Err("Outside"),
        ),
    ];
    let (mem, visible) = memory();
    visible.set(pages(PRIVATE, 0x1000), Visibility::Private);
    for (name, place, expected) in cases {
        let result = place.check(8, &mem).map(drop).map_err(|e| kind(&e));
        assert_eq!(result, expected.map_err(str::to_owned), "{name}");
    }
}

#[test]
fn c16_extreme_event_indices_bound_interrupts_by_the_work_done() {
    for event in [0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff] {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, RING, SIZE);
        let (mut queue, irq) = ring.device_side(0, feature::EVENT_IDX);
        ring.set_used_event(event);
        for _ in 0..100 {
            ring.send(&[b"x"], &[]);
            let head = queue.pop(&mem).unwrap().unwrap().head();
            queue.push(&mem, head, 0).unwrap();
            queue.notify(&mem).unwrap();
            queue.notify(&mem).unwrap();
        }
        assert!(irq.take() <= 1, "event index {event:#x}");
    }
}
