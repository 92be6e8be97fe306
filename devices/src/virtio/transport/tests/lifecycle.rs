//! Negotiation, start, failure and reset.

use arch::mem::Visibility;

use super::*;
use crate::virtio::mock::{HIGH_END, LOW_END, NEXT, pages};

const NEEDS_RESET: u64 = 0x40;

#[test]
fn c20_the_status_register_only_goes_forward() {
    let without = |bit: u64| GOOD & !bit;
    let cases: &[(&str, u64, &[u64], u64)] = &[
        ("good order", GOOD, &[1, 3, 11, 15], 15),
        ("acknowledge and driver at once", GOOD, &[3, 11, 15], 15),
        (
            "nothing optional",
            feature::VERSION_1 | feature::ACCESS_PLATFORM,
            &[1, 3, 11, 15],
            15,
        ),
        ("the toy's own feature", GOOD | TOY_FEATURE, &[1, 3, 11, 15], 15),
        ("DRIVER_OK without FEATURES_OK", GOOD, &[1, 3, 7], 3),
        ("DRIVER_OK first", GOOD, &[4], 0),
        ("FEATURES_OK first", GOOD, &[8], 0),
        ("FEATURES_OK without DRIVER", GOOD, &[1, 9], 1),
        ("both OKs at once", GOOD, &[1, 3, 15], 11),
        ("no VERSION_1", without(feature::VERSION_1), &[1, 3, 11], 3),
        (
            "no ACCESS_PLATFORM",
            without(feature::ACCESS_PLATFORM),
            &[1, 3, 11],
            3,
        ),
        ("feature not offered", GOOD | 1 << 6, &[1, 3, 11], 3),
        ("C17 packed ring", GOOD | 1 << 34, &[1, 3, 11], 3),
        ("feature 40 not offered", GOOD | 1 << 40, &[1, 3, 11], 3),
        ("reserved status bits", GOOD, &[0x31, 0x33], 3),
        ("NEEDS_RESET is not the driver's", GOOD, &[0x41], 1),
        ("a bit cleared", GOOD, &[1, 3, 11, 3], 11),
        ("a bit cleared while another is set", GOOD, &[1, 3, 11, 7], 11),
        ("DRIVER_OK cleared", GOOD, &[1, 3, 11, 15, 11], 15),
        ("failed", GOOD, &[1, 3, 0x83], 0x83),
        (
            "nothing but a reset after failed",
            GOOD,
            &[1, 0x81, 0x83, 0x8b],
            0x81,
        ),
        ("reset", GOOD, &[1, 3, 11, 15, 0], 0),
        ("reset after failed", GOOD, &[1, 0x81, 0, 1], 1),
    ];
    for (name, features, writes, expected) in cases {
        let bench = Bench::new();
        for window in 0..2 {
            bench.set_common(8, 4, window);
            bench.set_common(12, 4, (features >> (32 * window)) & 0xffff_ffff);
        }
        for value in *writes {
            bench.set_status(*value);
        }
        assert_eq!(bench.status(), *expected, "{name}");
        let running = usize::from(*expected == 15);
        assert_eq!(bench.alive.load(Ordering::SeqCst), running, "{name}");
    }
}

#[test]
fn features_come_in_windows_and_are_frozen_once_agreed() {
    let bench = Bench::new();
    let offered: Vec<u64> = [0, 1, 2, 0xffff_ffff]
        .into_iter()
        .map(|window| {
            bench.set_common(0, 4, window);
            bench.common(4, 4)
        })
        .collect();
    let all = GOOD | TOY_FEATURE;
    assert_eq!(offered, [all & 0xffff_ffff, all >> 32, 0, 0]);
    assert_eq!(bench.negotiate(GOOD), 11);
    bench.set_common(8, 4, 0);
    bench.set_common(12, 4, 0xffff_ffff);
    assert_eq!(bench.common(12, 4), GOOD & 0xffff_ffff);
    // A bit past 64 is not offered, and zero in that window is what new drivers write.
    for (value, expected) in [(0, 11), (1, 3)] {
        bench.set_status(0);
        bench.set_status(3);
        for (window, bits) in [(0, GOOD & 0xffff_ffff), (1, GOOD >> 32), (2, value)] {
            bench.set_common(8, 4, window);
            bench.set_common(12, 4, bits);
        }
        assert_eq!(bench.set_status(11), expected);
    }
}

