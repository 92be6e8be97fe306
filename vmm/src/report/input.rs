//! Reports and certificates, from files or standard input.

use std::path::Path;

use snp::certs::{CertKind, CertTable};
use snp::report::{Chain, REPORT_BYTES, Report, Roots, Signer};

use super::{Certificates, Unreadable};
use crate::evidence::{self, MOST_BYTES};

/// Reads the report at `path`, `-` for standard input.
pub(super) fn report(path: &Path) -> Result<Report, Unreadable> {
    let bytes = evidence::read("report", path, |bytes| bytes.len() == REPORT_BYTES)?;
    Ok(Report::parse(&bytes)?)
}

fn read(role: &'static str, path: &Path) -> Result<Vec<u8>, Unreadable> {
    Ok(evidence::file(role, path, MOST_BYTES)?)
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
    let chain = Chain::find(&signer, ask.as_deref(), &roots)?;
    Ok(match &given.crl {
        Some(path) => chain.with_revoked(&read("crl", path)?)?,
        None => chain,
    })
}
