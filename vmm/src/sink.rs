//! The log: lines on standard error, without time stamps (whoever collects them adds those), and with a limit, so that
//! a guest that provokes warnings cannot fill the host's disk.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use log::{LevelFilter, Log, Metadata, Record};

/// How much is logged.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the log crate's levels")]
pub enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::Off,
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

/// Lines in one [`PERIOD`] after which the rest is only counted.
const BURST: u32 = 100;
const PERIOD: Duration = Duration::from_secs(1);

struct Sink(Mutex<Budget>);

/// How many lines may still be written.
#[derive(Debug)]
struct Budget {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

static SINK: Sink = Sink(Mutex::new(Budget {
    since: None,
    written: 0,
    suppressed: 0,
}));

/// Makes standard error the destination of all log lines up to `level`. Only the first call counts.
pub fn install(level: Level) {
    if log::set_logger(&SINK).is_ok() {
        log::set_max_level(level.into());
    }
}

impl Budget {
    /// None if a line must not be written; else the lines suppressed before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let fresh = self.since.is_none_or(|since| now.duration_since(since) >= PERIOD);
        if fresh {
            self.since = Some(now);
            self.written = 0;
        }
        if self.written >= BURST {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.written = self.written.saturating_add(1);
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// A record's line, after one about those that are missing before it.
fn text(record: &Record<'_>, suppressed: u64) -> String {
    let missing = match suppressed {
        0 => String::new(),
        lines => format!("cvmm: {lines} log lines suppressed\n"),
    };
    // A message may carry a guest's words; one record stays one line.
    let message = record.args().to_string().replace(|c: char| c.is_control(), " ");
    let level = record.level().as_str().to_ascii_lowercase();
    format!("{missing}cvmm: {level}: {message}\n")
}

impl Log for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let admitted = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .admit(Instant::now());
        let Some(suppressed) = admitted else { return };
        let text = text(record, suppressed);
        // Nobody is left to tell if standard error is gone.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str, suppressed: u64) -> String {
        let mut record = Record::builder();
        record.level(log::Level::Warn);
        text(&record.args(format_args!("{message}")).build(), suppressed)
    }

    #[test]
    fn the_words_of_a_guest_stay_on_their_line() {
        let said = line("a\ncvmm: error: b\r\x1b[2J\u{9b}c", 0);
        assert_eq!(said, "cvmm: warn: a cvmm: error: b  [2J c\n");
        assert_eq!(line("x", 3), "cvmm: 3 log lines suppressed\ncvmm: warn: x\n");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut budget = Budget {
            since: None,
            written: 0,
            suppressed: 0,
        };
        let start = Instant::now();
        let admitted = (0..107).filter(|_| budget.admit(start).is_some()).count();
        assert_eq!(admitted, 100);
        assert_eq!(budget.admit(start + Duration::from_millis(999)), None);
        let later = start + Duration::from_secs(1);
        assert_eq!(budget.admit(later), Some(8));
        assert_eq!(budget.admit(later), Some(0));
    }
}