#[test]
fn c21_configuration_is_frozen_while_the_device_runs() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_common(0x16, 2, 0);
    let state =
        |bench: &Bench| -> Vec<u64> { (0x18..0x38).step_by(2).map(|at| bench.common(at, 2)).collect() };
    let addresses = |bench: &Bench| [0x20, 0x28, 0x30].map(|at| bench.common(at, 8));
    let before = (state(&bench), addresses(&bench));
    for (at, len) in [(0x18, 2), (0x1a, 2), (0x1c, 2)] {
        for value in [0, 1, 2, 0x8000, 0xffff] {
            bench.set_common(at, len, value);
        }
    }
    for at in (0x20..0x38).step_by(4) {
        bench.set_common(at, 4, 0xffff_fff0);
        bench.set_common(at & !7, 8, u64::MAX << 4);
    }
    assert_eq!((state(&bench), addresses(&bench)), before);
    assert!(bench.answers());
}

#[test]
fn c13_c50_bad_rings_are_refused_at_start() {
    const PRIVATE: u64 = 0x50_0000;
    // Register, its width, value.
    let cases: &[(&str, u64, usize, u64, &str)] = &[
        ("size 0", 0x18, 2, 0, "invalid queue size"),
        ("size 3", 0x18, 2, 3, "invalid queue size"),
        ("size 65535", 0x18, 2, 65535, "invalid queue size"),
        ("size above the maximum", 0x18, 2, 128, "invalid queue size"),
        ("misaligned table", 0x20, 8, 0x10_0008, "alignment"),
        ("misaligned available ring", 0x28, 8, 0x10_0001, "alignment"),
        ("misaligned used ring", 0x30, 8, 0x10_0002, "alignment"),
        (
            "used ring straddles the end of RAM",
            0x30,
            8,
            HIGH_END - 0x100,
            "used ring at",
        ),
        ("table in a hole", 0x20, 8, LOW_END, "descriptor table at"),
        ("available ring in the own BAR", 0x28, 8, BAR, "available ring at"),
        ("used ring in ECAM", 0x30, 8, ECAM_START, "used ring at"),
        ("table wraps", 0x20, 8, u64::MAX - 15, "descriptor table at"),
        ("private table", 0x20, 8, PRIVATE, "descriptor table at"),
        ("private used ring", 0x30, 8, PRIVATE - 0x10, "used ring at"),
    ];
    for &(name, at, len, value, cause) in cases {
        let mut bench = Bench::new();
        bench.visible.set(pages(PRIVATE, 0x1000), Visibility::Private);
        bench.set_config(4, 2, 6);
        bench.set_msix(0x8000);
        bench.set_vector(
            0,
            MsiMessage {
                address: MSI,
                data: 9,
            },
            false,
        );
        assert_eq!(bench.negotiate(GOOD), 11);
        bench.set_common(0x10, 2, 0);
        bench.place(0);
        bench.set_common(0x16, 2, 0);
        bench.set_common(at, len, value);
        assert_eq!(bench.set_status(15), 15 | NEEDS_RESET, "{name}");
        assert_eq!(bench.alive.load(Ordering::SeqCst), 0, "{name}");
        assert_eq!(bench.interrupts(0), 1, "{name}: configuration interrupt");
        let faults = bench.faults();
        assert_eq!(faults.len(), 1, "{name}");
        assert!(
            faults[0].starts_with("toy0 queue 0: ") && faults[0].contains(cause),
            "{name}: {faults:?}"
        );
        // It still takes a driver that behaves.
        bench.start();
        assert!(bench.answers(), "{name}");
    }
}

#[test]
fn a_backend_that_does_not_start_is_a_fault_of_the_host() {
    let bench = Bench::with(|toy| toy.refuse = true);
    bench.negotiate(GOOD);
    assert_eq!(bench.set_status(15), 15 | NEEDS_RESET);
    assert_eq!(
        bench.faults(),
        ["toy0 its backend did not start: toy box is closed"]
    );
    assert_eq!(bench.set_status(0), 0);
}

