//! Descriptors and tables.

use super::*;

#[test]
fn direct_chains() {
    let good = (BUFFER, 16, NEXT, 1);
    let ring_of_eight: Vec<Raw> = (0..8).map(|i| (BUFFER, 1, NEXT, (i + 1) % 8)).collect();
    let mut whole_table = ring_of_eight.clone();
    whole_table[7].2 = 0;
    let half_gib = 1_u32 << 29;
    let last = LOW_END - 16;
    let cases: &[(&str, &[Raw], Result<usize, &str>)] = &[
        ("one buffer", &[(BUFFER, 16, 0, 0)], Ok(1)),
        (
            "`next` without the flag is not looked at",
            &[(BUFFER, 16, 0, 0xffff)],
            Ok(1),
        ),
        ("readable then writable", &[good, (BUFFER, 16, WRITE, 0)], Ok(2)),
        ("all of the table", &whole_table, Ok(8)),
        ("C01 loop through the table", &ring_of_eight, Err("Endless")),
        ("C01 loop to itself", &[(BUFFER, 16, NEXT, 0)], Err("Endless")),
        ("C02 next is the size", &[(BUFFER, 16, NEXT, SIZE)], Err("Next")),
        (
            "C02 next is far outside",
            &[(BUFFER, 16, NEXT, 0xffff)],
            Err("Next"),
        ),
        ("C05 buffer wraps", &[(u64::MAX - 7, 16, 0, 0)], Err("NotShared")),
        (
            "C05 buffer ends at 2^64",
            &[(u64::MAX - 15, 16, 0, 0)],
            Err("NotShared"),
        ),
        ("C06 empty buffer", &[(BUFFER, 0, 0, 0)], Err("Empty")),
        (
            "C06 empty second buffer",
            &[good, (BUFFER, 0, WRITE, 0)],
            Err("Empty"),
        ),
        ("C08 4 GiB - 1", &[(0, u32::MAX, WRITE, 0)], Err("TooLong")),
        ("C08 half a GiB", &[(0, half_gib, WRITE, 0)], Err("NotShared")),
        (
            "C12 writable before readable",
            &[(BUFFER, 1, NEXT | WRITE, 1), good],
            Err("Order"),
        ),
        ("C12 only writable", &[(BUFFER, 1, WRITE, 0)], Ok(1)),
        ("C14 in a BAR", &[(0xc000_8000, 4, WRITE, 0)], Err("NotShared")),
        ("C14 in ECAM", &[(0xe000_0000, 4, WRITE, 0)], Err("NotShared")),
        ("C14 the table itself", &[(RING, 16, WRITE, 0)], Ok(1)),
        ("C15 ends at a hole", &[(last, 16, WRITE, 0)], Ok(1)),
        ("C15 runs into a hole", &[(last, 17, WRITE, 0)], Err("NotShared")),
        (
            "C15 spans a hole",
            &[(last, (HIGH - last) as u32 + 1, WRITE, 0)],
            Err("NotShared"),
        ),
        ("C15 last byte of RAM", &[(HIGH_END - 1, 1, 0, 0)], Ok(1)),
        (
            "C15 past the end of RAM",
            &[(HIGH_END - 1, 2, 0, 0)],
            Err("NotShared"),
        ),
        ("C50 private buffer", &[(PRIVATE, 1, 0, 0)], Err("NotShared")),
        (
            "C50 runs into a private page",
            &[(PRIVATE - 1, 2, WRITE, 0)],
            Err("NotShared"),
        ),
        (
            "C50 runs out of a private page",
            &[(PRIVATE + 0xfff, 2, 0, 0)],
            Err("NotShared"),
        ),
    ];
    for (name, direct, expected) in cases {
        let result = pop(0, direct, &[]).map(|list| list.len());
        assert_eq!(result, expected.map_err(str::to_owned), "{name}");
    }
}

