//! Memory that lies: it changes between two accesses of a device, at a place that the test chooses. Every place is tried
//! in turn, so nothing here depends on a race.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may end in a panic"
)]

mod small;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arch::addr::Gpa;
use arch::mem::{SharedMem, VisibilityMap, Watch};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::device::Running;
use super::mock::{self, INDIRECT, MockRing, NEXT, WRITE, pages};
use super::queue::QueueBroken;

/// Page size in bytes.
const PAGE: u64 = 4096;
/// What a private page holds.
const CANARY: u8 = 0xc5;
/// Accesses of one request; the longest here has some sixty.
const ACCESSES: usize = 500;
/// A buffer that no chain names before a lie does.
pub(super) const ELSEWHERE: u64 = 0xf0_0000;

/// One field of the guest's memory, and what it says later.
#[derive(Clone, Debug)]
pub(super) struct Lie {
    name: String,
    at: u64,
    later: Vec<u8>,
}

impl Lie {
    /// `bytes` will stand at `at`.
    pub(super) fn new(name: impl Into<String>, at: u64, later: &[u8]) -> Self {
        Self {
            name: name.into(),
            at,
            later: later.to_vec(),
        }
    }
}

/// When memory changes, and how.
#[derive(Clone, Debug)]
enum Plan {
    /// Never.
    Honest,
    /// Before access number `.0`, to this.
    Change(usize, Lie),
    /// Before access number `.0`, the page there turns private.
    Hide(usize, u64),
    /// Bytes that were read once are others when they are read again, but for the fields that say how far a ring is.
    SecondRead,
}

#[derive(Debug)]
struct Liar {
    map: Arc<GuestMemoryMmap>,
    visible: Arc<VisibilityMap>,
    /// Fields of rings that are made to be read again and again.
    moving: Vec<std::ops::Range<u64>>,
    plan: Plan,
    awake: AtomicBool,
    state: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    accesses: usize,
    fired: bool,
    read: BTreeSet<u64>,
    twice: BTreeSet<u64>,
}

impl Watch for Liar {
    fn before(&self, at: Gpa, bytes: u64, access: Permissions) {
        if !self.awake.load(Ordering::SeqCst) {
            return;
        }
        let mut seen = self.state.lock().unwrap();
        let now = seen.accesses;
        seen.accesses += 1;
        match &self.plan {
            Plan::Change(when, lie) if *when == now => {
                seen.fired = true;
                self.map.write_slice(&lie.later, GuestAddress(lie.at)).unwrap();
            }
            Plan::Hide(when, page) if *when == now => {
                seen.fired = true;
                let _hidden = self.visible.hide(pages(*page, PAGE));
            }
            Plan::SecondRead if access == Permissions::Read => self.read(&mut seen, at.0, bytes),
            _ => {}
        }
    }
}

impl Liar {
    fn read(&self, seen: &mut Seen, at: u64, bytes: u64) {
        // Long reads are data, which nothing is decided by.
        for at in at..at.saturating_add(bytes.min(PAGE)) {
            if !seen.read.insert(at) && !self.moving.iter().any(|field| field.contains(&at)) {
                seen.twice.insert(at);
                if let Ok(byte) = self.map.read_obj::<u8>(GuestAddress(at)) {
                    self.map.write_obj(!byte, GuestAddress(at)).unwrap();
                }
            }
        }
    }
}

/// A device with a driver that has work for it.
pub(super) struct Subject {
    /// The driver's rings.
    pub(super) rings: Vec<MockRing>,
    /// The device, until it breaks.
    pub(super) running: Option<Box<dyn Running>>,
    /// Makes the device work until it is done or breaks.
    pub(super) work: fn(&mut dyn Running, &Outside) -> Result<(), QueueBroken>,
    /// What `work` and `effect` need.
    pub(super) outside: Outside,
    /// What came out at the other end.
    pub(super) effect: fn(&mut Outside) -> Vec<u8>,
    /// Buffers whose content counts: address and length.
    pub(super) buffers: Vec<(u64, usize)>,
}

