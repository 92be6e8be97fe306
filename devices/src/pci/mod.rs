//! PCI as machine `v1` has it: bus 0 behind ECAM, a host bridge, one single-function device per slot, one fixed
//! memory BAR each, MSI-X and no interrupt pins.

pub mod config;
pub mod msix;
pub mod root;

/// Where the configuration space of bus 0 lies in guest-physical memory.
pub const ECAM_START: u64 = 0xe000_0000;
/// Length of the ECAM: 32 devices of 8 functions of 4 KiB.
pub const ECAM_BYTES: u64 = 1 << 20;
/// Start of the window that BARs are taken from.
pub const WINDOW_START: u64 = 0xc000_0000;
/// Length of that window.
pub const WINDOW_BYTES: u64 = 0x2000_0000;

/// A guest's little-endian value of at most 8 bytes.
pub(crate) fn from_le(data: &[u8]) -> u64 {
    data.iter()
        .rev()
        .take(8)
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Fills `data` with the low bytes of `value`, little-endian.
pub(crate) fn to_le(value: u64, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}
