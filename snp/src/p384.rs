//! P-384 keys and signatures in the security processor's own format: little-endian numbers of 72 bytes
//! (SEV-SNP Firmware ABI, revision 1.58, "ECDSA P-384 with SHA-384 Signature" and "Public Key").

use std::fmt;

use pkcs8::{ObjectIdentifier, PrivateKeyInfoRef};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use sec1::EcPrivateKey;
use x509_cert::der::{Decode, SecretDocument, pem::PemLabel};

use crate::bytes::{array, le32, put};
use crate::measure::sha384;

/// Bytes of a coordinate or of half a signature.
const LEN: usize = 48;
/// The same, zero-extended, in AMD's format.
const WIDE: usize = 72;
const CURVE_P384: u32 = 2;
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
/// Length of AMD's public key format.
pub const KEY_BYTES: usize = 1028;
/// Length of AMD's signature format.
pub const SIGNATURE_BYTES: usize = 512;

/// A key or signature that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No private key in the file.
    #[error("not a private key in PKCS#8 or SEC1 form, PEM or DER, without a password")]
    NotAKey,
    /// Another curve or algorithm.
    #[error("not a P-384 key; make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384")]
    OtherCurve,
    /// The public half is missing.
    #[error("the file lacks the public half of the key; add it with: openssl ec -in KEY -out KEY2")]
    NoPublicHalf,
    /// The system has no random numbers, or the key is broken.
    #[error("signing did not work; the key may be damaged")]
    Signing,
}

/// Little-endian and zero-extended.
fn widen(number: &[u8; LEN]) -> [u8; WIDE] {
    let mut out = [0; WIDE];
    for (slot, byte) in out.iter_mut().zip(number.iter().rev()) {
        *slot = *byte;
    }
    out
}

/// Big-endian; `None` for a number that does not fit.
fn narrow(wide: &[u8; WIDE]) -> Option<[u8; LEN]> {
    let (low, high) = wide.split_first_chunk::<LEN>()?;
    let mut out = *low;
    out.reverse();
    high.iter().all(|b| *b == 0).then_some(out)
}

/// A public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey {
    x: [u8; LEN],
    y: [u8; LEN],
}

impl PublicKey {
    /// From an uncompressed point (SEC 1, "Elliptic-Curve-Point-to-Octet-String Conversion").
    pub fn from_point(point: &[u8]) -> Option<Self> {
        let (x, y) = (array(point, 1)?, array(point, 1_usize.saturating_add(LEN))?);
        let uncompressed =
            point.first() == Some(&4) && point.len() == LEN.saturating_mul(2).saturating_add(1);
        uncompressed.then_some(Self { x, y })
    }

    fn point(&self) -> Vec<u8> {
        [&[4], self.x.as_slice(), self.y.as_slice()].concat()
    }

    /// From AMD's format; `None` for another curve or stray bytes.
    pub fn from_amd(bytes: &[u8]) -> Option<Self> {
        let (x, y) = (array(bytes, 4)?, array(bytes, 4_usize.saturating_add(WIDE))?);
        let key = Self {
            x: narrow(&x)?,
            y: narrow(&y)?,
        };
        (le32(bytes, 0)? == CURVE_P384 && bytes == key.to_amd()).then_some(key)
    }

    /// AMD's format.
    pub fn to_amd(&self) -> [u8; KEY_BYTES] {
        let mut out = [0; KEY_BYTES];
        put(&mut out, 0, &CURVE_P384.to_le_bytes());
        put(&mut out, 4, &widen(&self.x));
        put(&mut out, 4_usize.saturating_add(WIDE), &widen(&self.y));
        out
    }

    /// As reports name the key: ID_KEY_DIGEST, AUTHOR_KEY_DIGEST.
    pub fn digest(&self) -> [u8; 48] {
        sha384(&self.to_amd())
    }

    /// True if `signature` over `message` is this key's.
    pub fn verifies(&self, message: &[u8], signature: &Signature) -> bool {
        let fixed = [signature.r, signature.s].concat();
        UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, self.point())
            .verify(message, &fixed)
            .is_ok()
    }
}

/// An ECDSA signature with SHA-384.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    r: [u8; LEN],
    s: [u8; LEN],
}