#[test]
fn indirect_tables() {
    let good = (BUFFER, 16, 0, 0);
    let loops: Vec<Raw> = (0..3).map(|i| (BUFFER, 1, NEXT, (i + 1) % 3)).collect();
    let all = feature::INDIRECT_DESC;
    let huge = (MAX_CHAIN as u32 + 1) * 16;
    type Case<'a> = (&'a str, u64, &'a [Raw], &'a [Raw], Result<usize, &'a str>);
    let cases: &[Case<'_>] = &[
        ("one entry", all, &[(TABLE, 16, INDIRECT, 0)], &[good], Ok(1)),
        (
            "flag \"writable\" is ignored",
            all,
            &[(TABLE, 16, INDIRECT | WRITE, 0)],
            &[good],
            Ok(1),
        ),
        (
            "after direct ones",
            all,
            &[(BUFFER, 4, NEXT, 1), (TABLE, 16, INDIRECT, 0)],
            &[good],
            Ok(2),
        ),
        (
            "unused entries",
            all,
            &[(TABLE, 48, INDIRECT, 0)],
            &[good, (1, 0, 0xffff, 9)],
            Ok(1),
        ),
        (
            "not negotiated",
            0,
            &[(TABLE, 16, INDIRECT, 0)],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 nested",
            all,
            &[(TABLE, 16, INDIRECT, 0)],
            &[(TABLE, 16, INDIRECT, 0)],
            Err("Indirect"),
        ),
        (
            "C09 with NEXT",
            all,
            &[(TABLE, 16, INDIRECT | NEXT, 1), good],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 odd length",
            all,
            &[(TABLE, 17, INDIRECT, 0)],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 no length",
            all,
            &[(TABLE, 0, INDIRECT, 0)],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 4 GiB - 16",
            all,
            &[(TABLE, u32::MAX - 15, INDIRECT, 0)],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 one entry too many",
            all,
            &[(TABLE, huge, INDIRECT, 0)],
            &[good],
            Err("Indirect"),
        ),
        (
            "C09 loop",
            all,
            &[(TABLE, 48, INDIRECT, 0)],
            &loops,
            Err("Endless"),
        ),
        (
            "C09 next outside",
            all,
            &[(TABLE, 16, INDIRECT, 0)],
            &[(BUFFER, 1, NEXT, 1)],
            Err("Next"),
        ),
        (
            "C09 table in a hole",
            all,
            &[(LOW_END, 16, INDIRECT, 0)],
            &[],
            Err("NotShared"),
        ),
        (
            "C09 table runs into a hole",
            all,
            &[(LOW_END - 16, 32, INDIRECT, 0)],
            &[],
            Err("NotShared"),
        ),
        (
            "C09 table wraps",
            all,
            &[(u64::MAX - 15, 32, INDIRECT, 0)],
            &[],
            Err("NotShared"),
        ),
        (
            "C50 private table",
            all,
            &[(PRIVATE, 16, INDIRECT, 0)],
            &[],
            Err("NotShared"),
        ),
        (
            "empty buffer",
            all,
            &[(TABLE, 16, INDIRECT, 0)],
            &[(BUFFER, 0, 0, 0)],
            Err("Empty"),
        ),
        (
            "C12 order holds across the table",
            all,
            &[(BUFFER, 1, NEXT | WRITE, 1), (TABLE, 16, INDIRECT, 0)],
            &[good],
            Err("Order"),
        ),
    ];
    for (name, features, direct, indirect, expected) in cases {
        let result = pop(*features, direct, indirect).map(|list| list.len());
        assert_eq!(result, expected.map_err(str::to_owned), "{name}");
    }
}

