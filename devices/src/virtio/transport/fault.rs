//! What is said when a device stops. A guest can break its device as often as it likes, so words are rationed.

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use crate::virtio::queue::QueueBroken;

/// Silence after each report of one device.
const QUIET: Duration = Duration::from_secs(10);

/// Why a device stopped.
#[derive(Debug)]
pub enum Cause {
    /// The guest broke a queue.
    Guest(QueueBroken),
    /// The device could not start.
    Host(io::Error),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(broken) => {
                write!(f, "queue {}: {}", broken.queue, broken.source)?;
                let inner = std::error::Error::source(&broken.source);
                inner.map_or(Ok(()), |inner| write!(f, ": {inner}"))
            }
            Self::Host(error) => write!(f, "its backend did not start: {error}"),
        }
    }
}

/// One report.
#[derive(Debug)]
pub struct Fault<'a> {
    /// Name of the device.
    pub device: &'a str,
    /// Why it stopped this time.
    pub cause: Cause,
    /// How often it has stopped in all, at least 1.
    pub count: u64,
}

/// Is told of devices that stopped until their driver resets them; at most once in ten seconds for each device.
pub trait Observer: Send + Sync + fmt::Debug {
    /// Takes a report. Called with the device locked; must not block.
    fn device_broken(&self, fault: &Fault<'_>);
}

/// Faults of one device.
#[derive(Debug, Default)]
pub(super) struct FaultLog {
    count: u64,
    last: Option<Instant>,
}

impl FaultLog {
    pub(super) fn report(&mut self, device: &str, cause: Cause, observer: &dyn Observer) {
        if !self.admit(Instant::now()) {
            return;
        }
        let count = self.count;
        log::warn!("device {device} stopped until its driver resets it (fault {count}): {cause}");
        observer.device_broken(&Fault { device, cause, count });
    }

    /// Counts a fault at `now`; true if it is to be told of.
    fn admit(&mut self, now: Instant) -> bool {
        self.count = self.count.saturating_add(1);
        let quiet = self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < QUIET);
        if !quiet {
            self.last = Some(now);
        }
        !quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_device_is_told_of_once_in_10_seconds() {
        let (mut log, start) = (FaultLog::default(), Instant::now());
        let moments = [0, 1, 9_999, 10_000, 10_001, 19_999, 20_000];
        let told = moments.map(|ms| log.admit(start + Duration::from_millis(ms)));
        assert_eq!(told, [true, false, false, true, false, false, true]);
        assert_eq!(log.count, 7);
    }
}
