//! A hang is a finding, and on a busy machine only CPU time tells one. What never ends at all is libFuzzer's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use vmm_sys_util::signal::register_signal_handler;

/// CPU time that one input may take.
const CPU: Duration = Duration::from_secs(1);
/// Time that one input may take if it waits for something other than a processor.
const WALL: Duration = Duration::from_secs(8);

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), nanos)
}

/// How long this thread was ready to run while others ran (proc(5), schedstat), where the kernel counts that.
fn starved() -> Duration {
    static COUNTS: OnceLock<Option<File>> = OnceLock::new();
    let mut text = [0; 64];
    let read = COUNTS
        .get_or_init(|| File::open("/proc/thread-self/schedstat").ok())
        .as_ref()
        .and_then(|file| file.read_at(&mut text, 0).ok());
    let text = std::str::from_utf8(&text[..read.unwrap_or(0)]).unwrap_or_default();
    Duration::from_nanos(
        text.split_whitespace()
            .nth(1)
            .and_then(|nanos| nanos.parse().ok())
            .unwrap_or(0),
    )
}

/// Runs `target`.
///
/// # Panics
/// It took too long.
pub fn bounded(target: impl FnOnce()) {
    let (before, starved_before, began) = (cpu(), starved(), Instant::now());
    target();
    let (used, took) = (
        cpu() - before,
        began
            .elapsed()
            .saturating_sub(starved().saturating_sub(starved_before)),
    );
    assert!(used <= CPU, "hang: one input took {used:?} of CPU time");
    assert!(took <= WALL, "hang: one input took {took:?}");
}

/// Does what Rust's own start-up does for cvmm, and libFuzzer's does not.
pub fn ignore_broken_pipes() {
    register_signal_handler(libc::SIGPIPE, on_broken_pipe).unwrap();
}

extern "C" fn on_broken_pipe(_: i32, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {}