impl Signature {
    /// From AMD's format; `None` for numbers that are too large or stray bytes.
    pub fn from_amd(bytes: &[u8]) -> Option<Self> {
        let signature = Self {
            r: narrow(&array(bytes, 0)?)?,
            s: narrow(&array(bytes, WIDE)?)?,
        };
        (bytes == signature.to_amd()).then_some(signature)
    }

    /// AMD's format.
    pub fn to_amd(&self) -> [u8; SIGNATURE_BYTES] {
        let mut out = [0; SIGNATURE_BYTES];
        put(&mut out, 0, &widen(&self.r));
        put(&mut out, WIDE, &widen(&self.s));
        out
    }
}

/// A private key.
pub struct SigningKey {
    pair: EcdsaKeyPair,
    public: PublicKey,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Reads a file: PKCS#8 or SEC1, PEM or DER.
    ///
    /// # Errors
    /// No key, another curve, or a key without its public half.
    pub fn parse(file: &[u8]) -> Result<Self, KeyError> {
        let text = std::str::from_utf8(file)
            .ok()
            .map(str::trim_start)
            .filter(|t| t.starts_with("-----"));
        let Some(text) = text else {
            return Self::from_der(file);
        };
        // OpenSSL writes a block of curve parameters before the key.
        let start = text.match_indices("-----BEGIN ").find(|(at, _)| {
            text.get(*at..)
                .is_some_and(|t| !t.starts_with("-----BEGIN EC PARAMETERS"))
        });
        let pem = start
            .and_then(|(at, _)| text.get(at..))
            .ok_or(KeyError::NotAKey)?;
        let (label, der) = SecretDocument::from_pem(pem).map_err(|_| KeyError::NotAKey)?;
        match label {
            "PRIVATE KEY" => Self::from_der(der.as_bytes()),
            label if label == EcPrivateKey::PEM_LABEL => Self::from_sec1(der.as_bytes(), false),
            _ => Err(KeyError::NotAKey),
        }
    }

    fn from_der(der: &[u8]) -> Result<Self, KeyError> {
        let Ok(key) = PrivateKeyInfoRef::from_der(der) else {
            return Self::from_sec1(der, false);
        };
        let curve = key.algorithm.parameters_oid().map_err(|_| KeyError::OtherCurve)?;
        let p384 = curve == SECP384R1;
        Self::from_sec1(key.private_key.as_bytes(), p384)
    }

    fn from_sec1(der: &[u8], curve_known: bool) -> Result<Self, KeyError> {
        let key = EcPrivateKey::from_der(der).map_err(|_| KeyError::NotAKey)?;
        let named = key.parameters.and_then(sec1::EcParameters::named_curve) == Some(SECP384R1);
        if !named && !curve_known {
            return Err(KeyError::OtherCurve);
        }
        let point = key.public_key.ok_or(KeyError::NoPublicHalf)?;
        let algorithm = &ECDSA_P384_SHA384_FIXED_SIGNING;
        let rng = SystemRandom::new();
        let pair = EcdsaKeyPair::from_private_key_and_public_key(algorithm, key.private_key, point, &rng)
            .map_err(|_| KeyError::OtherCurve)?;
        let public = PublicKey::from_point(pair.public_key().as_ref()).ok_or(KeyError::OtherCurve)?;
        Ok(Self { pair, public })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// Signs `message`.
    ///
    /// # Errors
    /// No random numbers.
    pub fn sign(&self, message: &[u8]) -> Result<Signature, KeyError> {
        let fixed = self
            .pair
            .sign(&SystemRandom::new(), message)
            .map_err(|_| KeyError::Signing)?;
        let halves = (array(fixed.as_ref(), 0), array(fixed.as_ref(), LEN));
        let (Some(r), Some(s)) = halves else {
            return Err(KeyError::Signing);
        };
        Ok(Signature { r, s })
    }
}

#[cfg(test)]
impl SigningKey {
    /// A fresh key.
    pub(crate) fn generated() -> Self {
        let algorithm = &ECDSA_P384_SHA384_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &SystemRandom::new()).unwrap();
        Self::parse(pkcs8.as_ref()).unwrap()
    }
}
