//! Descriptors that the caller left open for cvmm.

use std::fs;
use std::os::fd::OwnedFd;

/// A descriptor that is not what the caller said.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// It is not open.
    #[error(
        "{flag} {number}: not an open descriptor; let the process that starts cvmm pass it on, as in `cvmm … {number}<>FILE`"
    )]
    NotOpen {
        /// The flag that names it.
        flag: &'static str,
        /// Its number.
        number: u32,
    },
    /// It was opened without write access.
    #[error("{flag} {number}: not open for writing; pass a descriptor that is")]
    NotWritable {
        /// The flag that names it.
        flag: &'static str,
        /// Its number.
        number: u32,
    },
    /// It is something else than a tap.
    #[error(
        "{flag} {number}: not a tap; open /dev/net/tun, attach it with TUNSETIFF (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR) and pass that"
    )]
    NotATap {
        /// The flag that names it.
        flag: &'static str,
        /// Its number.
        number: u32,
    },
    /// The kernel refused to duplicate it.
    #[error("{flag} {number}: {cause}; raise the limit of open files (`ulimit -n`)")]
    Unusable {
        /// The flag that names it.
        flag: &'static str,
        /// Its number.
        number: u32,
        /// The kernel's answer.
        cause: std::io::Error,
    },
}

/// A descriptor of the caller's, duplicated.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) fd: OwnedFd,
    /// `/proc/self/fdinfo/N`: flags, and what the driver tells.
    info: String,
    flag: &'static str,
    number: u32,
}

impl Inherited {
    /// Takes `number`. A close-on-exec descriptor cannot have come from the caller: it is one of cvmm's own that
    /// got a number which the caller left free.
    pub(crate) fn take(flag: &'static str, number: u32) -> Result<Self, FdError> {
        let not_open = || FdError::NotOpen { flag, number };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).map_err(|_| not_open())?;
        if open_flags(&info) & libc::O_CLOEXEC.unsigned_abs() != 0 {
            return Err(not_open());
        }
        let raw = i32::try_from(number).map_err(|_| not_open())?;
        let fd = arch::host::duplicate(raw).map_err(|cause| FdError::Unusable { flag, number, cause })?;
        Ok(Self {
            fd,
            info,
            flag,
            number,
        })
    }

    pub(crate) fn writable(self) -> Result<Self, FdError> {
        let (flag, number) = (self.flag, self.number);
        match open_flags(&self.info) & libc::O_ACCMODE.unsigned_abs() {
            mode if mode == libc::O_RDONLY.unsigned_abs() => Err(FdError::NotWritable { flag, number }),
            _ => Ok(self),
        }
    }

    /// Checks that it is attached to a tap: the tun driver then adds the line `iff: NAME`.
    pub(super) fn tap(self) -> Result<(OwnedFd, String), FdError> {
        let (flag, number) = (self.flag, self.number);
        match self.info.lines().find_map(|line| line.strip_prefix("iff:")) {
            Some(name) if !name.trim().is_empty() => Ok((self.fd, name.trim().to_owned())),
            _ => Err(FdError::NotATap { flag, number }),
        }
    }
}

/// The octal `flags:` line.
fn open_flags(info: &str) -> u32 {
    let line = info.lines().find_map(|line| line.strip_prefix("flags:"));
    line.and_then(|digits| u32::from_str_radix(digits.trim(), 8).ok())
        .unwrap_or(0)
}
