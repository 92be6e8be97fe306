//! Reports and certificates, from files or standard input.

use std::io::{self, Read};
use std::path::Path;

use base64ct::{Base64, Encoding};
use snp::certs::{CertKind, CertTable};
use snp::report::{Chain, REPORT_BYTES, Report, Roots, Signer};

use super::{Certificates, Unreadable};
use crate::hex::unhex;
use crate::spec::file::InputFile;

/// More than a report in any form, or a table of certificates, can have.
const MOST_BYTES: usize = 256 << 10;

/// Reads the report at `path`, `-` for standard input.
pub(super) fn report(path: &Path) -> Result<Report, Unreadable> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        let read = io::stdin().take(MOST_BYTES as u64).read_to_end(&mut bytes);
        read.map_err(|source| Unreadable::Stream {
            doing: "reading the report from standard input",
            source,
        })?;
        bytes
    } else {
        read("report", path)?
    };
    Ok(Report::parse(&plain(bytes))?)
}

/// The bytes that a text spells, if it is one.
fn plain(bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() == REPORT_BYTES {
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

fn read(role: &'static str, path: &Path) -> Result<Vec<u8>, Unreadable> {
    Ok(InputFile::open(role, path)?.read_start(role, MOST_BYTES)?)
}

/// The certificates behind the key that signed `report`.
pub(super) fn chain(given: &Certificates, report: &Report) -> Result<Chain, Unreadable> {
    let table = match &given.certs {
        Some(path) => CertTable::parse(&read("certs", path)?)?,
        None => CertTable::default(),
    };
    let signer = match &given.vcek {
        Some(path) => read("vcek", path)?,
        None => {
            let wanted = match report.signer() {
                Signer::Vlek => [CertKind::Vlek, CertKind::Vcek],
                Signer::Vcek | Signer::Nobody | Signer::Unknown(_) => [CertKind::Vcek, CertKind::Vlek],
            };
            let found = wanted.into_iter().find_map(|kind| table.get(kind));
            found.ok_or(Unreadable::NoSigner)?.to_vec()
        }
    };
    let ask = match &given.ask {
        Some(path) => Some(read("ask", path)?),
        None => table.get(CertKind::Ask).map(<[u8]>::to_vec),
    };
    let roots = match &given.ark {
        Some(path) => Roots::only(&read("ark", path)?)?,
        None => Roots::amd(),
    };
    Ok(Chain::find(&signer, ask.as_deref(), &roots)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_known_in_three_forms() {
        let raw: Vec<u8> = (0..=250).cycle().take(REPORT_BYTES).collect();
        let hex: String = raw.iter().map(|byte| format!("{byte:02X}")).collect();
        let (first, second) = hex.split_at(1000);
        let lines = format!("{first}\n  {second}\r\n");
        let base64 = Base64::encode_string(&raw);
        for form in [
            raw.clone(),
            lines.into_bytes(),
            format!("{base64}\n").into_bytes(),
        ] {
            assert_eq!(plain(form), raw);
        }
        for other in [&b""[..], b"text!", &[0xff; 40]] {
            assert_eq!(plain(other.to_vec()), other);
        }
    }
}
