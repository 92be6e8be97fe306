//! Nobody is forgotten: whatever a driver offered and a host sent is served in the end, by an event loop that calls a
//! device only when the device asked for it.
//!
//! A schedule is a string of bytes. Each decides one thing: which of the driver, the host and the event thread takes the
//! next step, what it does, and at which of its accesses to memory the device is overtaken by the driver. Where the bytes
//! end, driver and host begin nothing more and only answer. Then the machine must come to rest with nothing left: every
//! chain used, every interrupt that was asked for raised, every byte at the other end, and in order.
//!
//! `CVMM_SERVED` is for how many seconds each device is searched; without it, each gets a fixed number of schedules.
//! `CVMM_SERVED_SEED` is the first of them. A schedule that fails is made short and printed.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may end in a panic"
)]

mod machine;
mod ring;
mod small;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use machine::Machine;
pub(super) use machine::{Lines, Outside, REST, Wired};
pub(super) use ring::Ring;

/// Longest schedule, in decisions.
const LENGTH: usize = 400;
/// Runs that a failing schedule is made short with.
const SHORTENINGS: usize = 400;

/// Decisions, one byte each, and what came of them.
#[derive(Debug)]
pub(super) struct Schedule {
    bytes: Vec<u8>,
    at: AtomicUsize,
    calm: AtomicBool,
    story: Option<Mutex<Vec<String>>>,
    wrong: Mutex<Option<String>>,
}

impl Schedule {
    fn new(bytes: &[u8], told: bool) -> Self {
        Self {
            bytes: bytes.to_vec(),
            at: AtomicUsize::new(0),
            calm: AtomicBool::new(false),
            story: told.then(Mutex::default),
            wrong: Mutex::default(),
        }
    }

    /// One of `count` possibilities; the first once the schedule is over.
    pub(super) fn pick(&self, count: usize) -> usize {
        let at = self.at.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .get(at)
            .map_or(0, |byte| usize::from(*byte) % count.max(1))
    }

    /// One of `of`.
    pub(super) fn one<T: Copy>(&self, of: &[T]) -> T {
        of[self.pick(of.len())]
    }

    /// Nothing is begun any more.
    pub(super) fn is_over(&self) -> bool {
        self.calm.load(Ordering::Relaxed) || self.at.load(Ordering::Relaxed) >= self.bytes.len()
    }

    /// Tells what happens, if somebody listens.
    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        if let Some(story) = &self.story {
            story.lock().unwrap().push(what());
        }
    }

    /// Something came out other than it went in. The first such thing counts.
    pub(super) fn wrong(&self, what: impl FnOnce() -> String) {
        self.wrong.lock().unwrap().get_or_insert_with(what);
    }

    fn verdict(&self) -> Result<(), String> {
        self.wrong.lock().unwrap().take().map_or(Ok(()), Err)
    }
}

/// `count` bytes from number `from` of a pattern that seems not to repeat.
pub(super) fn pattern(from: u64, count: usize) -> Vec<u8> {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    let all = PATTERN.get_or_init(|| {
        let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        (0..1 << 17).map(byte).collect()
    });
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        let at = (from as usize + bytes.len()) % all.len();
        let piece = (count - bytes.len()).min(all.len() - at);
        bytes.extend_from_slice(&all[at..at + piece]);
    }
    bytes
}

/// Makes the parts of a machine; the first bytes of the schedule say which.
pub(super) type Build<'a> = dyn Fn(&Schedule) -> Wired + 'a;

fn play(build: &Build<'_>, bytes: &[u8], told: bool) -> (Result<(), String>, Vec<String>) {
    let schedule = Arc::new(Schedule::new(bytes, told));
    let outcome = Machine::new(build(&schedule), &schedule).play();
    let story = schedule.story.as_ref();
    (
        outcome,
        story.map_or_else(Vec::new, |story| std::mem::take(&mut *story.lock().unwrap())),
    )
}

fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    };
    let length = 20 + usize::from(next()) * usize::from(next()) * LENGTH / 65_536;
    std::iter::repeat_with(next).take(length).collect()
}

/// Leaves out of `bytes` what the failure does not need.
fn shorten(build: &Build<'_>, mut bytes: Vec<u8>) -> Vec<u8> {
    let (mut piece, mut left) = (bytes.len() / 2, SHORTENINGS);
    while piece != 0 {
        let mut at = 0;
        while at < bytes.len() && left != 0 {
            left -= 1;
            let mut fewer = bytes.clone();
            fewer.drain(at..(at + piece).min(bytes.len()));
            if play(build, &fewer, false).0.is_err() {
                bytes = fewer;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    bytes
}

/// Says which schedule it was if a device panics.
struct Seed<'a>(&'a str, u64);

impl Drop for Seed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} with CVMM_SERVED_SEED={}", self.0, self.1);
        }
    }
}

/// Plays `count` schedules, or as many as there is time for.
pub(super) fn search(name: &str, count: u64, build: &Build<'_>) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let first = number("CVMM_SERVED_SEED").unwrap_or(1);
    let until = number("CVMM_SERVED").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut played = 0;
    for seed in first.. {
        if until.map_or(seed - first >= count, |until| Instant::now() >= until) {
            break;
        }
        let _seed = Seed(name, seed);
        played += 1;
        let all = bytes(seed);
        if let (Err(first), _) = play(build, &all, false) {
            let short = shorten(build, all);
            let (again, story) = play(build, &short, true);
            let again = again.err().unwrap_or_else(|| "it does not fail again".into());
            let story = story.join("\n  ");
            panic!("{name}, seed {seed}: {first}\nshorter, {short:?}: {again}\n  {story}");
        }
    }
    println!("{name}: {played} schedules");
}
