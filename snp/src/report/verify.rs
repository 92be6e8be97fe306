//! What an owner checks in a report, and each way to fail in words.

use std::fmt;
use std::time::SystemTime;

use crate::measure::Measurement;
use crate::policy::{Policy, PolicyBit};
use crate::report::chain::{Chain, Fault, Link};
use crate::report::{ALGORITHM, ListFault, Report, Signer, TcbLayout, TcbParts};

/// Lowest security patch levels; 0 takes any.
pub type TcbMinimum = TcbParts;

/// What the report has to state. Nothing is expected of a field that is `None` or empty.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// One of these launch digests.
    pub measurements: Vec<Measurement>,
    /// A policy that gives the host no more than this one.
    pub policy: Option<Policy>,
    /// Patch levels of the reported TCB, and of the one that the guest was launched on.
    pub tcb: TcbMinimum,
    /// SHA-384 of the key that signed the ID block.
    pub id_key_digest: Option<[u8; 48]>,
    /// SHA-384 of the key that vouches for the ID key.
    pub author_key_digest: Option<[u8; 48]>,
    /// Security version in the ID block, at least.
    pub guest_svn: u32,
    /// HOST_DATA.
    pub host_data: Option<[u8; 32]>,
    /// REPORT_DATA: the nonce that was sent to the guest.
    pub report_data: Option<[u8; 64]>,
    /// Least privileged level that may ask.
    pub vmpl: u32,
    /// Accept guests that the host may debug.
    pub debug_allowed: bool,
}

/// A check that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Display says it")]
pub enum Failure {
    Algorithm(u32),
    SignatureMalformed,
    Signature,
    SignerNobody,
    SignerUnknown(u8),
    SignerMismatch { vlek_certificate: bool },
    SignerKey,
    CertificateSignature(Link),
    CertificateNotYetValid(Link),
    CertificateExpired(Link),
    CertificateNoAuthority(Link),
    CertificateRevoked(Link),
    RevocationList(ListFault),
    CertificateWithoutTcb,
    CertificateTcb { certificate: TcbParts, report: TcbParts },
    CertificateWithoutChip,
    ChipMasked,
    OtherChip,
    TcbTooOld { report: TcbParts, minimum: TcbParts },
    LaunchTcbTooOld { launch: TcbParts, minimum: TcbParts },
    Debug,
    MigrationAgent,
    PolicyUnknown(u64),
    PolicyWeaker(PolicyBit),
    PolicyAbi { wanted: (u8, u8), stated: (u8, u8) },
    Vmpl(u32),
    Measurement(Measurement),
    IdKey,
    AuthorKey,
    GuestSvn { wanted: u32, stated: u32 },
    HostData,
    ReportData,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Signature(link) => Self::CertificateSignature(link),
            Fault::NotYetValid(link) => Self::CertificateNotYetValid(link),
            Fault::Expired(link) => Self::CertificateExpired(link),
            Fault::NoAuthority(link) => Self::CertificateNoAuthority(link),
            Fault::Revoked(link) => Self::CertificateRevoked(link),
            Fault::List(fault) => Self::RevocationList(fault),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm(n) => write!(f, "signature algorithm {n} is not ECDSA P-384 with SHA-384"),
            Self::SignatureMalformed => f.write_str("the signature is malformed"),
            Self::Signature => f.write_str("the report was not signed by this VCEK or VLEK, or was changed"),
            Self::SignerNobody => f.write_str("the host masks its key, so the report is not signed"),
            Self::SignerUnknown(n) => write!(f, "the report is signed by the unknown key {n}"),
            Self::SignerMismatch {
                vlek_certificate: true,
            } => f.write_str("the report is signed by the chip's key, but the certificate is a VLEK's"),
            Self::SignerMismatch {
                vlek_certificate: false,
            } => f.write_str("the report is signed by a loaded key, but the certificate is a VCEK's"),
            Self::SignerKey => f.write_str("the VCEK or VLEK certificate holds no P-384 key"),
            Self::CertificateSignature(link) => {
                write!(f, "the {link} certificate is not signed by its issuer")
            }
            Self::CertificateNotYetValid(link) => {
                write!(f, "the {link} certificate is not valid yet; is the clock right?")
            }
            Self::CertificateExpired(link) => write!(f, "the {link} certificate has expired"),
            Self::CertificateNoAuthority(link) => write!(f, "the {link} certificate may not issue others"),
            Self::CertificateRevoked(link) => write!(f, "the {link} certificate is revoked; trust no key below it"),
            Self::RevocationList(fault) => write!(f, "the revocation list {fault}"),
            Self::CertificateWithoutTcb => f.write_str("the VCEK or VLEK certificate does not state its TCB"),
            Self::CertificateTcb { certificate, report } => {
                write!(
                    f,
                    "the certificate is for TCB ({certificate}), the report for ({report})"
                )
            }
            Self::CertificateWithoutChip => f.write_str("the VCEK certificate does not state its chip"),
            Self::ChipMasked => f.write_str("the host masks the chip's id, so the VCEK cannot be matched"),
            Self::OtherChip => f.write_str("the VCEK certificate is another chip's"),
            Self::TcbTooOld { report, minimum } => {
                write!(f, "the TCB ({report}) is older than the minimum ({minimum})")
            }
            Self::LaunchTcbTooOld { launch, minimum } => write!(
                f,
                "the guest was launched on TCB ({launch}), older than the minimum ({minimum}), which a later update does not mend"
            ),
            Self::MigrationAgent => f.write_str(
                "the policy lets a migration agent of the host's choice take the guest's memory elsewhere (migration-agent)",
            ),
            Self::PolicyUnknown(bits) => {
                write!(f, "the policy has the bits {bits:#x}, which this cvmm does not know")
            }
            Self::Debug => f.write_str("the policy lets the host read and write the guest's memory (debug)"),
            Self::PolicyWeaker(bit) => write!(f, "the policy is weaker than expected in \"{}\"", bit.name()),
            Self::PolicyAbi { wanted, stated } => write!(
                f,
                "the policy accepts firmware ABI {}.{}, expected at least {}.{}",
                stated.0, stated.1, wanted.0, wanted.1
            ),
            Self::Vmpl(vmpl) => write!(f, "the report was requested at VMPL {vmpl}"),
            Self::Measurement(digest) => write!(f, "the launch digest {digest} is none of the expected ones"),
            Self::IdKey => f.write_str("the launch was not approved by the expected ID key"),
            Self::AuthorKey => f.write_str("the ID key was not approved by the expected author key"),
            Self::GuestSvn { wanted, stated } => {
                write!(
                    f,
                    "the guest's security version is {stated}, expected at least {wanted}"
                )
            }
            Self::HostData => f.write_str("HOST_DATA is not the expected one"),
            Self::ReportData => {
                f.write_str("REPORT_DATA is not the expected nonce: an old or another guest's report")
            }
        }
    }
}

