//! Attestation reports: parsing (versions 2 to 5), the chain of certificates behind the signature, and the checks
//! of an owner (SEV-SNP Firmware ABI, revision 1.58, "ATTESTATION_REPORT Structure"; "Versioned Chip Endorsement Key
//! (VCEK) Certificate and KDS Interface Specification", revision 1.00).

mod chain;
mod revocation;
mod verify;

use std::fmt;

use crate::bytes::{array, le32, le64};
use crate::measure::Measurement;
use crate::p384::{SIGNATURE_BYTES, Signature};
use crate::policy::Policy;

pub use chain::{CertificateError, Chain, Link, Roots};
pub use revocation::ListFault;
pub use verify::{Expected, Failure, TcbMinimum, check};

/// Length of a report, without the header that SNP_GUEST_REQUEST puts before it.
pub const REPORT_BYTES: usize = 1184;
/// What the signature covers.
const SIGNED: usize = 0x2a0;
/// ECDSA P-384 with SHA-384.
const ALGORITHM: u32 = 1;
/// AMD family of the first CPUs with the second TCB layout (Turin).
const FAMILY_TURIN: u8 = 0x1a;

/// Bytes that are no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ReportError {
    #[error("a report has 1184 bytes, this has {bytes}; give the file that the guest read from outblob")]
    Length { bytes: usize },
    #[error("report version {version}; versions 2 to 5 are known")]
    Version { version: u32 },
}

/// A version of everything that is trusted, in the layout of the CPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcb(pub u64);

/// Which bytes of a [`Tcb`] mean what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcbLayout {
    /// Milan and Genoa.
    First,
    /// Turin and later.
    Second,
}

/// A [`Tcb`] taken apart; security patch levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TcbParts {
    /// Firmware of the root of trust; only in the second layout.
    pub fmc: Option<u8>,
    /// Boot loader of the security processor.
    pub boot_loader: u8,
    /// Its operating system.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Microcode.
    pub microcode: u8,
}

impl Tcb {
    /// Takes it apart.
    pub fn parts(self, layout: TcbLayout) -> TcbParts {
        let [a, b, c, d, _, _, g, microcode] = self.0.to_le_bytes();
        match layout {
            TcbLayout::First => TcbParts {
                fmc: None,
                boot_loader: a,
                tee: b,
                snp: g,
                microcode,
            },
            TcbLayout::Second => TcbParts {
                fmc: Some(a),
                boot_loader: b,
                tee: c,
                snp: d,
                microcode,
            },
        }
    }
}

impl fmt::Display for TcbParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(fmc) = self.fmc {
            write!(f, "fmc {fmc}, ")?;
        }
        let Self {
            boot_loader,
            tee,
            snp,
            microcode,
            ..
        } = self;
        write!(
            f,
            "boot loader {boot_loader}, tee {tee}, snp {snp}, microcode {microcode}"
        )
    }
}

/// Who signed a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signer {
    /// The chip's own key.
    Vcek,
    /// A key that a cloud provider loaded.
    Vlek,
    /// Nobody: the host masks the key.
    Nobody,
    /// A value that is not defined.
    Unknown(u8),
}

/// A report, as yet unverified.
#[derive(Clone, PartialEq, Eq)]
pub struct Report(Box<[u8; REPORT_BYTES]>);

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Report");
        f.field("version", &self.version())
            .field("measurement", &self.measurement());
        f.finish_non_exhaustive()
    }
}

