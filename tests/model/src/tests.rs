use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use shuttle::thread;

use crate::addr::{Gpa, PageRange};
use crate::visibility::{Visibility, VisibilityMap};

const PAGE: u64 = 4096;
/// A conversion looks this often before it gives up.
const LIMIT: Duration = Duration::from_millis(1);
/// Far more than any model here has that is run in every order.
const INTERLEAVINGS: usize = 300_000;
/// Orders that are tried where every one would be too many.
const SAMPLES: usize = 5_000;

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::new(Gpa(first * PAGE), count * PAGE).unwrap()
}

/// Two pages of RAM, the host's copy of the first, and what may go wrong with it.
#[derive(Clone)]
struct World {
    map: Arc<VisibilityMap>,
    inside: Arc<AtomicU32>,
    gone: Arc<AtomicBool>,
}

impl World {
    fn new() -> Self {
        Self {
            map: Arc::new(VisibilityMap::new(&[pages(0, 2)], Visibility::Shared)),
            inside: Arc::new(AtomicU32::new(0)),
            gone: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The host reads or writes the first page.
    fn touch(&self) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        assert!(!self.gone.load(Ordering::SeqCst), "a discarded page is touched");
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// What `GuestRam::convert` does to the first page.
    fn convert(&self) -> bool {
        let hidden = self.map.hide(pages(0, 1));
        if !self.map.drain(pages(0, 1), LIMIT) {
            self.map.show(hidden);
            return false;
        }
        self.gone.store(true, Ordering::SeqCst);
        assert_eq!(
            self.inside.load(Ordering::SeqCst),
            0,
            "a page is discarded under an access"
        );
        true
    }

    /// And back.
    fn share(&self) {
        self.gone.store(false, Ordering::SeqCst);
        self.map.set(pages(0, 1), Visibility::Shared);
    }

    fn batch(&self) {
        let _batch = self.map.batch();
        if self.map.all_shared(Gpa(8), 16) {
            self.touch();
        }
    }

    fn pinned(&self) {
        if let Some(_pin) = self.map.pin(Gpa(8), 16) {
            self.touch();
        }
    }
}

/// Runs `model` in every order there is.
fn every(model: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let model = move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    };
    shuttle::check_dfs(model, Some(INTERLEAVINGS));
    let count = count.load(std::sync::atomic::Ordering::Relaxed);
    assert!(
        (2..INTERLEAVINGS).contains(&count),
        "not all orders were tried, but {count}"
    );
}

/// `others` beside a conversion of the first page.
fn beside(others: &[fn(&World)], after: fn(&World, bool)) {
    let world = World::new();
    let run = |other: &fn(&World)| {
        let (world, other) = (world.clone(), *other);
        thread::spawn(move || other(&world))
    };
    let threads: Vec<_> = others.iter().map(run).collect();
    let done = world.convert();
    for thread in threads {
        thread.join().unwrap();
    }
    after(&world, done);
}

fn beside_a_conversion(other: fn(&World), after: fn(&World, bool)) {
    every(move || beside(&[other], after));
}

fn whole_or_not_at_all(world: &World, done: bool) {
    assert_eq!(world.map.all_shared(Gpa(0), PAGE), !done);
    assert!(
        world.map.all_shared(Gpa(PAGE), PAGE),
        "the other page is as it was"
    );
    assert!(world.map.drain(pages(0, 2), LIMIT), "a pin is left over");
}

#[test]
fn a_batch_never_meets_a_discarded_page() {
    beside_a_conversion(World::batch, |world, done| {
        assert!(done, "nothing but a pin makes a conversion give up");
        whole_or_not_at_all(world, done);
    });
}

#[test]
fn a_pin_never_meets_a_discarded_page() {
    beside_a_conversion(World::pinned, whole_or_not_at_all);
}

#[test]
fn pins_and_batches_together() {
    let model = || beside(&[World::pinned, World::batch, World::pinned], whole_or_not_at_all);
    shuttle::check_pct(model, SAMPLES, 4);
    shuttle::check_random(model, SAMPLES);
}

#[test]
fn a_page_that_comes_back_is_usable() {
    beside_a_conversion(World::pinned, |world, done| {
        if done {
            world.share();
        }
        world.pinned();
        whole_or_not_at_all(world, false);
    });
}

/// A pin of another page in the same block may delay a conversion, and that is all.
#[test]
fn a_neighbour_is_never_touched_by_mistake() {
    fn neighbour(world: &World) {
        let pin = world.map.pin(Gpa(PAGE + 8), 16);
        assert!(pin.is_some(), "the other page is always shared");
    }
    beside_a_conversion(neighbour, whole_or_not_at_all);
}

/// Frames of one word of the bitmap, moved by two vCPUs at once.
#[test]
fn no_change_of_a_frame_is_lost() {
    every(|| {
        let map = Arc::new(VisibilityMap::new(&[pages(0, 2)], Visibility::Shared));
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || other.set(pages(1, 1), Visibility::Private));
        assert_eq!(map.set(pages(0, 1), Visibility::Private), 1);
        assert_eq!(thread.join().unwrap(), 1);
        assert_eq!(map.shared_frames(), 0);
    });
}

/// Two conversions of overlapping ranges, one after the other as `GuestRam` has it, beside a device.
#[test]
fn conversions_that_overlap_end_as_one_of_them_says() {
    every(|| {
        let world = World::new();
        let order = Arc::new(Mutex::new(()));
        let (other, turn) = (world.clone(), Arc::clone(&order));
        let thread = thread::spawn(move || {
            let _turn = turn.lock().unwrap();
            let hidden = other.map.hide(pages(0, 2));
            // Busy: it changes nothing.
            other.map.show(hidden);
        });
        let done = {
            let _turn = order.lock().unwrap();
            world.convert()
        };
        thread.join().unwrap();
        assert!(done);
        whole_or_not_at_all(&world, true);
    });
}

/// The model can see what it looks for: an access that neither counts itself nor is in a batch is found out.
#[test]
#[should_panic(expected = "a discarded page is touched")]
fn an_access_without_protection_is_found() {
    beside_a_conversion(
        |world: &World| {
            if world.map.all_shared(Gpa(8), 16) {
                world.touch();
            }
        },
        |_, _| {},
    );
}

/// The same for one that looks first and counts itself then.
#[test]
#[should_panic(expected = "a discarded page is touched")]
fn an_access_that_looks_too_early_is_found() {
    beside_a_conversion(
        |world: &World| {
            let shared = world.map.all_shared(Gpa(8), 16);
            let _pin = world.map.pin(Gpa(8), 16);
            if shared {
                world.touch();
            }
        },
        |_, _| {},
    );
}
