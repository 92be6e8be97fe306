//! What the TDX module and the kernel answer, in words.

use std::fmt;
use std::io;

use crate::commands::Command;

/// Completion status of a SEAMCALL, as KVM passes it on (Intel TDX Module 1.5 ABI specification, "Function
/// Completion Status").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeamStatus(pub u64);

impl fmt::Display for SeamStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SEAMCALL status {:#018x}", self.0)
    }
}

/// A command that the kernel or the module refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The command.
    pub command: Command,
    errno: i32,
    /// What the module said, where the kernel passes it on; commands to vCPUs never do.
    pub status: Option<SeamStatus>,
}

impl Refusal {
    /// From what the ioctl left: `hw_error` is zero where the module was not asked or its answer not passed on.
    pub fn new(command: Command, errno: i32, hw_error: u64) -> Self {
        Self {
            command,
            errno,
            status: (hw_error != 0).then_some(SeamStatus(hw_error)),
        }
    }

    /// The kernel's answer.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errno = io::Error::from_raw_os_error(self.errno);
        write!(f, "{}: {errno}", self.command)?;
        match self.status {
            Some(status) => write!(f, "; {status}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}
