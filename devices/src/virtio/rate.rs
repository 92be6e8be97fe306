//! Rates that a device keeps to: bytes and operations per second, as token buckets of one second.
//!
//! An operation starts when both buckets hold anything and then takes its whole cost, into debt if need be. So one
//! that is larger than a bucket is served, and what follows it waits for longer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arch::poll::{Interest, Poll};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// Rates of one direction of a device; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Bytes per second, not zero.
    pub bytes: Option<u64>,
    /// Operations (requests, frames) per second, not zero.
    pub operations: Option<u64>,
}

impl Rates {
    /// True if nothing is limited.
    pub fn are_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }
}

const NANOS: u128 = 1_000_000_000;

/// Tokens that come back at `per_second`, up to as many.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// Below zero is debt.
    level: i128,
    /// When `level` was right.
    at: Instant,
}

impl Bucket {
    fn new(per_second: u64, now: Instant) -> Self {
        Self {
            per_second,
            level: per_second.into(),
            at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let nanos = now.saturating_duration_since(self.at).as_nanos();
        let rate = u128::from(self.per_second).max(1);
        let come = nanos.saturating_mul(rate) / NANOS;
        if come != 0 {
            // What is less than a token stays for the next time.
            let spent = come.saturating_mul(NANOS).div_ceil(rate);
            let rest = Duration::from_nanos(u64::try_from(nanos.saturating_sub(spent)).unwrap_or(0));
            let come = i128::try_from(come).unwrap_or(i128::MAX);
            self.level = self.level.saturating_add(come).min(self.per_second.into());
            self.at = now.checked_sub(rest).unwrap_or(now);
        }
    }

    /// Time until there is something in it.
    fn wait(&self) -> Duration {
        if self.level > 0 {
            return Duration::ZERO;
        }
        let missing = self.level.unsigned_abs().saturating_add(1).saturating_mul(NANOS);
        let nanos = missing.div_ceil(u128::from(self.per_second).max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// The buckets of one direction of a device, and a timer that is readable when a wait is over. It outlives drivers: a
/// reset fills no bucket.
#[derive(Debug)]
struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: OwnedFd,
}

impl Limiter {
    /// Full buckets; `None` where nothing is limited.
    fn new(rates: Rates) -> io::Result<Option<Self>> {
        if rates.are_unlimited() {
            return Ok(None);
        }
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let now = Instant::now();
        Ok(Some(Self {
            bytes: rates.bytes.map(|rate| Bucket::new(rate, now)),
            operations: rates.operations.map(|rate| Bucket::new(rate, now)),
            timer,
        }))
    }

    /// True if an operation may start now; else the timer is set for when one may.
    fn admits(&mut self) -> bool {
        self.admits_at(Instant::now())
    }

    fn admits_at(&mut self, now: Instant) -> bool {
        let mut wait = Duration::ZERO;
        for bucket in [&mut self.bytes, &mut self.operations].into_iter().flatten() {
            bucket.refill(now);
            wait = wait.max(bucket.wait());
        }
        if wait.is_zero() {
            return true;
        }
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: value,
        };
        // Without its timer the device would sleep for ever; then rather let the operation pass.
        let set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        if let Err(e) = &set {
            log::warn!("a rate limit cannot be kept: {e}");
        }
        set.is_err()
    }

    /// Takes the cost of one operation.
    fn take(&mut self, bytes: u64) {
        for (bucket, cost) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.level = bucket.level.saturating_sub(cost.into());
            }
        }
    }

    /// Takes note that the timer was seen.
    fn acknowledge(&self) {
        let mut expirations = [0; 8];
        // Nothing to read means that another operation was admitted meanwhile.
        let _early = rustix::io::read(&self.timer, &mut expirations);
    }
}

/// A limiter that all queues of one direction share; the default limits nothing.
#[derive(Clone, Debug, Default)]
pub struct Limit(Option<Arc<Mutex<Limiter>>>);

