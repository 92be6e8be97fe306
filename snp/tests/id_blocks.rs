//! ID blocks against snp-create-id-block's, and keys in all the forms that OpenSSL writes.

use snp::id_block::{IdAuth, IdBlock, IdBlockError};
use snp::measure::Measurement;
use snp::p384::{KeyError, SigningKey};
use snp::policy::Policy;

const ID_KEY: &[u8] = include_bytes!("recorded/id-block/id-key.pem");
const AUTHOR_KEY: &[u8] = include_bytes!("recorded/id-block/author-key.pem");
const BLOCK: &[u8] = include_bytes!("recorded/id-block/block.bin");
const AUTH: &[u8] = include_bytes!("recorded/id-block/auth.bin");

fn block() -> IdBlock {
    IdBlock {
        measurement: Measurement([0x2a; 48]),
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        policy: Policy::default(),
    }
}

fn digests() -> Vec<String> {
    include_str!("recorded/id-block/digests.txt")
        .lines()
        .map(str::to_string)
        .collect()
}

#[test]
fn blocks_equal_those_of_snp_create_id_block() {
    assert_eq!(block().to_bytes(), BLOCK);
    assert_eq!(IdBlock::parse(BLOCK).unwrap(), block());
    let theirs = IdAuth::parse(AUTH).unwrap();
    theirs.check(&block()).unwrap();
    let digest = |key: snp::p384::PublicKey| Measurement(key.digest()).to_string();
    let keys = [theirs.id_key().unwrap(), theirs.author_key().unwrap().unwrap()];
    assert_eq!(keys.map(digest).to_vec(), digests());
}

#[test]
fn our_authentication_differs_from_theirs_in_the_random_signatures_only() {
    let (id_key, author) = (
        SigningKey::parse(ID_KEY).unwrap(),
        SigningKey::parse(AUTHOR_KEY).unwrap(),
    );
    let ours = block().sign(&id_key, Some(&author)).unwrap();
    ours.check(&block()).unwrap();
    let signatures = [0x40..0x40 + 144, 0x680..0x680 + 144];
    for at in (0..4096).filter(|at| !signatures.iter().any(|s| s.contains(at))) {
        assert_eq!(ours.bytes()[at], AUTH[at], "byte {at:#x}");
    }
}

#[test]
fn every_flipped_bit_that_is_signed_is_noticed() {
    let auth = IdAuth::parse(AUTH).unwrap();
    for at in 0..BLOCK.len() {
        let mut bytes = BLOCK.to_vec();
        bytes[at] ^= 1;
        let refused = IdBlock::parse(&bytes).and_then(|block| auth.check(&block));
        assert!(refused.is_err(), "block byte {at:#x}");
    }
    for at in 0..AUTH.len() {
        let mut bytes = AUTH.to_vec();
        bytes[at] ^= 1;
        assert!(
            IdAuth::parse(&bytes).unwrap().check(&block()).is_err(),
            "authentication byte {at:#x}"
        );
    }
}

#[test]
fn an_author_key_is_optional() {
    let auth = block().sign(&SigningKey::parse(ID_KEY).unwrap(), None).unwrap();
    auth.check(&block()).unwrap();
    assert!(!auth.has_author_key() && auth.author_key().unwrap().is_none());
}

#[test]
fn files_of_another_kind_are_refused() {
    assert_eq!(
        IdBlock::parse(&BLOCK[..95]),
        Err(IdBlockError::BlockLength { bytes: 95 })
    );
    assert_eq!(
        IdAuth::parse(&AUTH[..10]),
        Err(IdBlockError::AuthLength { bytes: 10 })
    );
    let mut newer = BLOCK.to_vec();
    newer[0x50] = 2;
    assert_eq!(IdBlock::parse(&newer), Err(IdBlockError::Version { version: 2 }));
    let mut lawless = BLOCK.to_vec();
    lawless[0x5a] = 0;
    assert!(matches!(IdBlock::parse(&lawless), Err(IdBlockError::Policy(_))));
}

#[test]
fn keys_are_read_in_every_form_that_openssl_writes() {
    let public = |file: &[u8]| SigningKey::parse(file).map(|key| key.public());
    assert_eq!(
        public(include_bytes!("recorded/keys/id-key.p8.der")),
        public(ID_KEY)
    );
    assert_eq!(
        public(include_bytes!("recorded/keys/author.sec1.der")),
        public(AUTHOR_KEY)
    );
    assert!(public(ID_KEY).is_ok() && public(AUTHOR_KEY).is_ok());
    let crlf = String::from_utf8(ID_KEY.to_vec()).unwrap().replace('\n', "\r\n");
    assert_eq!(public(crlf.as_bytes()), public(ID_KEY));
    let refused: &[(&[u8], KeyError)] = &[
        (include_bytes!("recorded/keys/p256.pem"), KeyError::OtherCurve),
        (include_bytes!("recorded/keys/rsa.pem"), KeyError::OtherCurve),
        (include_bytes!("recorded/keys/nopub.pem"), KeyError::NoPublicHalf),
        (include_bytes!("recorded/keys/enc.pem"), KeyError::NotAKey),
        (b"", KeyError::NotAKey),
        (b"-----BEGIN EC PRIVATE KEY-----", KeyError::NotAKey),
        (AUTH, KeyError::NotAKey),
    ];
    for (file, error) in refused {
        assert_eq!(public(file), Err(*error));
    }
}

#[test]
fn damaged_keys_never_panic() {
    for at in 0..ID_KEY.len() {
        let mut file = ID_KEY.to_vec();
        file[at] ^= 1;
        if let Ok(key) = SigningKey::parse(&file) {
            let _ = block().sign(&key, None);
        }
        let _ = SigningKey::parse(&ID_KEY[..at]);
    }
}
