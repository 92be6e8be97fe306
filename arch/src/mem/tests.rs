use std::time::Duration;

use vm_memory::Bytes;

use super::*;
use crate::addr::{PAGE_SIZE, PageRange};

fn range(start: u64, bytes: u64) -> PageRange {
    PageRange::new(Gpa(start), bytes).unwrap()
}

fn memory(bytes: u64) -> (SharedMem, Arc<VisibilityMap>) {
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
    let visible = Arc::new(VisibilityMap::new(&[range(0, bytes)], Visibility::Shared));
    (SharedMem::new(Arc::new(map), visible.clone()), visible)
}

#[test]
fn reads_of_private_pages_fail() {
    let (mem, visible) = memory(0x4000);
    visible.set(range(0x1000, 0x1000), Visibility::Private);
    let cases = [
        (0x0fff, 1, true),
        (0x0fff, 2, false),
        (0x1000, 1, false),
        (0x2000, 0x2000, true),
        (0x3fff, 2, false),
    ];
    for (addr, len, ok) in cases {
        let mut buf = vec![0; len];
        assert_eq!(
            mem.read_slice(&mut buf, GuestAddress(addr)).is_ok(),
            ok,
            "{addr:#x}+{len:#x}"
        );
    }
}

#[test]
fn holes_are_never_shared() {
    let ram = [range(0, 0x3000), range(0x10_0000, 0x5000)];
    let visible = VisibilityMap::new(&ram, Visibility::Private);
    assert_eq!(visible.set(range(0, 0x20_0000), Visibility::Shared), 8);
    assert_eq!(visible.shared_frames(), 8);
    assert!(!visible.all_shared(Gpa(0x3000), 1));
    assert!(visible.all_shared(Gpa(0x10_4fff), 1));
    assert!(visible.covers(range(0x10_0000, 0x5000)));
    assert!(!visible.covers(range(0x2000, 0x2000)));
}

#[test]
fn a_conversion_waits_for_pins_and_a_late_pin_is_refused() {
    let (mem, visible) = memory(0x4000);
    let page = range(0x1000, 0x1000);
    let pin = mem.pin(Gpa(0x1800), 0x10).unwrap();
    visible.set(page, Visibility::Private);
    assert!(!visible.drain(page, Duration::from_millis(1)));
    assert!(mem.pin(Gpa(0x1800), 0x10).is_none());
    drop(pin);
    assert!(visible.drain(page, Duration::from_millis(1)));
}

proptest::proptest! {
    #[test]
    fn the_map_agrees_with_a_list_of_frames(ops in proptest::collection::vec((0_u64..200, 1_u64..90, proptest::bool::ANY), 1..20)) {
        let visible = VisibilityMap::new(&[range(0, 256 * PAGE_SIZE)], Visibility::Private);
        let mut frames = [false; 320];
        for (first, count, shared) in ops {
            let to = if shared { Visibility::Shared } else { Visibility::Private };
            let span = first as usize..(first + count) as usize;
            let expected = frames[span.clone()].iter().enumerate()
                .filter(|(i, f)| first as usize + i < 256 && **f != shared).count() as u64;
            assert_eq!(visible.set(range(first * PAGE_SIZE, count * PAGE_SIZE), to), expected);
            for frame in span.filter(|f| *f < 256) {
                frames[frame] = shared;
            }
        }
        for (frame, shared) in frames.iter().enumerate() {
            assert_eq!(visible.all_shared(Gpa(frame as u64 * PAGE_SIZE), 4096), *shared);
        }
    }
}

/// Every range over two words and a bit of the bitmap, with a hole in RAM, against a list of frames: what one operation
/// changes, counts and undoes.
#[test]
fn every_small_range_moves_exactly_its_frames() {
    const FRAMES: usize = 140;
    let ram = [range(0, 61 * PAGE_SIZE), range(67 * PAGE_SIZE, 70 * PAGE_SIZE)];
    let is_ram = |frame: usize| frame < 61 || (67..137).contains(&frame);
    let visible = VisibilityMap::new(&ram, Visibility::Private);
    let shared = |visible: &VisibilityMap| -> Vec<bool> {
        let shared = |frame: usize| visible.all_shared(Gpa(frame as u64 * PAGE_SIZE), PAGE_SIZE);
        (0..FRAMES).map(shared).collect()
    };
    for first in 0..FRAMES {
        for count in (1..=FRAMES - first).filter(|count| *count < 5 || count % 7 == 0 || first + count > 125)
        {
            let span = first..first + count;
            let all = range(first as u64 * PAGE_SIZE, count as u64 * PAGE_SIZE);
            let inside: Vec<bool> = (0..FRAMES).map(|f| is_ram(f) && span.contains(&f)).collect();
            let frames = inside.iter().filter(|f| **f).count() as u64;
            assert_eq!(visible.set(all, Visibility::Shared), frames, "{span:?}");
            assert_eq!(shared(&visible), inside, "{span:?}");
            assert_eq!(visible.shared_frames(), frames);
            let whole = visible.all_shared(all.start(), all.bytes());
            assert_eq!(whole, span.clone().all(is_ram), "{span:?}");
            // Undoing brings back what was shared, and nothing else.
            let half = range(first as u64 * PAGE_SIZE, count.div_ceil(2) as u64 * PAGE_SIZE);
            visible.set(half, Visibility::Private);
            let before = shared(&visible);
            let hidden = visible.hide(all);
            assert_eq!(visible.shared_frames(), 0, "{span:?}");
            visible.show(hidden);
            assert_eq!(shared(&visible), before, "{span:?}");
            visible.set(all, Visibility::Private);
            assert_eq!(visible.shared_frames(), 0, "{span:?}");
        }
    }
}