impl Report {
    /// Reads a report.
    ///
    /// # Errors
    /// Another length or version.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        let raw: [u8; REPORT_BYTES] = bytes
            .try_into()
            .map_err(|_| ReportError::Length { bytes: bytes.len() })?;
        let report = Self(Box::new(raw));
        match report.version() {
            2..=5 => Ok(report),
            version => Err(ReportError::Version { version }),
        }
    }

    /// The report's bytes.
    pub fn bytes(&self) -> &[u8; REPORT_BYTES] {
        &self.0
    }

    fn word(&self, at: usize) -> u32 {
        le32(self.0.as_slice(), at).unwrap_or(0)
    }

    fn quad(&self, at: usize) -> u64 {
        le64(self.0.as_slice(), at).unwrap_or(0)
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        array(self.0.as_slice(), at).unwrap_or([0; N])
    }

    /// Version of the layout.
    pub fn version(&self) -> u32 {
        self.word(0)
    }

    /// Security version that the ID block states.
    pub fn guest_svn(&self) -> u32 {
        self.word(4)
    }

    /// The guest policy.
    pub fn policy(&self) -> Policy {
        Policy::stated(self.quad(8))
    }

    /// Family id that the ID block states.
    pub fn family_id(&self) -> [u8; 16] {
        self.field(0x10)
    }

    /// Image id that the ID block states.
    pub fn image_id(&self) -> [u8; 16] {
        self.field(0x20)
    }

    /// Privilege level of the requester; 0xffffffff if the host asked.
    pub fn vmpl(&self) -> u32 {
        self.word(0x30)
    }

    fn algorithm(&self) -> u32 {
        self.word(0x34)
    }

    /// Version of the firmware that made the report.
    pub fn current_tcb(&self) -> Tcb {
        Tcb(self.quad(0x38))
    }

    /// Facts of the platform: bit 0 SMT, 1 TSME, 2 ECC, 3 RAPL off, 4 ciphertext hiding.
    pub fn platform_info(&self) -> u64 {
        self.quad(0x40)
    }

    /// Which key signed.
    pub fn signer(&self) -> Signer {
        let [flags] = self.field(0x48);
        match flags >> 2 & 7 {
            0 => Signer::Vcek,
            1 => Signer::Vlek,
            7 => Signer::Nobody,
            other => Signer::Unknown(other),
        }
    }

    /// 64 bytes of the guest's choice: its nonce.
    pub fn report_data(&self) -> [u8; 64] {
        self.field(0x50)
    }

    /// The launch digest.
    pub fn measurement(&self) -> Measurement {
        Measurement(self.field(0x90))
    }

    /// 32 bytes of the host's choice, fixed at launch.
    pub fn host_data(&self) -> [u8; 32] {
        self.field(0xc0)
    }

    /// SHA-384 of the key that signed the ID block; zero if there was none.
    pub fn id_key_digest(&self) -> [u8; 48] {
        self.field(0xe0)
    }

    /// SHA-384 of the key that signed the ID key; zero if there was none.
    pub fn author_key_digest(&self) -> [u8; 48] {
        self.field(0x110)
    }

    /// Random number of this guest.
    pub fn report_id(&self) -> [u8; 32] {
        self.field(0x140)
    }

    /// The version that the signing key is derived from.
    pub fn reported_tcb(&self) -> Tcb {
        Tcb(self.quad(0x180))
    }

    /// Family, model and stepping of the CPU; since version 3.
    pub fn cpu(&self) -> Option<(u8, u8, u8)> {
        let [family, model, stepping] = self.field(0x188);
        (self.version() >= 3).then_some((family, model, stepping))
    }

    /// The chip; zero if the host masks it.
    pub fn chip_id(&self) -> [u8; 64] {
        self.field(0x1a0)
    }

    /// The version below which the host cannot go back.
    pub fn committed_tcb(&self) -> Tcb {
        Tcb(self.quad(0x1e0))
    }

    /// Version when the guest was launched.
    pub fn launch_tcb(&self) -> Tcb {
        Tcb(self.quad(0x1f0))
    }

    /// Mitigations at launch and now; since version 5.
    pub fn mitigations(&self) -> Option<(u64, u64)> {
        (self.version() >= 5).then(|| (self.quad(0x1f8), self.quad(0x200)))
    }

    /// Layout of the TCB fields. Version 2 does not state the CPU, but Turin's chip ids have 8 bytes.
    pub fn tcb_layout(&self) -> TcbLayout {
        let second = match self.cpu() {
            Some((family, ..)) => family >= FAMILY_TURIN,
            None => {
                let id = self.chip_id();
                let (head, tail) = id.split_at_checked(8).unwrap_or_default();
                head.iter().any(|b| *b != 0) && tail.iter().all(|b| *b == 0)
            }
        };
        if second {
            TcbLayout::Second
        } else {
            TcbLayout::First
        }
    }

    fn signed(&self) -> &[u8] {
        self.0.get(..SIGNED).unwrap_or_default()
    }

    /// The signature; `None` if it is malformed or followed by anything.
    fn signature(&self) -> Option<Signature> {
        Signature::from_amd(&self.field::<SIGNATURE_BYTES>(SIGNED))
    }
}
