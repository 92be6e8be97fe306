//! A forged platform: certificates and reports like AMD's, under a root of our own. P-384 throughout, as making
//! RSA keys would take a library that the VMM does not need.

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
};

/// DER of one value.
fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let len = body.len();
    let mut out = vec![tag];
    match len {
        0..128 => out.push(len as u8),
        128..256 => out.extend([0x81, len as u8]),
        _ => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend(body);
    out
}

fn seq(parts: &[&[u8]]) -> Vec<u8> {
    tlv(0x30, parts)
}

/// ecdsa-with-SHA384.
const ALGORITHM: &[u8] = &[0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
/// id-ecPublicKey, secp384r1.
const KEY_KIND: &[u8] = &[
    0x30, 16, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0x22,
];
/// 1.3.6.1.4.1.3704.1
const AMD: &[u8] = &[0x2b, 6, 1, 4, 1, 0x9c, 0x78, 1];

pub(crate) struct Key {
    pkcs8: Vec<u8>,
    public: Vec<u8>,
}

impl Key {
    pub(crate) fn new() -> Self {
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &SystemRandom::new()).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P384_SHA384_FIXED_SIGNING,
            pkcs8.as_ref(),
            &SystemRandom::new(),
        );
        let public = pair.unwrap().public_key().as_ref().to_vec();
        Self {
            pkcs8: pkcs8.as_ref().to_vec(),
            public,
        }
    }

    fn sign(&self, message: &[u8], fixed: bool) -> Vec<u8> {
        let algorithm = if fixed {
            &ECDSA_P384_SHA384_FIXED_SIGNING
        } else {
            &ECDSA_P384_SHA384_ASN1_SIGNING
        };
        let rng = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, &self.pkcs8, &rng).unwrap();
        pair.sign(&rng, message).unwrap().as_ref().to_vec()
    }
}

fn name(common: &str) -> Vec<u8> {
    let attribute = seq(&[&[6, 3, 0x55, 4, 3], &tlv(0x0c, &[common.as_bytes()])]);
    seq(&[&tlv(0x31, &[&attribute])])
}

fn extension(id: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let flag: &[u8] = if critical { &[1, 1, 0xff] } else { &[] };
    seq(&[&tlv(6, &[id]), flag, &tlv(4, &[value])])
}

pub(crate) fn authority() -> Vec<u8> {
    extension(&[0x55, 0x1d, 0x13], true, &seq(&[&[1, 1, 0xff]]))
}

/// Extensions of a VCEK: security patch levels in the order boot loader, TEE, SNP, microcode, and the chip.
pub(crate) fn vcek([boot_loader, tee, snp, microcode]: [u8; 4], fmc: Option<u8>, chip: &[u8]) -> Vec<u8> {
    let level = |n: u8, value: u8| {
        let number = if value < 128 {
            tlv(2, &[&[value]])
        } else {
            tlv(2, &[&[0, value]])
        };
        extension(&[AMD, &[3, n]].concat(), false, &number)
    };
    let mut all = [
        level(1, boot_loader),
        level(2, tee),
        level(3, snp),
        level(8, microcode),
    ]
    .concat();
    if let Some(fmc) = fmc {
        all.extend(level(9, fmc));
    }
    all.extend(extension(&[AMD, &[4]].concat(), false, chip));
    all
}

/// Instead of the chip: the provider that loaded the key.
pub(crate) fn provider() -> Vec<u8> {
    extension(&[AMD, &[5]].concat(), false, &tlv(0x16, &[b"cloud"]))
}

pub(crate) struct Cert<'a> {
    pub(crate) subject: &'a str,
    pub(crate) issuer: &'a str,
    pub(crate) key: &'a Key,
    pub(crate) signer: &'a Key,
    /// UTCTime: YYMMDDhhmmssZ.
    pub(crate) validity: [&'a str; 2],
    pub(crate) extensions: Vec<u8>,
}

impl Cert<'_> {
    pub(crate) fn der(&self) -> Vec<u8> {
        let [from, to] = self.validity.map(|time| tlv(0x17, &[time.as_bytes()]));
        let key = seq(&[KEY_KIND, &tlv(3, &[&[0], &self.key.public])]);
        let tbs = seq(&[
            &[0xa0, 3, 2, 1, 2, 2, 1, 1],
            ALGORITHM,
            &name(self.issuer),
            &seq(&[&from, &to]),
            &name(self.subject),
            &key,
            &tlv(0xa3, &[&seq(&[&self.extensions])]),
        ]);
        let signature = self.signer.sign(&tbs, false);
        seq(&[&tbs, ALGORITHM, &tlv(3, &[&[0], &signature])])
    }
}

/// A revocation list of `issuer` that names the certificates with these serial numbers.
pub(crate) fn revocation_list(issuer: &str, signer: &Key, times: &[&str], serials: &[u8]) -> Vec<u8> {
    let time = |time: &&str| tlv(0x17, &[time.as_bytes()]);
    let times = times.iter().flat_map(time).collect::<Vec<u8>>();
    let entry = |serial: &u8| seq(&[&[2, 1, *serial], &tlv(0x17, &[b"210101000000Z"])]);
    let entries = serials.iter().flat_map(entry).collect::<Vec<u8>>();
    let entries = if serials.is_empty() {
        Vec::new()
    } else {
        seq(&[&entries])
    };
    let tbs = seq(&[&[2, 1, 1], ALGORITHM, &name(issuer), &times, &entries]);
    let signature = signer.sign(&tbs, false);
    seq(&[&tbs, ALGORITHM, &tlv(3, &[&[0], &signature])])
}

/// Signs the first 0x2a0 bytes of `report` in place.
pub(crate) fn sign_report(report: &mut [u8], key: &Key) {
    let fixed = key.sign(&report[..0x2a0], true);
    report[0x2a0..].fill(0);
    for (half, at) in [(&fixed[..48], 0x2a0), (&fixed[48..], 0x2a0 + 72)] {
        for (i, byte) in half.iter().rev().enumerate() {
            report[at + i] = *byte;
        }
    }
}
