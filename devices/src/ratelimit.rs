//! Log lines that a guest can cause, at a bounded rate.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a few lines per second through and counts the rest. One per device or per kind of message; `new` is
/// `const`, so it can be a `static`.
#[derive(Debug)]
pub struct LogGate {
    lines_per_second: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    second: Option<Instant>,
    admitted: u32,
    dropped: u64,
}

impl LogGate {
    /// A gate that lets `lines_per_second` lines through in each second.
    pub const fn new(lines_per_second: u32) -> Self {
        let state = State {
            second: None,
            admitted: 0,
            dropped: 0,
        };
        Self {
            lines_per_second,
            state: Mutex::new(state),
        }
    }

    /// Logs a warning if the rate allows, with the number of lines dropped since the last one.
    pub fn warn(&self, line: fmt::Arguments<'_>) {
        match self.admit(Instant::now()) {
            None => {}
            Some(0) => log::warn!("{line}"),
            Some(dropped) => log::warn!("{line} ({dropped} earlier lines dropped)"),
        }
    }

    /// How many of a thousand lines within one second may be written.
    #[cfg(test)]
    pub(crate) fn lines_in_a_second(&self) -> usize {
        // Later than whatever other tests write.
        let start = Instant::now() + Duration::from_secs(3600);
        let moments = (0..1000).map(|i| start + Duration::from_micros(999 * i));
        moments.filter(|now| self.admit(*now).is_some()).count()
    }

    /// `Some` if a line may be written at `now`: how many were refused since the last one.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let running = state
            .second
            .is_some_and(|start| now.saturating_duration_since(start) < Duration::from_secs(1));
        if !running {
            state.second = Some(now);
            state.admitted = 0;
        }
        if state.admitted >= self.lines_per_second {
            state.dropped = state.dropped.saturating_add(1);
            return None;
        }
        state.admitted = state.admitted.saturating_add(1);
        Some(std::mem::take(&mut state.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_costs_a_bounded_number_of_lines_and_is_counted() {
        let gate = LogGate::new(3);
        let start = Instant::now();
        let admitted = (0..1_000_000).filter(|_| gate.admit(start).is_some()).count();
        assert_eq!(admitted, 3);
        assert_eq!(gate.admit(start + Duration::from_millis(999)), None);
        assert_eq!(gate.admit(start + Duration::from_secs(1)), Some(999_998));
        assert_eq!(gate.admit(start + Duration::from_secs(1)), Some(0));
    }
}