/// Makes every check and returns those that failed; an empty list is a verified report.
pub fn check(report: &Report, chain: &Chain, expected: &Expected, now: SystemTime) -> Vec<Failure> {
    let mut failures: Vec<Failure> = chain.faults(now).into_iter().map(Failure::from).collect();
    failures.extend(signature(report, chain));
    failures.extend(signer(report, chain));
    failures.extend(tcb(report, chain, &expected.tcb));
    failures.extend(policy(report, expected));
    failures.extend(identity(report, expected));
    failures
}

fn signature(report: &Report, chain: &Chain) -> Option<Failure> {
    if report.algorithm() != ALGORITHM {
        return Some(Failure::Algorithm(report.algorithm()));
    }
    let Some(signature) = report.signature() else {
        return Some(Failure::SignatureMalformed);
    };
    let Some(key) = chain.key() else {
        return Some(Failure::SignerKey);
    };
    (!key.verifies(report.signed(), &signature)).then_some(Failure::Signature)
}

/// The certificate must be of the key, chip and version that the report states.
fn signer(report: &Report, chain: &Chain) -> Option<Failure> {
    let vlek_certificate = chain.is_vlek();
    match report.signer() {
        Signer::Nobody => return Some(Failure::SignerNobody),
        Signer::Unknown(n) => return Some(Failure::SignerUnknown(n)),
        Signer::Vlek if vlek_certificate => return None,
        Signer::Vcek if !vlek_certificate => {}
        Signer::Vcek | Signer::Vlek => return Some(Failure::SignerMismatch { vlek_certificate }),
    }
    let Some(hardware) = chain.hardware_id() else {
        return Some(Failure::CertificateWithoutChip);
    };
    let chip = report.chip_id();
    if chip == [0; 64] {
        return Some(Failure::ChipMasked);
    }
    // Turin's certificates state 8 bytes; the report fills the rest with zeros.
    let (head, tail) = chip.split_at_checked(hardware.len()).unwrap_or_default();
    let same = !hardware.is_empty() && head == hardware && tail.iter().all(|b| *b == 0);
    (!same).then_some(Failure::OtherChip)
}

