//! AMD's lists of intermediate keys that count no more ("Versioned Chip Endorsement Key (VCEK) Certificate and KDS
//! Interface Specification", revision 1.00, "Certificate Revocation List"; RFC 5280, "CRL and CRL Extensions Profile").

use std::fmt;
use std::time::Duration;

use x509_cert::Certificate;
use x509_cert::crl::CertificateList;
use x509_cert::der::{Decode, Encode};

use super::chain::{Signed, signed};
use crate::certs::der;

/// A root whose list has named an intermediate key for years, and that certificate's serial number: the first ASK of
/// Genoa, which another one took the place of in October 2022.
const REVOKED: (&[u8], [u8; 3]) = (include_bytes!("roots/ark-genoa.der"), [2, 0, 1]);

/// True if AMD is known to have revoked `certificate`, which `root` has issued, without any list.
pub(super) fn known(root: &Certificate, certificate: &Certificate) -> bool {
    let (issuer, serial) = REVOKED;
    certificate.tbs_certificate().serial_number().as_bytes() == serial
        && root.to_der().is_ok_and(|root| root == issuer)
}

/// A list that says nothing about the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Display says it")]
pub enum ListFault {
    Foreign,
    Signature,
    NotYetValid,
    Expired,
}

impl fmt::Display for ListFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => "is another root's; get that of the chip's family",
            Self::Signature => "is not signed by the ARK",
            Self::NotYetValid => "is not valid yet; is the clock right?",
            Self::Expired => "has expired or states no end; get a new one",
        })
    }
}

/// A list as it was given.
#[derive(Clone, Debug)]
pub(super) struct List(CertificateList);

impl List {
    /// Reads a list, PEM or DER.
    pub(super) fn read(file: &[u8]) -> Option<Self> {
        CertificateList::from_der(&der(file)?).ok().map(Self)
    }

    /// Everything that keeps the list from being `root`'s at the time `now` since 1970.
    pub(super) fn faults(&self, root: &Certificate, now: Duration) -> Vec<ListFault> {
        let list = &self.0.tbs_cert_list;
        let signed = signed(&Signed {
            contents: list.to_der().ok(),
            inner: &list.signature,
            outer: &self.0.signature_algorithm,
            signature: &self.0.signature,
            issuer: root,
        });
        let until = list.next_update.map(|time| time.to_unix_duration());
        let checks = [
            (
                list.issuer == *root.tbs_certificate().subject(),
                ListFault::Foreign,
            ),
            (signed, ListFault::Signature),
            (list.this_update.to_unix_duration() <= now, ListFault::NotYetValid),
            (until.is_some_and(|until| now <= until), ListFault::Expired),
        ];
        checks
            .into_iter()
            .filter_map(|(good, fault)| (!good).then_some(fault))
            .collect()
    }

    /// True if it names `certificate`, whose issuer must be the list's.
    pub(super) fn names(&self, certificate: &Certificate) -> bool {
        let serial = certificate.tbs_certificate().serial_number();
        let mut named = self.0.tbs_cert_list.revoked_certificates.iter().flatten();
        named.any(|revoked| revoked.serial_number == *serial)
    }
}