#[test]
fn c01_c04_c10_c11_c50_a_broken_queue_stops_its_device_until_reset() {
    type Act = fn(&mut Bench);
    let cases: &[(&str, Act, &str)] = &[
        (
            "C01 loop",
            |b| {
                b.rings[0].descriptor(0, 0x40_0000, 1, NEXT, 0);
                b.rings[0].offer(0);
            },
            "descriptor chain 0 does not end",
        ),
        (
            "C04 head",
            |b| b.rings[0].offer(64),
            "available ring names descriptor 64",
        ),
        ("C11 jump", |b| b.rings[0].set_available(65), "ring is malformed"),
        (
            "C14 buffer in a BAR",
            |b| {
                b.rings[0].descriptor(0, BAR, 1, 0, 0);
                b.rings[0].offer(0);
            },
            "descriptor chain 0 points at 0xc0000000+0x1",
        ),
        (
            "C50 ring turned private",
            |b| {
                let page = pages(b.rings[0].avail(), 0x1000);
                b.visible.set(page, Visibility::Private);
            },
            "ring is malformed or not in shared memory",
        ),
    ];
    for (name, act, cause) in cases {
        let mut bench = Bench::new();
        let epoll = bench.epoll();
        bench.start();
        bench.run_events(&epoll);
        act(&mut bench);
        bench.kick(0);
        bench.run_events(&epoll);
        assert_eq!(bench.status(), 15 | NEEDS_RESET, "{name}");
        assert_eq!(bench.alive.load(Ordering::SeqCst), 0, "{name}");
        assert_eq!((bench.interrupts(0), bench.interrupts(1)), (1, 0), "{name}");
        let faults = bench.faults();
        assert!(
            faults[0].starts_with("toy0 queue 0: ") && faults[0].contains(cause),
            "{name}: {faults:?}"
        );
        // No kick and no backend is served, and neither keeps the event thread awake.
        bench.backend.write_all(b"x").unwrap();
        bench.kick(0);
        assert_eq!(bench.run_events(&epoll), [0x5_0000], "{name}");
        assert_eq!(bench.run_events(&epoll), [0; 0], "{name}");
        assert_eq!(bench.set_status(15), 15 | NEEDS_RESET, "{name}");
        bench.visible.set(pages(0x10_0000, 0x10_0000), Visibility::Shared);
        bench.start();
        assert!(bench.answers(), "{name}");
    }
}

#[test]
fn a_device_broken_again_and_again_is_reported_once_in_a_while() {
    let mut bench = Bench::new();
    for _ in 0..100 {
        bench.start();
        bench.rings[0].set_available(65);
        bench.pci.on_event(0);
        assert_eq!(bench.status(), 15 | NEEDS_RESET);
    }
    assert_eq!(bench.faults().len(), 1);
}

#[test]
fn kicks_are_neither_lost_nor_trusted() {
    let mut bench = Bench::new();
    let epoll = bench.epoll();
    // Before the start: seen, ignored, and what was meant is done after the start.
    bench.kick(0);
    assert_eq!(bench.run_events(&epoll), [0x5_0000]);
    assert_eq!(bench.run_events(&epoll), [0; 0]);
    bench.negotiate(GOOD);
    bench.place(0);
    let (head, _) = bench.rings[0].send(&[b"A"], &[1]);
    bench.kick(0);
    bench.run_events(&epoll);
    assert_eq!(bench.rings[0].take_used(), None);
    bench.set_status(15);
    bench.run_events(&epoll);
    assert_eq!(bench.rings[0].take_used(), Some((u32::from(head), 1)));
    // For a queue that is not enabled, for one that does not exist, by a number out of range, and without work.
    for queue in [1, 2, 3, 63, 0x3ff, 0] {
        bench.kick(queue);
    }
    for source in [0, 1, 2, 3, 0x8000, BACKEND] {
        bench.pci.on_event(source);
    }
    bench.run_events(&epoll);
    assert_eq!(bench.status(), 15);
    assert!(bench.answers());
    // After a reset.
    bench.rings[0].send(&[b"A"], &[1]);
    bench.kick(0);
    bench.set_status(0);
    bench.run_events(&epoll);
    assert_eq!(bench.rings[0].take_used(), None);
}

#[test]
fn a_host_without_resources_makes_a_slow_device_not_a_dead_one() {
    let mut bench = Bench::new();
    let epoll = bench.epoll();
    bench.lines.refuse.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        bench.start();
    }
    assert_eq!(
        bench.lines.kicks.lock().unwrap().len(),
        2,
        "asked once for each queue"
    );
    bench.run_events(&epoll);
    let (head, _) = bench.rings[0].send(&[b"A"], &[1]);
    bench.kick(0);
    bench.run_events(&epoll);
    assert_eq!(bench.rings[0].take_used(), Some((u32::from(head), 1)));
    // The interrupt waits until the host can and anything touches the vector.
    assert_eq!(bench.get(BAR + 0x5000, 4), 0b10);
    bench.lines.refuse.store(false, Ordering::SeqCst);
    bench.set_msix(0x8000);
    assert_eq!(bench.interrupts(1), 1);
    assert!(bench.answers());
}

