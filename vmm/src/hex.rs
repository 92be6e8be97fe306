//! Bytes as hexadecimal digits.

use std::fmt;

/// Shows bytes as lower-case digits.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The bytes that `text` spells, in either case; `None` if it is anything but pairs of digits.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let digits: Vec<u8> = text.bytes().map(digit).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    Some(
        pairs
            .map(|pair| pair.iter().fold(0, |sum, d| sum << 4 | d))
            .collect(),
    )
}

/// `N` bytes, the rest zeros if fewer are given; for clap.
pub(crate) fn padded<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let bytes = unhex(text).filter(|bytes| bytes.len() <= N);
    let bytes = bytes.ok_or_else(|| format!("not hexadecimal digits of at most {N} bytes"))?;
    let mut out = [0; N];
    for (slot, byte) in out.iter_mut().zip(bytes) {
        *slot = byte;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_come_in_pairs() {
        assert_eq!(unhex("00fFa1"), Some(vec![0, 0xff, 0xa1]));
        for bad in ["0", "0x00", "g0", "é", "+1", " 0"] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
        assert_eq!(padded::<4>("0102"), Ok([1, 2, 0, 0]));
        assert!(padded::<4>("0102030405").is_err() && padded::<4>("01x").is_err());
        assert_eq!(Hex(&[0, 0xab]).to_string(), "00ab");
    }
}
