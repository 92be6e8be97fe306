//! From a list to the program that the kernel runs at each system call.

use std::collections::BTreeMap;
use std::io;

use arch::kvm::vcpu::kick_signal;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::lists::{Check, List};

/// What lists cannot know before they are used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own {
    process: u32,
    kick: u32,
}

impl Own {
    pub(super) fn now() -> Self {
        Self {
            process: std::process::id(),
            kick: kick_signal().cast_unsigned(),
        }
    }
}

/// The program for `list`: anything else kills the process.
pub(super) fn compile(list: &List, own: Own) -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // A call without rules is allowed with any arguments, so those that are go last.
    let (free, checked): (Vec<_>, Vec<_>) = list
        .rules
        .iter()
        .copied()
        .partition(|(_, checks)| checks.is_empty());
    for (call, checks) in checked {
        let conditions = checks.iter().map(|check| condition(*check, own));
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        calls.entry(call).or_default().push(rule);
    }
    for request in &list.requests {
        let rule = SeccompRule::new(vec![condition(Check::Is(1, *request), own)?])?;
        calls.entry(libc::SYS_ioctl).or_default().push(rule);
    }
    for (call, _) in free {
        calls.insert(call, vec![]);
    }
    program(calls, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// The program that makes the C library fall back from `clone3` to `clone`, whose flags a filter can see.
pub(super) fn without_clone3() -> Result<BpfProgram, BackendError> {
    let calls = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    let enosys = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    program(calls, SeccompAction::Allow, enosys)
}

fn program(
    calls: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(calls, otherwise, matching, TargetArch::x86_64)?.try_into()
}

fn condition(check: Check, own: Own) -> Result<SeccompCondition, BackendError> {
    let (argument, operator, value) = match check {
        Check::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Check::Bits(argument, mask, value) => (argument, SeccompCmpOp::MaskedEq(mask.into()), value),
        Check::Own(argument) => (argument, SeccompCmpOp::Eq, own.process),
        Check::Kick(argument) => (argument, SeccompCmpOp::Eq, own.kick),
    };
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
}

/// Makes the calling thread, and those it starts, subject to `program` for good.
pub(super) fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(|e| match e {
        seccompiler::Error::Prctl(e) | seccompiler::Error::Seccomp(e) => e,
        e @ (seccompiler::Error::Backend(_)
        | seccompiler::Error::EmptyFilter
        | seccompiler::Error::ThreadSync(_)) => io::Error::other(e),
    })
}
