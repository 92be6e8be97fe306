//! What came of the checks of a piece of evidence, a report or a quote: a line for each.

use std::fmt;
use std::io;

use serde::Serialize;

use crate::ending::ExitClass;
use crate::measure::say;

/// One check.
#[derive(Serialize, Debug)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) status: Status,
    /// Reasons of a failure, else what the evidence states.
    pub(crate) found: String,
}

#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Ok,
    Failed,
    /// Nothing is expected of it.
    NotCompared,
    /// What it takes was not given.
    NotVerified,
}

impl Check {
    /// A check of what the evidence states, which fails for `reasons` if there are any.
    pub(crate) fn of(name: &'static str, reasons: &[String], compared: bool, stated: String) -> Self {
        let (status, found) = match (reasons.is_empty(), compared) {
            (false, _) => (Status::Failed, reasons.join("; ")),
            (true, true) => (Status::Ok, stated),
            (true, false) => (Status::NotCompared, stated),
        };
        Self { name, status, found }
    }
}

/// Prints an answer, as text or JSON; gives how cvmm ends by whether the evidence verifies.
///
/// # Errors
/// Standard output's.
pub(crate) fn conclude(
    answer: &(impl Serialize + fmt::Display),
    json: bool,
    verified: bool,
) -> io::Result<ExitClass> {
    let text = if json {
        serde_json::to_string_pretty(answer).unwrap_or_default()
    } else {
        answer.to_string()
    };
    say(&text)?;
    Ok(if verified {
        ExitClass::Success
    } else {
        ExitClass::Mismatch
    })
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, note) = match self.status {
            Status::Ok => ("ok", ""),
            Status::Failed => ("FAILED", ""),
            Status::NotCompared => ("-", " (not compared)"),
            Status::NotVerified => ("-", ""),
        };
        let width = f.width().unwrap_or(12);
        write!(f, "{mark:<6} {:<width$} {}{note}", self.name, self.found)
    }
}