#[test]
fn the_backend_wakes_the_event_thread_only_while_the_device_runs() {
    let mut bench = Bench::new();
    let epoll = bench.epoll();
    let backend = 0x5_0000 + u64::from(BACKEND);
    bench.backend.write_all(b"x").unwrap();
    assert!(!bench.run_events(&epoll).contains(&backend));
    bench.start();
    let (head, _) = bench.rings[0].send(&[b"A"], &[1]);
    assert!(bench.run_events(&epoll).contains(&backend));
    assert_eq!(bench.rings[0].take_used(), Some((u32::from(head), 1)));
    assert!(bench.run_events(&epoll).contains(&backend), "level-triggered");
    bench.set_status(0);
    assert!(!bench.run_events(&epoll).contains(&backend));
}

#[test]
fn a_reset_that_the_host_holds_up_shows_in_the_status_until_it_is_done() {
    let busy = Arc::new(AtomicBool::new(true));
    let mut bench = Bench::with(|toy| toy.busy = busy.clone());
    let epoll = bench.epoll();
    let backend = 0x5_0000 + u64::from(BACKEND);
    for breaks in [false, true] {
        busy.store(true, Ordering::SeqCst);
        bench.start();
        bench.run_events(&epoll);
        let mut running = 15;
        if breaks {
            bench.rings[0].set_available(65);
            bench.pci.on_event(0);
            running |= NEEDS_RESET;
        }
        bench.rings[1].send(&[b"A"], &[1]);
        let registers =
            |bench: &Bench| -> Vec<u64> { (0..0x38).step_by(2).map(|at| bench.common(at, 2)).collect() };
        let before = registers(&bench);
        assert_eq!(bench.set_status(0), running);
        // A driver that does not wait is not heard, nor is what it kicks served.
        for at in (0..0x38).step_by(4) {
            bench.set_common(at, 4, 1);
            bench.set_common(at, 2, 1);
            bench.set_common(at, 1, 1);
        }
        bench.set(BAR + 0x3000, 1, 99);
        for value in [1, 3, 11, 15, 0, 0] {
            assert_eq!(bench.set_status(value), running);
        }
        bench.kick(1);
        bench.run_events(&epoll);
        assert_eq!(bench.rings[1].take_used(), None);
        assert_eq!(registers(&bench), before);
        assert_eq!(bench.get(BAR + 0x3000, 1), 1);
        assert_eq!(bench.alive.load(Ordering::SeqCst), 1);
        busy.store(false, Ordering::SeqCst);
        assert_eq!(bench.status(), 0);
        assert_eq!(bench.alive.load(Ordering::SeqCst), 0);
        bench.start();
        assert!(bench.answers());
        // The backend's news ends a reset too, and does not keep the event thread awake then.
        busy.store(true, Ordering::SeqCst);
        bench.set_status(0);
        bench.backend.write_all(b"x").unwrap();
        assert!(bench.run_events(&epoll).contains(&backend));
        assert_eq!(bench.alive.load(Ordering::SeqCst), 1);
        busy.store(false, Ordering::SeqCst);
        assert!(bench.run_events(&epoll).contains(&backend));
        assert_eq!(bench.alive.load(Ordering::SeqCst), 0);
        assert!(!bench.run_events(&epoll).contains(&backend));
        assert_eq!(bench.status(), 0);
    }
}

#[test]
fn c24_ten_thousand_starts_leave_nothing_behind() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut bench = Bench::new();
    bench.start();
    let before = open();
    for round in 0..10_000 {
        bench.start();
        if round % 100 == 0 {
            assert!(bench.answers(), "round {round}");
        }
    }
    bench.set_status(0);
    assert_eq!(bench.alive.load(Ordering::SeqCst), 0);
    assert_eq!(bench.lines.kicks.lock().unwrap().len(), 2);
    assert!(bench.lines.events.lock().unwrap().len() <= 3);
    // Other tests of this process open a few at the same time.
    assert!(open() < before + 1000);
}

#[test]
fn c22_c23_kicks_may_race_with_resets() {
    let mut bench = Bench::new();
    let done = AtomicBool::new(false);
    let pci = bench.pci.clone();
    let mut kicks = 0_u64;
    std::thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            let mut kicks = 0_u64;
            while !done.load(Ordering::Relaxed) {
                pci.on_event((kicks % 2) as u16);
                pci.on_event(BACKEND);
                kicks += 2;
            }
            kicks
        });
        let stop = mock::Stop(&done);
        for _ in 0..2_000 {
            bench.start();
            bench.rings[0].send(&[b"A"], &[3]);
            std::hint::spin_loop();
            assert_eq!(bench.set_status(0), 0);
            assert_eq!(bench.alive.load(Ordering::SeqCst), 0);
        }
        drop(stop);
        kicks = kicker.join().unwrap();
    });
    assert!(kicks > 0);
    bench.start();
    assert!(bench.answers());
}
