//! From the key that signed a report to AMD's root, or to another root that the caller pins.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::signature::{
    ECDSA_P384_SHA384_ASN1, RSA_PSS_2048_8192_SHA384, UnparsedPublicKey, VerificationAlgorithm,
};
use x509_cert::Certificate;
use x509_cert::der::asn1::{BitString, ObjectIdentifier};
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::spki::AlgorithmIdentifierOwned;

use super::revocation::{self, List, ListFault};
use crate::certs::der;
use crate::p384::PublicKey;
use crate::report::TcbParts;

const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");

/// AMD's extensions: 1.3.6.1.4.1.3704.1.
const BOOT_LOADER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.1");
const TEE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.2");
const SNP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.3");
const MICROCODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.8");
const FMC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.3.9");
const HARDWARE_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.4");
const PROVIDER_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.3704.1.5");

/// AMD's public root and intermediate certificates, as its key distribution service gives them out.
const BUILT_IN: [(&[u8], &[u8]); 3] = [
    (
        include_bytes!("roots/ark-milan.der"),
        include_bytes!("roots/ask-milan.der"),
    ),
    (
        include_bytes!("roots/ark-genoa.der"),
        include_bytes!("roots/ask-genoa.der"),
    ),
    (
        include_bytes!("roots/ark-turin.der"),
        include_bytes!("roots/ask-turin.der"),
    ),
];

/// A place in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The key that signs reports: VCEK or VLEK.
    Signer,
    /// The intermediate key: ASK or ASVK.
    Intermediate,
    /// The root.
    Root,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signer => "VCEK or VLEK",
            Self::Intermediate => "ASK",
            Self::Root => "ARK",
        })
    }
}

/// Certificates that make no chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum CertificateError {
    #[error("the {0} certificate is not X.509 in PEM or DER form")]
    Unreadable(Link),
    #[error("the revocation list is not X.509 in PEM or DER form")]
    UnreadableList,
    #[error(
        "no ASK certificate issued the VCEK or VLEK; give the one that did (for a VLEK the ASVK) with --ask"
    )]
    NoIntermediate,
    #[error(
        "the certificates lead to no pinned root; for a machine that is not AMD's own give its ARK with --ark"
    )]
    NoRoot,
}

/// Roots that are trusted, each with intermediates that need not be given.
#[derive(Clone, Debug)]
pub struct Roots {
    roots: Vec<Certificate>,
    intermediates: Vec<Certificate>,
}

impl Roots {
    /// AMD's, for Milan, Genoa and Turin.
    pub fn amd() -> Self {
        let read = |bytes: &&[u8]| Certificate::from_der(bytes).ok();
        Self {
            roots: BUILT_IN.iter().filter_map(|(ark, _)| read(ark)).collect(),
            intermediates: BUILT_IN.iter().filter_map(|(_, ask)| read(ask)).collect(),
        }
    }

    /// Only this one, PEM or DER: that of an emulated host, or a copy of AMD's.
    ///
    /// # Errors
    /// No certificate.
    pub fn only(file: &[u8]) -> Result<Self, CertificateError> {
        Ok(Self {
            roots: vec![read(file, Link::Root)?],
            intermediates: Vec::new(),
        })
    }
}

fn read(file: &[u8], link: Link) -> Result<Certificate, CertificateError> {
    let der = der(file).ok_or(CertificateError::Unreadable(link))?;
    Certificate::from_der(&der).map_err(|_| CertificateError::Unreadable(link))
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Signature(Link),
    NotYetValid(Link),
    Expired(Link),
    NoAuthority(Link),
    Revoked(Link),
    List(ListFault),
}

/// Three certificates that name each other; [`super::check`] verifies them.
#[derive(Clone, Debug)]
pub struct Chain {
    signer: Certificate,
    intermediate: Certificate,
    root: Certificate,
    list: Option<List>,
}