/// The other end of a device, whatever it is.
pub(super) type Outside = Box<dyn std::any::Any>;

/// Memory for a subject: as its driver has it, and as its device does.
pub(super) struct Memory {
    /// The driver's view.
    pub(super) driver: SharedMem,
    /// The device's view.
    pub(super) device: SharedMem,
    visible: Arc<VisibilityMap>,
    liar: Arc<Liar>,
}

impl Memory {
    /// Fresh memory with a liar that follows `plan`; `watch` says who sees the device's accesses.
    fn new<W: Watch + 'static>(
        plan: Plan,
        moving: Vec<std::ops::Range<u64>>,
        watch: impl FnOnce(&Arc<Liar>) -> Arc<W>,
    ) -> Self {
        let (driver, visible) = mock::memory();
        let liar = Arc::new(Liar {
            map: Arc::clone(driver.mapping()),
            visible: Arc::clone(&visible),
            moving,
            plan,
            awake: AtomicBool::new(false),
            state: Mutex::default(),
        });
        Self {
            device: driver.clone().watched(watch(&liar)),
            driver,
            visible,
            liar,
        }
    }
}

/// Builds a device and its work; the second result are fields of headers that the driver may change later.
pub(super) type Build<'a> = dyn Fn(&Memory) -> (Subject, Vec<Lie>) + 'a;

/// A kind of request.
pub(super) struct Case<'a> {
    name: &'a str,
    build: &'a Build<'a>,
}

/// What one run led to.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    error: Option<String>,
    used: Vec<Vec<(u32, u32)>>,
    buffers: Vec<Vec<u8>>,
    effect: Vec<u8>,
}

/// Ring index, flags and event fields of a ring at `base` with `size` descriptors.
fn moving(ring: &MockRing) -> Vec<std::ops::Range<u64>> {
    let (avail, size) = (ring.avail(), u64::from(ring.size));
    vec![
        avail..avail + 4,
        avail + 4 + size * 2..avail + 6 + size * 2,
        ring.used_ring()..ring.used_ring() + 6 + size * 8,
    ]
}

struct Run {
    subject: Subject,
    memory: Memory,
    lies: Vec<Lie>,
    error: Option<String>,
}

impl Run {
    fn prepare(case: &Case<'_>, plan: Plan) -> Self {
        // Where rings lie does not depend on the plan, so a first memory tells.
        let fields = match plan {
            Plan::SecondRead => Self::prepare(case, Plan::Honest)
                .subject
                .rings
                .iter()
                .flat_map(moving)
                .collect(),
            _ => vec![],
        };
        let memory = Memory::new(plan, fields, Arc::<Liar>::clone);
        let (subject, mut lies) = (case.build)(&memory);
        lies.extend(subject.rings.iter().flat_map(ring_lies));
        Self {
            subject,
            memory,
            lies,
            error: None,
        }
    }

    fn start(case: &Case<'_>, plan: Plan) -> Self {
        let mut run = Self::prepare(case, plan);
        run.memory.liar.awake.store(true, Ordering::SeqCst);
        run.work();
        run
    }

    fn work(&mut self) {
        let began = Instant::now();
        let Some(running) = &mut self.subject.running else {
            return;
        };
        if let Err(e) = (self.subject.work)(&mut **running, &self.subject.outside) {
            self.error = Some(format!("{:?}", std::mem::discriminant(&e.source)));
            // As the transport does.
            self.subject.running = None;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "a request hangs");
    }

    fn fired(&self) -> bool {
        self.memory.liar.state.lock().unwrap().fired
    }

