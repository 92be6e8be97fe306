//! Attestation quotes of trust domains, versions 4 and 5, read field by field (Intel TDX DCAP Quoting Library API,
//! "A.3 Version 4 Quote Format" and "A.4 Version 5 Quote Format").
//!
//! [`parse`] believes nothing: every length is checked, nothing may be left over but zeros. [`Quote::check_signature`]
//! needs nothing beside the quote; [`verify`] says whether the signer is a genuine TDX host.

mod field;
mod signature;
pub mod verify;

pub use field::{Attributes, Register};
pub use signature::SignatureFault;

use crate::bytes::array;

/// Length of a quote's header.
const HEADER_BYTES: usize = 48;
/// ECDSA with P-256, "att_key_type".
const ECDSA_P256: u16 = 2;
/// "tee_type" of TDX.
const TEE_TDX: u32 = 0x81;
/// Certification data that hold the quoting enclave's report.
const QE_REPORT_DATA: u16 = 6;
/// Certification data that hold a chain of PEM certificates.
const PCK_CHAIN: u16 = 5;
/// Length of an SGX enclave's report.
const ENCLAVE_REPORT_BYTES: usize = 384;
/// Longest quote that is read; they have some 5 to 8 KiB.
pub const MOST_BYTES: usize = 128 << 10;

/// Generation of the TD's report in a quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// TDX 1.0.
    Td10,
    /// TDX 1.5, which adds the TCB of now and the service TD.
    Td15,
    /// TDX 1.5 with extensions.
    Td15Extended,
}

impl BodyKind {
    fn from_v5(kind: u16) -> Option<Self> {
        match kind {
            2 => Some(Self::Td10),
            3 => Some(Self::Td15),
            4 => Some(Self::Td15Extended),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Td10 => 584,
            Self::Td15 => 648,
            Self::Td15Extended => 885,
        }
    }

    /// As Intel names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Td10 => "TD 1.0",
            Self::Td15 => "TD 1.5",
            Self::Td15Extended => "TD 1.5 extended",
        }
    }
}

/// Bytes that are no quote of a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuoteError {
    /// Longer than any quote.
    #[error("{0} bytes are more than any quote has")]
    Long(usize),
    /// It ends early.
    #[error("the quote is cut off in its {0}")]
    Short(&'static str),
    /// A version that is not known.
    #[error("version {0} of the quote format; cvmm knows versions 4 and 5 of TDX")]
    Version(u16),
    /// Not of a TD.
    #[error("the quote is of TEE type {0:#x}, a TDX guest's is {TEE_TDX:#x}")]
    Tee(u32),
    /// A signature of another kind.
    #[error("signature type {0}; cvmm knows type {ECDSA_P256}, ECDSA with P-256")]
    KeyType(u16),
    /// A body of another kind.
    #[error("body type {kind} of {bytes} bytes is no report of a TD")]
    Body {
        /// Type.
        kind: u16,
        /// Stated length.
        bytes: u32,
    },
    /// Certification data of another kind.
    #[error("certification data of type {0}; the quoting enclave's report has type {QE_REPORT_DATA}")]
    Certification(u16),
    /// Something follows.
    #[error("{bytes} bytes follow the {part}, where nothing may")]
    Trailing {
        /// What they follow.
        part: &'static str,
        /// How many.
        bytes: usize,
    },
}

/// The signature and what it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Authority {
    /// r and s.
    signature: [u8; 64],
    /// x and y of the attestation key.
    key: [u8; 64],
    /// Report of the quoting enclave, which has made the key.
    enclave_report: [u8; ENCLAVE_REPORT_BYTES],
    /// What the enclave's report binds beside the key.
    enclave_data: Vec<u8>,
    /// Type of what certifies the enclave.
    chain_type: u16,
    chain: Vec<u8>,
}

