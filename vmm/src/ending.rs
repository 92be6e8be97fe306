//! How a run ends, and the exit code that says so.

use std::fmt;
use std::io;

/// What ended a machine that ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off, by itself or because it was asked to.
    PowerOff,
    /// The guest asked for a reboot, and `--no-reboot` was given.
    Reboot,
    /// The guest or its shim ended itself and said why; the text is safe to print.
    Terminated(String),
    /// The guest crashed: a triple fault, or a state that no CPU can run.
    Crashed(String),
    /// A second signal (its number) ended it at once, or Ctrl-A x, which counts as SIGINT.
    Forced(u32),
}

/// Why a machine could not be started or kept running.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The host lacks something that only showed when it was needed.
    #[error("{what}; {remedy}")]
    HostLacks {
        /// What is missing.
        what: String,
        /// How to get it.
        remedy: String,
    },
    /// Something is in use by another process.
    #[error("{what}: in use; {remedy}")]
    Busy {
        /// What is in use.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The platform or its firmware refuses the launch.
    #[error("launch refused")]
    Refused(#[from] arch::platform::PlatformError),
    /// The host's kernel failed at something that works on a sound host.
    #[error("{doing}")]
    Host {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A mistake of cvmm's.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

impl RunError {
    /// For `map_err`: the kernel failed at `doing`.
    pub fn host(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Host { doing, source }
    }

    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        match self {
            Self::HostLacks { .. } => ExitClass::HostLacks,
            Self::Busy { .. } => ExitClass::Busy,
            Self::Refused(_) => ExitClass::Refused,
            Self::Host { .. } => ExitClass::HostFailed,
            Self::Internal(_) => ExitClass::Internal,
        }
    }
}

/// Exit codes of cvmm. Their numbers are part of its interface and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitClass {
    /// The guest powered off; or the command did what it should.
    Success = 0,
    /// Wrong usage, configuration or input file.
    Usage = 2,
    /// The guest asked for a reboot, and `--no-reboot` was given.
    Reboot = 10,
    /// The guest ended itself.
    Terminated = 11,
    /// The guest crashed.
    Crashed = 12,
    /// The host lacks something.
    HostLacks = 20,
    /// Something is in use.
    Busy = 21,
    /// The launch was refused.
    Refused = 22,
    /// The host failed.
    HostFailed = 30,
    /// What was checked is not what was expected.
    Mismatch = 40,
    /// cvmm's mistake.
    Internal = 70,
}

/// Each code with its meaning, as `--help`, the manual page and the README show it.
pub const EXIT_CODES: &[(ExitClass, &str)] = &[
    (
        ExitClass::Success,
        "the guest powered off; for other commands: done, and all is well",
    ),
    (ExitClass::Usage, "wrong usage, configuration or input file"),
    (
        ExitClass::Reboot,
        "the guest asked for a reboot, and --no-reboot was given",
    ),
    (
        ExitClass::Terminated,
        "the guest or its boot shim ended itself and gave a reason",
    ),
    (ExitClass::Crashed, "the guest crashed (triple fault)"),
    (
        ExitClass::HostLacks,
        "the host lacks something: KVM, permission, SNP or TDX (see cvmm doctor)",
    ),
    (ExitClass::Busy, "a disk or socket is in use by another process"),
    (
        ExitClass::Refused,
        "the platform or its firmware refused the launch",
    ),
    (
        ExitClass::HostFailed,
        "the host's kernel failed at building or running the guest, or at writing a result",
    ),
    (
        ExitClass::Mismatch,
        "a report that does not verify, or two launches that differ",
    ),
    (ExitClass::Internal, "a mistake in cvmm; please report it"),
];

/// Added to the number of a signal that forced the end, as shells do: 130 for SIGINT, 143 for SIGTERM.
const SIGNAL: u8 = 128;

impl Ending {
    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff => ExitClass::Success as u8,
            Self::Reboot => ExitClass::Reboot as u8,
            Self::Terminated(_) => ExitClass::Terminated as u8,
            Self::Crashed(_) => ExitClass::Crashed as u8,
            Self::Forced(signal) => SIGNAL.saturating_add(u8::try_from(*signal).unwrap_or(0)),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => to.write_str("guest powered off"),
            Self::Reboot => to.write_str("guest asked for a reboot"),
            Self::Terminated(reason) => write!(to, "guest ended itself: {reason}"),
            Self::Crashed(reason) => write!(to, "guest crashed: {reason}"),
            Self::Forced(signal) => write!(to, "ended at once on request (signal {signal})"),
        }
    }
}

/// The table of exit codes as text, one line each.
pub fn exit_code_table() -> String {
    let rows = EXIT_CODES.iter().map(|(class, meaning)| (*class as u8, *meaning));
    let forced = (
        SIGNAL,
        "plus a signal's number: ended at once by a second SIGTERM (143), SIGINT or Ctrl-A x (130)",
    );
    let mut text = String::from("Exit codes:\n");
    for (code, meaning) in rows.chain([forced]) {
        text.push_str(&format!("{code:>5}  {meaning}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_have_their_documented_codes() {
        let cases = [
            (Ending::PowerOff, 0, "guest powered off"),
            (Ending::Reboot, 10, "guest asked for a reboot"),
            (Ending::Terminated("GHCB".into()), 11, "guest ended itself: GHCB"),
            (
                Ending::Crashed("triple fault".into()),
                12,
                "guest crashed: triple fault",
            ),
            (Ending::Forced(2), 130, "ended at once on request (signal 2)"),
            (Ending::Forced(15), 143, "ended at once on request (signal 15)"),
        ];
        for (ending, code, text) in cases {
            assert_eq!((ending.exit_code(), ending.to_string().as_str()), (code, text));
        }
    }

    #[test]
    fn every_code_is_listed_once_in_ascending_order() {
        let codes: Vec<_> = EXIT_CODES.iter().map(|(class, _)| *class as u8).collect();
        assert_eq!(codes, [0, 2, 10, 11, 12, 20, 21, 22, 30, 40, 70]);
        assert!(exit_code_table().contains("   22  the platform or its firmware refused the launch\n"));
    }
}
