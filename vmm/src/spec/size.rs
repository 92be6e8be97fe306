//! Memory and processors.

use shim::layout::UNIT;

use crate::config::Size;

/// A size or count that the machine cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Less memory than any kernel boots in.
    #[error("memory: {0} bytes are less than 64M; give for example --memory 512M", given.0)]
    LittleMemory {
        /// Memory asked for.
        given: Size,
    },
    /// More memory than the machine's layout has room for.
    #[error("memory: {given} is more than the 440G of a machine; give --memory 440G or less")]
    MuchMemory {
        /// Memory asked for.
        given: Size,
    },
    /// Not a multiple of the unit in which memory is accepted.
    #[error("memory: {given} is not a multiple of 2M; give --memory {below} or {above}")]
    OddMemory {
        /// Memory asked for.
        given: Size,
        /// The next smaller multiple.
        below: Size,
        /// The next larger multiple.
        above: Size,
    },
    /// More memory than the host has.
    #[error("memory: {given} is more than this host has; give --memory {host} or less")]
    BeyondHost {
        /// Memory asked for.
        given: Size,
        /// The host's memory, rounded down.
        host: Size,
    },
    /// No processor, or more than the machine or KVM can have.
    #[error("cpus: {given} is not between 1 and {most}; give --cpus N in that range")]
    Cpus {
        /// Processors asked for.
        given: u32,
        /// Most that are possible here.
        most: u32,
    },
}

const LEAST_MEMORY: u64 = 64 << 20;
const MOST_MEMORY: u64 = 440 << 30;
/// Most processors of a machine, whatever KVM can do.
pub(crate) const MOST_CPUS: u32 = 256;

pub(super) fn check_memory(given: Size, host_bytes: u64) -> Result<u64, SizeError> {
    let host = Size(host_bytes & !UNIT.wrapping_sub(1));
    let below = Size(given.0 & !UNIT.wrapping_sub(1));
    if given.0 < LEAST_MEMORY {
        Err(SizeError::LittleMemory { given })
    } else if given.0 > MOST_MEMORY {
        Err(SizeError::MuchMemory { given })
    } else if below != given {
        let above = Size(below.0.saturating_add(UNIT));
        Err(SizeError::OddMemory { given, below, above })
    } else if given > host {
        Err(SizeError::BeyondHost { given, host })
    } else {
        Ok(given.0)
    }
}

pub(crate) fn check_cpus(given: u32, kvm_most: u32) -> Result<u32, SizeError> {
    let most = MOST_CPUS.min(kvm_most);
    if (1..=most).contains(&given) {
        Ok(given)
    } else {
        Err(SizeError::Cpus { given, most })
    }
}
