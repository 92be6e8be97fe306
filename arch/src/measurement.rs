//! The 48-byte digests that SEV-SNP and TDX keep of a launch: SHA-384 on both.

use std::fmt;
use std::str::FromStr;

use crate::addr::Gpa;
use crate::platform::LaunchPage;

/// A digest as hardware reports it: SNP's launch digest, TDX's MRTD or an RTMR.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Measurement(pub [u8; 48]);

impl Measurement {
    /// The register before anything is measured.
    pub const ZERO: Self = Self([0; 48]);
}

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Measurement({self})")
    }
}

/// Text that is not 96 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a launch digest is 96 hexadecimal digits")]
pub struct NotADigest;

impl FromStr for Measurement {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let digit = |c: char| c.to_digit(16).and_then(|d| u8::try_from(d).ok());
        let digits: Option<Vec<u8>> = text.trim().chars().map(digit).collect();
        let (pairs, []) = digits.as_deref().ok_or(NotADigest)?.as_chunks::<2>() else {
            return Err(NotADigest);
        };
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        bytes.try_into().map(Self).map_err(|_| NotADigest)
    }
}

/// A plan that cannot be folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeasureError {
    /// A measured range whose contents do not fill it.
    #[error("the measured range at {:#x} has {want} bytes but {got} bytes of contents", gpa.0)]
    WrongLength {
        /// Start of the range.
        gpa: Gpa,
        /// Bytes in the range.
        want: u64,
        /// Bytes given.
        got: u64,
    },
    /// A page that only another platform has.
    #[error("the {name} page at {:#x} does not exist on this platform", gpa.0)]
    Foreign {
        /// What the page holds.
        name: &'static str,
        /// Its address.
        gpa: Gpa,
    },
}

impl MeasureError {
    /// `page` has contents of another length than its range.
    pub fn wrong_length(page: &LaunchPage) -> Self {
        Self::WrongLength {
            gpa: page.range.start(),
            want: page.range.bytes(),
            got: page.bytes.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_they_are_printed() {
        let mut digest = Measurement::ZERO;
        digest.0[3] = 0xa7;
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(format!("  {digest}\n").to_uppercase().parse(), Ok(digest));
        for bad in [
            "",
            "12",
            "zz",
            &"0".repeat(95),
            &"0".repeat(97),
            &"0".repeat(98),
            &"é".repeat(48),
        ] {
            assert_eq!(bad.parse::<Measurement>(), Err(NotADigest), "{bad}");
        }
    }
}