impl Limit {
    /// Full buckets for `rates`; `poll` becomes readable, for `token`, when a wait is over.
    ///
    /// # Errors
    /// The process or host has no more descriptors.
    pub fn new(rates: Rates, poll: &Poll, token: u64) -> io::Result<Self> {
        const READ: Interest = Interest {
            read: true,
            ..Interest::NONE
        };
        let limiter = Limiter::new(rates)?;
        if let Some(limiter) = &limiter {
            poll.watch(limiter.timer.as_fd(), token, &mut { Interest::NONE }, READ)?;
        }
        Ok(Self(limiter.map(|limiter| Arc::new(Mutex::new(limiter)))))
    }

    /// True if an operation may start now; else the poll tells when one may.
    pub fn admits(&self) -> bool {
        self.with(Limiter::admits).unwrap_or(true)
    }

    /// Takes the cost of one operation.
    pub fn take(&self, bytes: u64) {
        self.with(|limiter| limiter.take(bytes));
    }

    /// Takes note that the end of a wait was seen.
    pub fn acknowledge(&self) {
        self.with(|limiter| limiter.acknowledge());
    }

    fn with<T>(&self, work: impl FnOnce(&mut Limiter) -> T) -> Option<T> {
        let limiter = self.0.as_ref()?;
        Some(work(&mut limiter.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes: Option<u64>, operations: Option<u64>) -> (Limiter, Instant) {
        let limiter = Limiter::new(Rates { bytes, operations }).unwrap().unwrap();
        let start = [&limiter.bytes, &limiter.operations]
            .into_iter()
            .flatten()
            .map(|bucket| bucket.at)
            .max();
        (limiter, start.unwrap())
    }

    /// Operations of `cost` bytes that start within `milliseconds`, tried every one of them.
    fn started(limiter: &mut Limiter, start: Instant, milliseconds: u64, cost: u64) -> u64 {
        let mut count = 0;
        for ms in 0..milliseconds {
            while limiter.admits_at(start + Duration::from_millis(ms)) {
                limiter.take(cost);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn over_time_the_rate_is_kept_after_a_burst_of_one_second() {
        // (bytes, operations, cost, ms, least, most)
        let cases = [
            (Some(1_000_000), None, 1000, 4000, 4990, 5001),
            (None, Some(100), 1_000_000, 4000, 499, 501),
            // What comes back in a millisecond is no whole operation.
            (None, Some(700), 0, 4000, 3490, 3501),
            (Some(1_000_000), Some(100), 1000, 4000, 499, 501),
            (Some(1_000_000), Some(1_000_000), 10_000, 4000, 499, 501),
            // One operation is ten seconds' worth.
            (Some(1_000), None, 10_000, 8_000, 1, 1),
            (Some(u64::MAX), Some(u64::MAX), u64::MAX, 2, 1, 1_000_000),
        ];
        for (bytes, operations, cost, ms, least, most) in cases {
            let (mut limiter, start) = limiter(bytes, operations);
            let count = if bytes == Some(u64::MAX) {
                u64::from(limiter.admits_at(start))
            } else {
                started(&mut limiter, start, ms, cost)
            };
            assert!(
                (least..=most).contains(&count),
                "{bytes:?} {operations:?} {cost}: {count}"
            );
        }
    }

    #[test]
    fn the_timer_is_readable_when_an_operation_may_start() {
        let (mut limiter, _) = limiter(None, Some(50));
        while limiter.admits() {
            limiter.take(0);
        }
        let mut watched = [rustix::event::PollFd::new(
            &limiter.timer,
            rustix::event::PollFlags::IN,
        )];
        let limit = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        assert_eq!(rustix::event::poll(&mut watched, Some(&limit)).unwrap(), 1);
        limiter.acknowledge();
        assert!(limiter.admits());
    }

    #[test]
    fn no_limit_is_no_limiter() {
        assert!(Limiter::new(Rates::default()).unwrap().is_none());
    }
}