    fn outcome(mut self) -> Outcome {
        self.memory.liar.awake.store(false, Ordering::SeqCst);
        let taken = |ring: &mut MockRing| std::iter::from_fn(|| ring.take_used()).take(100).collect();
        let used = self.subject.rings.iter_mut().map(taken).collect();
        let driver = &self.memory.driver;
        let read = |(at, len): &(u64, usize)| {
            let mut bytes = vec![0; *len];
            driver.read_slice(&mut bytes, GuestAddress(*at)).unwrap();
            bytes
        };
        Outcome {
            error: self.error.take(),
            used,
            buffers: self.subject.buffers.iter().map(read).collect(),
            effect: (self.subject.effect)(&mut self.subject.outside),
        }
    }
}

/// Each field of each descriptor that a driver wrote, and of the available ring, with other values. Descriptor 12 is a
/// whole chain by itself.
fn ring_lies(ring: &MockRing) -> Vec<Lie> {
    let mut lies = vec![];
    ring.descriptor(12, ELSEWHERE, 64, WRITE, 0);
    for index in 0..u64::from(ring.size.min(6)) {
        let at = ring.table() + index * 16;
        let raw = ring.read(at, 16);
        let field = |from: usize, to| {
            let mut bytes = [0; 8];
            bytes[..to - from].copy_from_slice(&raw[from..to]);
            u64::from_le_bytes(bytes)
        };
        let (len, flags) = (field(8, 12) as u32, field(12, 14) as u16);
        if len == 0 {
            continue;
        }
        for (what, offset, later) in [
            ("address", 0, ELSEWHERE.to_le_bytes().to_vec()),
            ("address", 0, mock::LOW_END.to_le_bytes().to_vec()),
            ("length", 8, (len + 16).to_le_bytes().to_vec()),
            ("length", 8, (len / 2).to_le_bytes().to_vec()),
            ("length", 8, 0_u32.to_le_bytes().to_vec()),
            ("flags", 12, (flags ^ WRITE).to_le_bytes().to_vec()),
            ("flags", 12, (flags ^ NEXT).to_le_bytes().to_vec()),
            ("flags", 12, INDIRECT.to_le_bytes().to_vec()),
            ("next", 14, 12_u16.to_le_bytes().to_vec()),
            ("next", 14, 9999_u16.to_le_bytes().to_vec()),
        ] {
            lies.push(Lie::new(
                format!("{what} of descriptor {index}"),
                at + offset,
                &later,
            ));
        }
    }
    for (what, at, later) in [
        ("head", ring.avail() + 4, 12_u16),
        ("head", ring.avail() + 4, 9999),
        ("flags", ring.avail(), 1),
    ] {
        lies.push(Lie::new(
            format!("{what} of the available ring"),
            at,
            &later.to_le_bytes(),
        ));
    }
    lies
}

/// Runs everything here on what `build` makes.
pub(super) fn check(name: &str, build: &Build<'_>) {
    let case = &Case { name, build };
    each_byte_is_read_once(case);
    a_field_counts_as_it_was_or_as_it_is(case);
    an_index_that_jumps_ends_the_queue_at_most(case);
    a_page_that_turns_private_is_left_alone(case);
}

/// No request is decided by bytes that were read twice.
fn each_byte_is_read_once(case: &Case<'_>) {
    let honest = Run::start(case, Plan::Honest).outcome();
    let again = Run::start(case, Plan::Honest).outcome();
    assert_eq!(honest, again, "{}: not deterministic", case.name);
    assert_eq!(
        honest.error, None,
        "{}: a good request breaks the queue",
        case.name
    );
    let run = Run::start(case, Plan::SecondRead);
    let twice = std::mem::take(&mut run.memory.liar.state.lock().unwrap().twice);
    assert!(twice.is_empty(), "{}: read twice: {twice:x?}", case.name);
    assert_eq!(run.outcome(), honest, "{}", case.name);
}

