//! Reading a report or a quote, from a file or standard input, as bytes or as text that spells them.

use std::io::{self, Read};
use std::path::Path;

use base64ct::{Base64, Encoding};

use crate::hex::unhex;
use crate::spec::file::{FileError, InputFile};

/// More than a report or a quote in any form, or a table of certificates, can have.
pub(crate) const MOST_BYTES: usize = 256 << 10;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// A named one.
    #[error(transparent)]
    File(#[from] FileError),
    /// Standard input.
    #[error("reading the {role} from standard input")]
    Stdin {
        /// What it should be.
        role: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Reads the `role` at `path`, `-` for standard input. `raw` knows the bytes themselves from a text.
pub(crate) fn read(
    role: &'static str,
    path: &Path,
    raw: impl FnOnce(&[u8]) -> bool,
) -> Result<Vec<u8>, Unread> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = io::stdin().take(MOST_BYTES as u64).read_to_end(&mut bytes);
        read.map_err(|source| Unread::Stdin { role, source })?;
        bytes
    } else {
        file(role, path, MOST_BYTES)?
    };
    Ok(plain(bytes, raw))
}

/// The first `most` bytes of a file.
pub(crate) fn file(role: &'static str, path: &Path, most: usize) -> Result<Vec<u8>, FileError> {
    InputFile::open(role, path)?.read_start(role, most)
}

/// The bytes that a text spells, if it is one.
fn plain(bytes: Vec<u8>, raw: impl FnOnce(&[u8]) -> bool) -> Vec<u8> {
    if raw(&bytes) {
        return bytes;
    }
    let Ok(text) = std::str::from_utf8(&bytes) else {
        return bytes;
    };
    let text: String = text.split_whitespace().collect();
    unhex(&text)
        .or_else(|| Base64::decode_vec(&text).ok())
        .unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_known_in_three_forms() {
        let raw: Vec<u8> = (0..=250).cycle().take(1184).collect();
        let hex: String = raw.iter().map(|byte| format!("{byte:02X}")).collect();
        let (first, second) = hex.split_at(1000);
        let lines = format!("{first}\n  {second}\r\n");
        let base64 = Base64::encode_string(&raw);
        for form in [
            raw.clone(),
            lines.into_bytes(),
            format!("{base64}\n").into_bytes(),
        ] {
            assert_eq!(plain(form, |bytes| bytes.len() == 1184), raw);
        }
        for other in [&b""[..], b"text!", &[0xff; 40]] {
            assert_eq!(plain(other.to_vec(), |_| false), other);
        }
        assert_eq!(plain(b"00".to_vec(), |_| true), b"00");
    }
}
