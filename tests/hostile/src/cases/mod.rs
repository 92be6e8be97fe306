//! The cases of the list, each with what it does and to whom. Numbers are those of docs/hostile-cases.md.

mod device;
mod lifecycle;
mod machine;
mod private;
mod ring;

use crate::stage::{Stage, Target, Verdict};

/// One case.
#[derive(Debug)]
pub(crate) struct Case {
    /// Its number.
    pub(crate) id: &'static str,
    /// What the guest does.
    pub(crate) name: &'static str,
    /// Which devices it does that to.
    pub(crate) on: &'static [Target],
    /// Does it.
    pub(crate) play: fn(&Stage) -> Verdict,
}

/// All of them, by group.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        ring::CASES,
        lifecycle::CASES,
        device::CASES,
        machine::CASES,
        private::CASES,
    ]
    .into_iter()
    .flatten()
}
