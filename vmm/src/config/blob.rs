//! Bytes written as hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use super::text::{BadValue, bad, serde_as_text};

/// `N` bytes, written as twice as many hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob<const N: usize>(pub [u8; N]);

/// HOST_DATA of an SNP guest.
pub type Blob32 = Blob<32>;
/// A SHA-384 digest, or what takes its place.
pub type Blob48 = Blob<48>;

impl<const N: usize> FromStr for Blob<N> {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let mut blob = [0; N];
        let plain = text.len() == N.saturating_mul(2) && text.bytes().all(|b| b.is_ascii_hexdigit());
        for (at, byte) in blob.iter_mut().enumerate() {
            let from = at.saturating_mul(2);
            let digits = text.get(from..from.saturating_add(2)).unwrap_or_default();
            match u8::from_str_radix(digits, 16) {
                Ok(value) if plain => *byte = value,
                _ => {
                    let digits = N.saturating_mul(2);
                    return bad(format!("not {digits} hexadecimal digits ({N} bytes)"));
                }
            }
        }
        Ok(Self(blob))
    }
}

impl<const N: usize> fmt::Display for Blob<N> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(to, "{byte:02x}"))
    }
}
serde_as_text!(Blob32);
serde_as_text!(Blob48);