/// Wherever one field changes, the outcome is that of the one value or of the other.
fn a_field_counts_as_it_was_or_as_it_is(case: &Case<'_>) {
    let honest = Run::start(case, Plan::Honest).outcome();
    let lies = Run::prepare(case, Plan::Honest).lies;
    assert!(lies.len() > 10, "{}", case.name);
    for lie in lies {
        let mut before = Run::prepare(case, Plan::Honest);
        before
            .memory
            .driver
            .write_slice(&lie.later, GuestAddress(lie.at))
            .unwrap();
        before.work();
        let changed = before.outcome();
        for when in 0.. {
            assert!(when < ACCESSES, "{}: endless", case.name);
            let run = Run::start(case, Plan::Change(when, lie.clone()));
            if !run.fired() {
                break;
            }
            let outcome = run.outcome();
            assert!(
                outcome == honest || outcome == changed,
                "{}: {} changes to {:x?} before access {when}\n{outcome:x?}\nis neither\n{honest:x?}\nnor\n{changed:x?}",
                case.name,
                lie.name,
                lie.later
            );
        }
    }
}

/// The index of an available ring is read again and again, as it must be. One that runs away breaks the queue, and what
/// was given back before is as it should be.
fn an_index_that_jumps_ends_the_queue_at_most(case: &Case<'_>) {
    let honest = Run::start(case, Plan::Honest).outcome();
    for ring in Run::prepare(case, Plan::Honest).subject.rings {
        for index in [0_u16, 9999] {
            let lie = Lie::new("index", ring.avail() + 2, &index.to_le_bytes());
            for when in 0.. {
                assert!(when < ACCESSES, "{}: endless", case.name);
                let run = Run::start(case, Plan::Change(when, lie.clone()));
                if !run.fired() {
                    break;
                }
                let outcome = run.outcome();
                for (used, all) in outcome.used.iter().zip(&honest.used) {
                    assert!(all.starts_with(used), "{}: {used:x?} of {all:x?}", case.name);
                }
            }
        }
    }
}

/// Wherever a page turns private, the device gives up or does without, and once no access is under way never touches
/// the page again.
fn a_page_that_turns_private_is_left_alone(case: &Case<'_>) {
    for page in touched(case) {
        for when in 0.. {
            assert!(when < ACCESSES, "{}: endless", case.name);
            let mut run = Run::start(case, Plan::Hide(when, page));
            if !run.fired() {
                break;
            }
            let what = format!("{}: page {page:#x} before access {when}", case.name);
            let until = Instant::now() + Duration::from_secs(5);
            while !run
                .memory
                .visible
                .drain(pages(page, PAGE), Duration::from_millis(1))
            {
                assert!(Instant::now() < until, "{what}: never free");
                run.work();
            }
            let map = Arc::clone(run.memory.driver.mapping());
            map.write_slice(&[CANARY; PAGE as usize], GuestAddress(page))
                .unwrap();
            run.work();
            run.subject.running = None;
            let mut seen = [0; PAGE as usize];
            map.read_slice(&mut seen, GuestAddress(page)).unwrap();
            assert!(seen == [CANARY; PAGE as usize], "{what}: written");
        }
    }
}

/// Pages that an honest request touches.
fn touched(case: &Case<'_>) -> BTreeSet<u64> {
    #[derive(Debug, Default)]
    struct Recorder(Mutex<BTreeSet<u64>>);
    impl Watch for Recorder {
        fn before(&self, at: Gpa, bytes: u64, _access: Permissions) {
            let last = at.0 + bytes.max(1) - 1;
            self.0
                .lock()
                .unwrap()
                .extend((at.0 / PAGE..=last / PAGE).map(|page| page * PAGE));
        }
    }
    let recorder = Arc::new(Recorder::default());
    let memory = Memory::new(Plan::Honest, vec![], |_| Arc::<Recorder>::clone(&recorder));
    let (mut subject, _) = (case.build)(&memory);
    let running = subject.running.as_mut().unwrap();
    (subject.work)(&mut **running, &subject.outside).unwrap();
    std::mem::take(&mut recorder.0.lock().unwrap())
}
