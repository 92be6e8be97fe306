//! Attestation reports by configfs-tsm, and their way out of a guest.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{PoisonError, RwLock};

use crate::endpoint;

/// Bytes of a nonce (REPORTDATA).
const NONCE_BYTES: usize = 64;
const MAX_REPORT: usize = 64 << 10;
const TSM: &str = "/sys/kernel/config/tsm/report";
const REGISTERS: &str = "/sys/devices/virtual/misc/tdx_guest/measurements";
/// Held while an `inblob` is open. configfs takes what was written when the last who has the file closes it, and a program
/// that another thread starts has it too until it executes: the report would be asked for without a nonce.
static INBLOB: RwLock<()> = RwLock::new(());

/// Fetches a report over the nonce; says which provider gave it.
pub(crate) fn fetch(nonce: &[u8]) -> io::Result<(String, Vec<u8>)> {
    fetch_as("cvmm", nonce)
}

/// [`fetch`] under another name than other threads use.
pub(crate) fn fetch_as(name: &str, nonce: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let entry = Path::new(TSM).join(name);
    fs::create_dir_all(&entry)?;
    let mut padded = nonce.to_vec();
    padded.resize(NONCE_BYTES, 0);
    {
        let _open = INBLOB.read().unwrap_or_else(PoisonError::into_inner);
        fs::write(entry.join("inblob"), padded)?;
    }
    let report = fs::read(entry.join("outblob"))?;
    let provider = fs::read_to_string(entry.join("provider"))?.trim().to_owned();
    fs::remove_dir(&entry)?;
    Ok((provider, report))
}

/// Starts a program while no report's nonce is being written.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _closed = INBLOB.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Names and values of a TD's measurement registers, by name.
pub(crate) fn registers() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(REGISTERS)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        found.push((name, fs::read(entry.path())?));
    }
    found.sort();
    Ok(found)
}

/// Extends one of a TD's run-time registers by a digest.
pub(crate) fn extend(name: &str, digest: &[u8]) -> io::Result<()> {
    fs::write(Path::new(REGISTERS).join(name), digest)
}

/// The guest's half of [`collect`]: takes a nonce from the host, answers with the report's length and bytes.
pub(crate) fn hand_out(endpoint: &str) -> io::Result<(String, Vec<u8>)> {
    let mut stream = endpoint::connect(endpoint)?;
    let mut nonce = [0_u8; NONCE_BYTES];
    stream.read_exact(&mut nonce)?;
    let (provider, report) = fetch(&nonce)?;
    stream.write_all(
        &u32::try_from(report.len())
            .map_err(io::Error::other)?
            .to_le_bytes(),
    )?;
    stream.write_all(&report)?;
    Ok((provider, report))
}

/// The host's half: waits for a guest at a socket, gives it the nonce and stores the report in a file.
pub(crate) fn collect(path: &str, nonce: &str, file: &str) -> io::Result<()> {
    let mut nonce = parse_hex(nonce)?;
    nonce.resize(NONCE_BYTES, 0);
    let mut stream = endpoint::accept(&format!("unix:{path}"))?;
    stream.write_all(&nonce)?;
    let mut length = [0_u8; 4];
    stream.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_REPORT {
        return Err(io::Error::other(format!("a report of {length} bytes")));
    }
    let mut report = vec![0; length];
    stream.read_exact(&mut report)?;
    fs::write(file, report)
}

/// Bytes from hexadecimal digits.
pub(crate) fn parse_hex(text: &str) -> io::Result<Vec<u8>> {
    let bytes = text.as_bytes().chunks(2).map(|pair| {
        let digits = std::str::from_utf8(pair).map_err(io::Error::other)?;
        u8::from_str_radix(digits, 16)
            .map_err(|_| io::Error::other(format!("`{text}` is no hexadecimal number")))
    });
    bytes.collect()
}

/// Base64 (RFC 4648), for a report on a console.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let mut word = [0_u8; 4];
        for (to, from) in word.iter_mut().skip(1).zip(chunk) {
            *to = *from;
        }
        let word = u32::from_be_bytes(word);
        for digit in 0..4_usize {
            let index = (word >> (18 - 6 * digit)) & 63;
            let found = usize::try_from(index).ok().and_then(|index| DIGITS.get(index));
            out.push(if digit > chunk.len() {
                '='
            } else {
                char::from(*found.unwrap_or(&b'='))
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{base64, parse_hex};

    #[test]
    fn base64_matches_the_examples_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn hexadecimal_is_read_or_refused() {
        assert_eq!(parse_hex("00ff10").expect("digits"), [0, 255, 16]);
        assert!(parse_hex("0x").is_err());
    }
}