fn tcb(report: &Report, chain: &Chain, minimum: &TcbMinimum) -> Vec<Failure> {
    let layout = report.tcb_layout();
    let stated = report.reported_tcb().parts(layout);
    let mut failures = Vec::new();
    match chain.tcb() {
        None => failures.push(Failure::CertificateWithoutTcb),
        Some(certificate) => {
            let fmc_same = layout == TcbLayout::First || certificate.fmc == stated.fmc;
            if !fmc_same
                || (TcbParts {
                    fmc: stated.fmc,
                    ..certificate
                }) != stated
            {
                failures.push(Failure::CertificateTcb {
                    certificate,
                    report: stated,
                });
            }
        }
    }
    let minimum = *minimum;
    if !enough(stated, minimum) {
        let report = stated;
        failures.push(Failure::TcbTooOld { report, minimum });
    }
    // Firmware can be updated under a running guest. What older firmware let the host do to it stays done.
    let launch = report.launch_tcb().parts(layout);
    if !enough(launch, minimum) {
        failures.push(Failure::LaunchTcbTooOld { launch, minimum });
    }
    failures
}

fn enough(stated: TcbParts, minimum: TcbMinimum) -> bool {
    stated.fmc.unwrap_or(0) >= minimum.fmc.unwrap_or(0)
        && stated.boot_loader >= minimum.boot_loader
        && stated.tee >= minimum.tee
        && stated.snp >= minimum.snp
        && stated.microcode >= minimum.microcode
}

fn policy(report: &Report, expected: &Expected) -> Vec<Failure> {
    let stated = report.policy();
    let mut failures = Vec::new();
    if stated.has(PolicyBit::Debug) && !expected.debug_allowed {
        failures.push(Failure::Debug);
    }
    if stated.has(PolicyBit::MigrationAgent) && expected.policy.is_none() {
        failures.push(Failure::MigrationAgent);
    }
    if stated.unknown() != 0 {
        failures.push(Failure::PolicyUnknown(stated.unknown()));
    }
    if let Some(wanted) = expected.policy {
        let weaker = stated
            .weaker_than(wanted)
            .into_iter()
            .filter(|bit| *bit != PolicyBit::Debug);
        failures.extend(weaker.map(Failure::PolicyWeaker));
        if stated.min_abi() < wanted.min_abi() {
            failures.push(Failure::PolicyAbi {
                wanted: wanted.min_abi(),
                stated: stated.min_abi(),
            });
        }
    }
    if report.vmpl() > expected.vmpl {
        failures.push(Failure::Vmpl(report.vmpl()));
    }
    failures
}

fn identity(report: &Report, expected: &Expected) -> Vec<Failure> {
    let differs = |failed: bool, failure| failed.then_some(failure);
    let (digest, svn) = (report.measurement(), report.guest_svn());
    let checks = [
        differs(
            !expected.measurements.is_empty() && !expected.measurements.contains(&digest),
            Failure::Measurement(digest),
        ),
        differs(
            expected
                .id_key_digest
                .is_some_and(|d| d != report.id_key_digest()),
            Failure::IdKey,
        ),
        differs(
            expected
                .author_key_digest
                .is_some_and(|d| d != report.author_key_digest()),
            Failure::AuthorKey,
        ),
        differs(
            svn < expected.guest_svn,
            Failure::GuestSvn {
                wanted: expected.guest_svn,
                stated: svn,
            },
        ),
        differs(
            expected.host_data.is_some_and(|d| d != report.host_data()),
            Failure::HostData,
        ),
        differs(
            expected.report_data.is_some_and(|d| d != report.report_data()),
            Failure::ReportData,
        ),
    ];
    checks.into_iter().flatten().collect()
}
