//! Whether a genuine TDX host signed a quote, and how well patched it is: certificates, revocation lists, TCB levels
//! and the quoting enclave's identity, all as of a given time. The crate `dcap-qvl` does this part.

use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::verify::QuoteVerifier;
use webpki::Error as Fault;

use super::Quote;

/// What Intel publishes about the host that signed a quote, as JSON of the form that `dcap-qvl` writes.
#[derive(Clone, Debug)]
pub struct Collateral(QuoteCollateralV3);

/// A file that holds no collateral.
#[derive(Debug, thiserror::Error)]
#[error("not collateral ({0}); get it with: dcap-qvl fetch-collateral, or from your provider's PCCS")]
pub struct CollateralError(serde_json::Error);

impl Collateral {
    /// Reads the JSON.
    ///
    /// # Errors
    /// See [`CollateralError`].
    pub fn parse(json: &[u8]) -> Result<Self, CollateralError> {
        serde_json::from_slice(json).map(Self).map_err(CollateralError)
    }
}

/// Why a quote does not verify, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ChainFault(String);

/// How well patched the host is, in Intel's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcbLevel {
    /// One of [`TCB_STATUSES`].
    pub status: String,
    /// Security advisories that it lacks.
    pub advisories: Vec<String>,
}

/// States of a host's TCB, from best to worst. A revoked one never verifies.
pub const TCB_STATUSES: [&str; 8] = [
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
];

/// Verifies `quote` up to Intel's root at `at` seconds since 1970, its own signature included. A TD under debug passes: that is the caller's to judge, from [`super::Attributes`].
///
/// # Errors
/// The first thing that does not hold.
pub fn verify(quote: &Quote, collateral: &Collateral, at: u64) -> Result<TcbLevel, ChainFault> {
    let verifier = QuoteVerifier::new_prod().allow_debug(true);
    match verifier.verify(&quote.bytes, &collateral.0, at) {
        Ok(report) => Ok(TcbLevel {
            status: report.status,
            advisories: report.advisory_ids,
        }),
        Err(e) => Err(ChainFault(match e.downcast_ref() {
            Some(fault) => certificate_fault(fault),
            None => on_a_line(&format!("{e:#}")),
        })),
    }
}

/// Text that may repeat words of the collateral, which whoever hands it out can choose, as plain ASCII without controls.
fn on_a_line(text: &str) -> String {
    let plain = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
    text.chars().map(plain).collect()
}

/// What is wrong with a certificate or a revocation list. `webpki` has no words for it, only the names of its own types.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the crate has forty more, most of which Intel's certificates never meet"
)]
fn certificate_fault(fault: &Fault) -> String {
    let fetch = "fetch the collateral again, or judge by an earlier time with --at";
    match fault {
        Fault::CrlExpired { next_update, .. } => {
            let until = next_update.as_secs();
            format!("a revocation list of the collateral has expired (at second {until} since 1970); {fetch}")
        }
        Fault::CertExpired { not_after, .. } => {
            let until = not_after.as_secs();
            format!("a certificate has expired (at second {until} since 1970); {fetch}")
        }
        Fault::CertNotValidYet { not_before, .. } => {
            let from = not_before.as_secs();
            format!(
                "a certificate is not valid yet (from second {from} since 1970); correct the clock, or --at"
            )
        }
        Fault::CertRevoked => "a certificate behind the quote is revoked; do not trust this host".into(),
        Fault::UnknownIssuer => "a certificate does not lead to Intel's root".into(),
        Fault::UnknownRevocationStatus => {
            "the collateral's revocation lists do not cover a certificate; fetch the collateral again".into()
        }
        Fault::InvalidSignatureForPublicKey => "a certificate was not signed by its issuer".into(),
        Fault::InvalidCrlSignatureForPublicKey => {
            "a revocation list of the collateral was not signed by its issuer; fetch it again".into()
        }
        other => {
            let name = format!("{other:?}");
            let name = name
                .split(|c: char| !c.is_alphanumeric())
                .next()
                .unwrap_or_default();
            format!("a certificate or revocation list cannot be used ({name}); fetch the collateral again")
        }
    }
}