/// Bytes near page boundaries, against the frames that they touch.
#[test]
fn bytes_are_shared_if_all_their_frames_are() {
    for pattern in 0_u32..16 {
        let visible = VisibilityMap::new(&[range(0, 4 * PAGE_SIZE)], Visibility::Private);
        for frame in (0..4).filter(|frame| pattern & 1 << frame != 0) {
            visible.set(range(frame * PAGE_SIZE, PAGE_SIZE), Visibility::Shared);
        }
        let edges: Vec<u64> = (0..=5_u64)
            .flat_map(|page| [0, 1, 4095].map(|at| page * PAGE_SIZE + at))
            .collect();
        for start in &edges {
            for len in edges.iter().copied().chain([u64::MAX, u64::MAX - start, 1 << 63]) {
                let end = u128::from(*start) + u128::from(len);
                let frames = u128::from(start / PAGE_SIZE)..end.div_ceil(PAGE_SIZE.into());
                let small = frames.end < 100;
                let expected = small && frames.clone().all(|f| f < 4 && pattern & 1 << f != 0);
                // No bytes of a page are no access to it, but an odd address still names it.
                let empty = len == 0 && start % PAGE_SIZE == 0;
                assert_eq!(
                    visible.all_shared(Gpa(*start), len),
                    expected || empty,
                    "{pattern:#b} {start:#x}+{len:#x}"
                );
            }
        }
    }
}

/// All orders of a few pins and releases over three blocks, against a count for each block.
#[test]
fn pins_count_for_each_block_they_touch() {
    const BLOCK: u64 = 2 << 20;
    let places = [
        (0, 1),
        (BLOCK - 1, 2),
        (BLOCK, BLOCK),
        (0, 3 * BLOCK),
        (3 * BLOCK - 1, 1),
        (5, BLOCK),
    ];
    let (mem, visible) = memory(3 * BLOCK);
    // Each digit of `order` pins a place or, if it is pinned already, releases it.
    for order in 0..places.len().pow(5) {
        let mut pins: Vec<Option<Pin>> = places.iter().map(|_| None).collect();
        let mut digits = order;
        for _ in 0..5 {
            let place = digits % places.len();
            digits /= places.len();
            let (at, len) = places[place];
            pins[place] = match pins[place].take() {
                Some(pin) => {
                    drop(pin);
                    None
                }
                None => Some(mem.pin(Gpa(at), len).unwrap()),
            };
            for block in 0..3 {
                let touches = |((at, len), pin): (&(u64, u64), &Option<Pin>)| {
                    pin.is_some() && *at < (block + 1) * BLOCK && at + len > block * BLOCK
                };
                let busy = places.iter().zip(&pins).any(touches);
                let free = visible.drain(range(block * BLOCK, BLOCK), Duration::ZERO);
                assert_eq!(free, !busy, "{order} block {block}");
            }
        }
        drop(pins);
        assert!(visible.drain(range(0, 3 * BLOCK), Duration::ZERO), "{order}");
    }
}

/// Pins of ranges that are no RAM, at the end of the address space or longer than it leave nothing counted.
#[test]
fn a_pin_that_is_refused_counts_nothing() {
    let (mem, visible) = memory(4 << 20);
    let edges = [
        0,
        1,
        4095,
        (4 << 20) - 1,
        4 << 20,
        1 << 40,
        u64::MAX - 1,
        u64::MAX,
    ];
    for at in edges {
        for len in edges {
            let pin = mem.pin(Gpa(at), len);
            let inside = u128::from(at) + u128::from(len) <= 4 << 20;
            assert!(pin.is_none() || inside || len == 0, "{at:#x}+{len:#x}");
            drop(pin);
            assert!(
                visible.drain(range(0, 4 << 20), Duration::ZERO),
                "{at:#x}+{len:#x}"
            );
        }
    }
}

#[test]
fn a_conversion_remembers_64_kib_for_each_gib() {
    let all = range(0, 2 << 30);
    let visible = VisibilityMap::new(&[all], Visibility::Shared);
    // The first GiB is private by the time that both are named.
    for bytes in [1 << 30, 2 << 30] {
        let hidden = visible.hide(range(0, bytes)).0;
        assert_eq!(size_of_val(hidden.as_slice()), 64 << 10);
    }
}
