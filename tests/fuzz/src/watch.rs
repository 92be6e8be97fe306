//! A hang is a finding, and on a busy machine only CPU time tells one. What never ends at all is libFuzzer's.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use vmm_sys_util::signal::register_signal_handler;

/// CPU time that one input may take.
const CPU: Duration = Duration::from_secs(1);
/// Time that one input may take if it waits for something.
const WALL: Duration = Duration::from_secs(8);

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), nanos)
}

/// Runs `target`.
///
/// # Panics
/// It took too long.
pub fn bounded(target: impl FnOnce()) {
    let (before, began) = (cpu(), Instant::now());
    target();
    let (used, took) = (cpu() - before, began.elapsed());
    assert!(used <= CPU, "hang: one input took {used:?} of CPU time");
    assert!(took <= WALL, "hang: one input took {took:?}");
}

/// Does what Rust's own start-up does for cvmm, and libFuzzer's does not.
pub fn ignore_broken_pipes() {
    register_signal_handler(libc::SIGPIPE, on_broken_pipe).unwrap();
}

extern "C" fn on_broken_pipe(_: i32, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {}