#[test]
fn c30_what_the_guest_writes_after_the_pop_is_never_looked_at() {
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    let (mut queue, _) = ring.device_side(0, feature::INDIRECT_DESC);
    ring.put(TABLE, 0, BUFFER, 4, NEXT, 1);
    ring.put(TABLE, 1, BUFFER + 0x100, 4, WRITE, 0);
    ring.descriptor(0, TABLE, 32, INDIRECT, 0);
    mem.write_slice(b"good", GuestAddress(BUFFER)).unwrap();
    ring.offer(0);
    let chain = queue.pop(&mem).unwrap().unwrap();
    ring.put(TABLE, 0, PRIVATE, u32::MAX, NEXT, 0);
    ring.put(TABLE, 1, PRIVATE, u32::MAX, WRITE | NEXT, 0);
    ring.descriptor(0, 0, 0, 0, 0);
    let mut text = [0; 4];
    chain.reader(&mem).read_exact(&mut text).unwrap();
    chain.writer(&mem).write_all(b"fine").unwrap();
    assert_eq!(&text, b"good");
    assert_eq!(ring.read(BUFFER + 0x100, 4), b"fine");
}

#[test]
fn c31_a_second_vcpu_that_rewrites_the_tables_gets_only_checked_values_through() {
    let (mem, visible) = memory();
    visible.set(pages(PRIVATE, 0x1000), Visibility::Private);
    let mut ring = MockRing::new(&mem, RING, SIZE);
    let (mut queue, _) = ring.device_side(0, feature::INDIRECT_DESC);
    let done = AtomicBool::new(false);
    let rewriter = MockRing::new(&mem, 0x20_0000, SIZE);
    ring.put(TABLE, 0, BUFFER, 16, 0, 0);
    let (mut good, mut bad) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (start, bytes, flags) in [(BUFFER, 16, 0), (PRIVATE, u32::MAX, NEXT), (BUFFER, 0, WRITE)]
                {
                    rewriter.put(TABLE, 0, start, bytes, flags, 1);
                    rewriter.put(RING, 0, TABLE, bytes & !15, INDIRECT, 0);
                    rewriter.put(RING, 0, start, bytes, flags, 0);
                }
            }
        });
        let _stop = Stop(&done);
        let until = Instant::now() + Duration::from_secs(60);
        // A broken queue stays where it is, so each round starts over at the same entry.
        ring.offer(0);
        while good < 1000 || bad < 1000 {
            assert!(Instant::now() < until, "{good} good, {bad} bad");
            match queue.pop(&mem) {
                Err(_) => bad += 1,
                Ok(chain) => {
                    good += 1;
                    for (start, bytes, _) in segments(&chain.unwrap()) {
                        assert!(bytes > 0 && mem.all_shared(arch::addr::Gpa(start), u64::from(bytes)));
                    }
                    queue.unpop();
                }
            }
        }
    });
}

proptest::proptest! {
    /// No table, however made, makes the walk panic, run on, or hand out anything but shared memory.
    #[test]
    fn any_table_is_walked_safely(
        raw in proptest::collection::vec((0_u64..0x60, 0_u32..4, 0_u16..8, 0_u16..10), 8),
        scale in proptest::sample::select(vec![1_u64, 0x1000, 0x10_0000, 1 << 58]),
        head in 0_u16..9,
    ) {
        let (mem, visible) = memory();
        visible.set(pages(PRIVATE, 0x1000), Visibility::Private);
        let mut ring = MockRing::new(&mem, RING, SIZE);
        for (index, (start, bytes, flags, next)) in (0..).zip(raw) {
            ring.descriptor(index, start.wrapping_mul(scale), bytes * 16, flags, next);
        }
        ring.offer(head);
        let (mut queue, _) = ring.device_side(0, feature::INDIRECT_DESC);
        if let Ok(Some(chain)) = queue.pop(&mem) {
            let list = segments(&chain);
            assert!(!list.is_empty() && list.len() <= MAX_CHAIN + usize::from(SIZE));
            for (start, bytes, _) in list {
                assert!(bytes > 0 && mem.all_shared(arch::addr::Gpa(start), u64::from(bytes)));
            }
            queue.push(&mem, chain.head(), 0).unwrap();
        }
    }
}