impl Chain {
    /// Finds the way from `signer` to one of `roots` by the names in the certificates. `intermediate` may be left
    /// out where it is built in.
    ///
    /// # Errors
    /// A certificate that is none or is missing.
    pub fn find(signer: &[u8], intermediate: Option<&[u8]>, roots: &Roots) -> Result<Self, CertificateError> {
        let signer = read(signer, Link::Signer)?;
        let given = intermediate
            .map(|file| read(file, Link::Intermediate))
            .transpose()?;
        let issuer = signer.tbs_certificate().issuer();
        let mut known = given.iter().chain(&roots.intermediates);
        let intermediate = known.find(|c| c.tbs_certificate().subject() == issuer);
        let intermediate = intermediate.ok_or(CertificateError::NoIntermediate)?.clone();
        let issuer = intermediate.tbs_certificate().issuer();
        let root = roots
            .roots
            .iter()
            .find(|c| c.tbs_certificate().subject() == issuer);
        let root = root.ok_or(CertificateError::NoRoot)?.clone();
        Ok(Self {
            signer,
            intermediate,
            root,
            list: None,
        })
    }

    /// Checks the chain also against `list`, the root's list of revoked certificates, PEM or DER.
    ///
    /// # Errors
    /// No list.
    pub fn with_revoked(self, list: &[u8]) -> Result<Self, CertificateError> {
        let list = List::read(list).ok_or(CertificateError::UnreadableList)?;
        let list = Some(list);
        Ok(Self { list, ..self })
    }

    /// True if there is a list of revoked certificates to check against.
    pub fn has_list(&self) -> bool {
        self.list.is_some()
    }

    /// Everything that is wrong at the time `now`.
    pub(super) fn faults(&self, now: SystemTime) -> Vec<Fault> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let links = [
            (Link::Root, &self.root, &self.root),
            (Link::Intermediate, &self.intermediate, &self.root),
            (Link::Signer, &self.signer, &self.intermediate),
        ];
        let mut faults = Vec::new();
        for (link, subject, issuer) in links {
            if !issued(subject, issuer) {
                faults.push(Fault::Signature(link));
            }
            let validity = subject.tbs_certificate().validity();
            if now < validity.not_before.to_unix_duration() {
                faults.push(Fault::NotYetValid(link));
            }
            if now > validity.not_after.to_unix_duration() {
                faults.push(Fault::Expired(link));
            }
            if link != Link::Signer && !authority(subject) {
                faults.push(Fault::NoAuthority(link));
            }
        }
        faults.extend(self.revoked(now));
        faults
    }

    /// What is wrong with the list, and what it or cvmm knows to be revoked.
    fn revoked(&self, now: Duration) -> Vec<Fault> {
        let list = self.list.as_ref();
        let faults = list.map(|list| list.faults(&self.root, now)).unwrap_or_default();
        // The root issued both; the signer, which it did not, has a serial number of its own issuer's.
        let named = [(Link::Root, &self.root), (Link::Intermediate, &self.intermediate)];
        let named = named.into_iter().filter(|(_, certificate)| {
            list.is_some_and(|list| list.names(certificate)) || revocation::known(&self.root, certificate)
        });
        let named = named.map(|(link, _)| Fault::Revoked(link));
        faults.into_iter().map(Fault::List).chain(named).collect()
    }

    /// The key that signs reports; `None` if it is not a P-384 key.
    pub(super) fn key(&self) -> Option<PublicKey> {
        let key = self.signer.tbs_certificate().subject_public_key_info();
        PublicKey::from_point(key.subject_public_key.as_bytes()?)
    }

    fn extension(&self, id: ObjectIdentifier) -> Option<&[u8]> {
        let all = self.signer.tbs_certificate().extensions()?;
        all.iter()
            .find(|e| e.extn_id == id)
            .map(|e| e.extn_value.as_bytes())
    }

    fn level(&self, id: ObjectIdentifier) -> Option<u8> {
        u8::from_der(self.extension(id)?).ok()
    }

    /// The TCB that the key is derived from; `None` if the certificate does not state it.
    pub(super) fn tcb(&self) -> Option<TcbParts> {
        Some(TcbParts {
            fmc: self.level(FMC),
            boot_loader: self.level(BOOT_LOADER)?,
            tee: self.level(TEE)?,
            snp: self.level(SNP)?,
            microcode: self.level(MICROCODE)?,
        })
    }

    /// The chip that the key belongs to; a VLEK belongs to none.
    pub(super) fn hardware_id(&self) -> Option<&[u8]> {
        self.extension(HARDWARE_ID)
    }

    /// True if a cloud provider loaded the key.
    pub(super) fn is_vlek(&self) -> bool {
        self.extension(PROVIDER_ID).is_some()
    }
}

