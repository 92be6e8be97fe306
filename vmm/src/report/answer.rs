//! What came of each check, as text and JSON.

use std::fmt;

use serde::Serialize;
use snp::report::{Expected, Failure, Report, Signer};

use crate::checks::{Check, Status};
use crate::hex::Hex;

/// Version of the JSON format; a field that changes its meaning makes it 2.
const SCHEMA: u32 = 1;
/// The check of the launch digest.
const MEASUREMENT: &str = "measurement";

/// All checks of one report.
#[derive(Serialize, Debug)]
pub(super) struct Answer {
    schema: u32,
    cvmm: &'static str,
    verified: bool,
    checks: Vec<Check>,
    report: Fields,
}

/// What the report states; true only if it verifies.
#[derive(Serialize, Debug)]
struct Fields {
    version: u32,
    measurement: String,
    policy: String,
    host_data: String,
    report_data: String,
    guest_svn: u32,
    family_id: String,
    image_id: String,
    id_key_digest: String,
    author_key_digest: String,
    vmpl: u32,
    chip_id: String,
}

/// The check that a failure belongs to.
fn check_of(failure: &Failure) -> &'static str {
    match failure {
        Failure::CertificateSignature(_)
        | Failure::CertificateNotYetValid(_)
        | Failure::CertificateExpired(_)
        | Failure::CertificateNoAuthority(_) => "certificates",
        Failure::CertificateRevoked(_) | Failure::RevocationList(_) => "revocation",
        Failure::Algorithm(_) | Failure::SignatureMalformed | Failure::Signature | Failure::SignerKey => {
            "signature"
        }
        Failure::SignerNobody
        | Failure::SignerUnknown(_)
        | Failure::SignerMismatch { .. }
        | Failure::CertificateWithoutChip
        | Failure::ChipMasked
        | Failure::OtherChip => "chip",
        Failure::CertificateWithoutTcb
        | Failure::CertificateTcb { .. }
        | Failure::TcbTooOld { .. }
        | Failure::LaunchTcbTooOld { .. } => "tcb",
        Failure::Debug
        | Failure::MigrationAgent
        | Failure::PolicyUnknown(_)
        | Failure::PolicyWeaker(_)
        | Failure::PolicyAbi { .. } => "policy",
        Failure::Vmpl(_) => "vmpl",
        Failure::Measurement(_) => MEASUREMENT,
        Failure::IdKey => "id-key",
        Failure::AuthorKey => "author-key",
        Failure::GuestSvn { .. } => "guest-svn",
        Failure::HostData => "host-data",
        Failure::ReportData => "report-data",
    }
}

/// Each check: its name, whether anything is expected, and what the report states.
fn checks(report: &Report, expected: &Expected, listed: bool) -> [(&'static str, bool, String); 13] {
    let hex = |bytes: &[u8]| Hex(bytes).to_string();
    let signer = match report.signer() {
        Signer::Vcek => format!("the VCEK of chip {}", Hex(&report.chip_id())),
        Signer::Vlek => "a VLEK".to_owned(),
        Signer::Nobody | Signer::Unknown(_) => "no known key".to_owned(),
    };
    [
        (
            "certificates",
            true,
            "signed up to the root, all valid".to_owned(),
        ),
        (
            "revocation",
            listed,
            if listed {
                "none of them is on the root's list".to_owned()
            } else {
                "whether one was revoked takes --crl".to_owned()
            },
        ),
        ("signature", true, "ECDSA P-384 with SHA-384".to_owned()),
        ("chip", true, signer),
        (
            "tcb",
            true,
            report.reported_tcb().parts(report.tcb_layout()).to_string(),
        ),
        ("policy", true, report.policy().to_string()),
        ("vmpl", true, report.vmpl().to_string()),
        (
            MEASUREMENT,
            !expected.measurements.is_empty(),
            report.measurement().to_string(),
        ),
        (
            "host-data",
            expected.host_data.is_some(),
            hex(&report.host_data()),
        ),
        (
            "report-data",
            expected.report_data.is_some(),
            hex(&report.report_data()),
        ),
        (
            "id-key",
            expected.id_key_digest.is_some(),
            hex(&report.id_key_digest()),
        ),
        (
            "author-key",
            expected.author_key_digest.is_some(),
            hex(&report.author_key_digest()),
        ),
        (
            "guest-svn",
            expected.guest_svn != 0,
            report.guest_svn().to_string(),
        ),
    ]
}

impl Answer {
    /// `listed` says whether there was a list of revoked certificates.
    pub(super) fn new(report: &Report, expected: &Expected, listed: bool, failures: &[Failure]) -> Self {
        let check = |(name, compared, stated)| {
            let reasons: Vec<String> = failures
                .iter()
                .filter(|failure| check_of(failure) == name)
                .map(ToString::to_string)
                .collect();
            Check::of(name, &reasons, compared, stated)
        };
        let hex = |bytes: &[u8]| Hex(bytes).to_string();
        Self {
            schema: SCHEMA,
            cvmm: env!("CARGO_PKG_VERSION"),
            verified: failures.is_empty(),
            checks: checks(report, expected, listed).map(check).into(),
            report: Fields {
                version: report.version(),
                measurement: report.measurement().to_string(),
                policy: format!("{:#x}", report.policy().bits()),
                host_data: hex(&report.host_data()),
                report_data: hex(&report.report_data()),
                guest_svn: report.guest_svn(),
                family_id: hex(&report.family_id()),
                image_id: hex(&report.image_id()),
                id_key_digest: hex(&report.id_key_digest()),
                author_key_digest: hex(&report.author_key_digest()),
                vmpl: report.vmpl(),
                chip_id: hex(&report.chip_id()),
            },
        }
    }

    /// True if no check failed.
    pub(super) fn verified(&self) -> bool {
        self.verified
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        let anonymous = |check: &Check| check.name == MEASUREMENT && check.status == Status::NotCompared;
        f.write_str(match self.verified {
            false => "THE REPORT DOES NOT VERIFY",
            true if self.checks.iter().any(anonymous) => {
                "the report verifies, but it may be of any guest; --measurement says which one is meant"
            }
            true => "the report verifies",
        })
    }
}
