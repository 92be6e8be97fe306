//! What a quote proves by itself: that its attestation key signed it, and that a quoting enclave made that key. Whose
//! enclave it is takes certificates, see [`super::verify`].

use ring::digest::{Context, SHA256};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

use super::Quote;

/// A quote that does not hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureFault {
    /// The attestation key did not sign header and body.
    #[error("the quote was changed after it was signed")]
    Signature,
    /// The enclave's report names another key.
    #[error("the attestation key is not the one that the quoting enclave vouches for")]
    Key,
}

/// Where an enclave's report has what the enclave put in.
const REPORT_DATA: usize = 320;

impl Quote {
    /// Checks the signature over header and body, and that the enclave's report names the key that made it.
    ///
    /// # Errors
    /// See [`SignatureFault`].
    pub fn check_signature(&self) -> Result<(), SignatureFault> {
        let authority = &self.authority;
        let mut point = vec![4];
        point.extend(authority.key);
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
            .verify(self.signed(), &authority.signature)
            .map_err(|_| SignatureFault::Signature)?;
        let mut context = Context::new(&SHA256);
        context.update(&authority.key);
        context.update(&authority.enclave_data);
        let mut named = [0; 64];
        if let Some(hash) = named.first_chunk_mut::<32>() {
            hash.copy_from_slice(context.finish().as_ref());
        }
        let stated = authority.enclave_report.get(REPORT_DATA..);
        if stated == Some(&named[..]) {
            Ok(())
        } else {
            Err(SignatureFault::Key)
        }
    }
}