/// True if `issuer`'s key signed `subject`.
fn issued(subject: &Certificate, issuer: &Certificate) -> bool {
    signed(&Signed {
        contents: subject.tbs_certificate().to_der().ok(),
        inner: subject.tbs_certificate().signature(),
        outer: subject.signature_algorithm(),
        signature: subject.signature(),
        issuer,
    })
}

/// A certificate or a list, as X.509 signs them.
pub(super) struct Signed<'a> {
    /// DER of what is signed; `None` if it has none.
    pub(super) contents: Option<Vec<u8>>,
    /// The algorithm as the contents state it.
    pub(super) inner: &'a AlgorithmIdentifierOwned,
    /// The algorithm as it stands beside the signature.
    pub(super) outer: &'a AlgorithmIdentifierOwned,
    pub(super) signature: &'a BitString,
    pub(super) issuer: &'a Certificate,
}

/// True if the issuer's key made the signature.
pub(super) fn signed(signed: &Signed<'_>) -> bool {
    let algorithm: &dyn VerificationAlgorithm = match signed.outer.oid {
        // The algorithm fixes SHA-384, MGF1 with SHA-384 and a salt of 48 bytes, as AMD uses them.
        RSASSA_PSS => &RSA_PSS_2048_8192_SHA384,
        ECDSA_SHA384 => &ECDSA_P384_SHA384_ASN1,
        _ => return false,
    };
    let key = signed.issuer.tbs_certificate().subject_public_key_info();
    let parts = (key.subject_public_key.as_bytes(), signed.signature.as_bytes());
    let (Some(key), Some(signature), Some(contents)) = (parts.0, parts.1, &signed.contents) else {
        return false;
    };
    let verified = UnparsedPublicKey::new(algorithm, key).verify(contents, signature);
    signed.inner == signed.outer && verified.is_ok()
}

/// True if the certificate may issue others.
fn authority(certificate: &Certificate) -> bool {
    let constraints = certificate.tbs_certificate().get_extension::<BasicConstraints>();
    constraints.is_ok_and(|found| found.is_some_and(|(_, constraints)| constraints.ca))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain whose root and intermediate are built in, but for what `change` does to the intermediate.
    fn chain(family: usize, change: impl FnOnce(&mut [u8])) -> Chain {
        let (root, intermediate) = BUILT_IN[family];
        let mut intermediate = intermediate.to_vec();
        change(&mut intermediate);
        Chain {
            signer: Certificate::from_der(root).unwrap(),
            intermediate: Certificate::from_der(&intermediate).unwrap(),
            root: Certificate::from_der(root).unwrap(),
            list: None,
        }
    }

    #[test]
    fn what_amd_has_revoked_is_known_without_a_list() {
        let now = UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let revoked = |chain: Chain| chain.faults(now).contains(&Fault::Revoked(Link::Intermediate));
        // The serial number of Genoa's second ASK, and that of the first, which the second took the place of.
        let (second, first) = ([2, 3, 2, 0, 2], [2, 3, 2, 0, 1]);
        let at = BUILT_IN[1]
            .1
            .windows(5)
            .position(|bytes| bytes == second)
            .unwrap();
        let as_first = |bytes: &mut [u8]| bytes[at..at + 5].copy_from_slice(&first);
        assert!(revoked(chain(1, as_first)));
        for family in 0..3 {
            assert!(!revoked(chain(family, |_| {})), "{family}");
        }
        // Serial numbers are each root's own.
        let milan = BUILT_IN[0]
            .1
            .windows(5)
            .position(|bytes| bytes == [2, 3, 1, 0, 1])
            .unwrap();
        assert!(!revoked(
            chain(0, |bytes| bytes[milan..milan + 5].copy_from_slice(&first))
        ));
    }
}