/// A quote that has the form of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    version: u16,
    kind: BodyKind,
    /// All of it, without what was padded.
    bytes: Vec<u8>,
    /// Length of header and body, which the attestation key signs.
    signed_bytes: usize,
    authority: Authority,
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, bytes: usize, part: &'static str) -> Result<&'a [u8], QuoteError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(QuoteError::Short(part))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], QuoteError> {
        let bytes = self.take(N, part)?;
        bytes.first_chunk().copied().ok_or(QuoteError::Short(part))
    }

    fn le16(&mut self, part: &'static str) -> Result<u16, QuoteError> {
        self.array(part).map(u16::from_le_bytes)
    }

    fn le32(&mut self, part: &'static str) -> Result<u32, QuoteError> {
        self.array(part).map(u32::from_le_bytes)
    }

    /// What follows its length.
    fn counted(&mut self, part: &'static str) -> Result<Rest<'a>, QuoteError> {
        let bytes = usize::try_from(self.le32(part)?).map_err(|_| QuoteError::Short(part))?;
        self.take(bytes, part).map(Rest)
    }

    fn end(&self, part: &'static str) -> Result<(), QuoteError> {
        match self.0.len() {
            0 => Ok(()),
            bytes => Err(QuoteError::Trailing { part, bytes }),
        }
    }
}

/// Reads a quote. Zeros may follow it, as some guests pad theirs.
///
/// # Errors
/// See [`QuoteError`].
pub fn parse(bytes: &[u8]) -> Result<Quote, QuoteError> {
    if bytes.len() > MOST_BYTES {
        return Err(QuoteError::Long(bytes.len()));
    }
    let mut rest = Rest(bytes);
    let mut header = Rest(rest.take(HEADER_BYTES, "header")?);
    let version = header.le16("header")?;
    let key_type = header.le16("header")?;
    let tee = header.le32("header")?;
    if !matches!(version, 4 | 5) {
        return Err(QuoteError::Version(version));
    }
    if tee != TEE_TDX {
        return Err(QuoteError::Tee(tee));
    }
    if key_type != ECDSA_P256 {
        return Err(QuoteError::KeyType(key_type));
    }
    let kind = if version == 4 {
        BodyKind::Td10
    } else {
        let (kind, bytes) = (rest.le16("body")?, rest.le32("body")?);
        BodyKind::from_v5(kind)
            .filter(|known| usize::try_from(bytes) == Ok(known.bytes()))
            .ok_or(QuoteError::Body { kind, bytes })?
    };
    rest.take(kind.bytes(), "body")?;
    let signed_bytes = bytes.len().saturating_sub(rest.0.len());
    let authority = authority(rest.counted("signature")?)?;
    if rest.0.iter().any(|byte| *byte != 0) {
        rest.end("quote")?;
    }
    Ok(Quote {
        version,
        kind,
        bytes: bytes.strip_suffix(rest.0).unwrap_or(bytes).to_vec(),
        signed_bytes,
        authority,
    })
}

fn authority(mut rest: Rest<'_>) -> Result<Authority, QuoteError> {
    let (signature, key) = (rest.array("signature")?, rest.array("attestation key")?);
    let certification = rest.le16("certification data")?;
    if certification != QE_REPORT_DATA {
        return Err(QuoteError::Certification(certification));
    }
    let mut data = rest.counted("certification data")?;
    rest.end("certification data")?;
    let enclave_report = data.array("quoting enclave's report")?;
    data.take(64, "quoting enclave's signature")?;
    let enclave_bytes = data.le16("quoting enclave's data")?;
    let enclave_data = data
        .take(enclave_bytes.into(), "quoting enclave's data")?
        .to_vec();
    let chain_type = data.le16("certificates")?;
    let chain = data.counted("certificates")?;
    data.end("certificates")?;
    Ok(Authority {
        signature,
        key,
        enclave_report,
        enclave_data,
        chain_type,
        chain: chain.0.to_vec(),
    })
}

impl Quote {
    /// Version of the format.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Generation of the body.
    pub fn kind(&self) -> BodyKind {
        self.kind
    }

    /// The certificates of the quoting enclave's signer, leaf first, as PEM text; `None` if the quote names them
    /// otherwise.
    pub fn certificates(&self) -> Option<&[u8]> {
        (self.authority.chain_type == PCK_CHAIN).then_some(&self.authority.chain)
    }

    /// Header and body.
    fn signed(&self) -> &[u8] {
        self.bytes.get(..self.signed_bytes).unwrap_or_default()
    }

    /// `N` bytes of the body. Offsets are constants below the length of the body that has the field.
    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let start = self.signed_bytes.saturating_sub(self.kind.bytes());
        array(self.signed(), start.saturating_add(at)).unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests;
