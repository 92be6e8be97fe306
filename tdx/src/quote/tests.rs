use super::*;

const V4: &[u8] = include_bytes!("../../tests/recorded/quote/td10-v4.quote");
/// Its length without the zeros that follow it.
const V4_BYTES: usize = 4936;
const V5: &[u8] = include_bytes!("../../tests/recorded/quote/td15ex-v5.quote");

/// `quote`'s body as another type of version 5, with the same signature.
fn as_v5(kind: u16, body_bytes: usize) -> Vec<u8> {
    let mut quote = V5[..48].to_vec();
    quote.extend(kind.to_le_bytes());
    quote.extend((body_bytes as u32).to_le_bytes());
    quote.extend(&V5[54..54 + body_bytes]);
    quote.extend(&V5[54 + 885..]);
    quote
}

#[test]
fn both_versions_and_every_body_are_read() {
    let v5_10 = as_v5(2, 584);
    let v5_15 = as_v5(3, 648);
    let cases = [
        (V4, 4, BodyKind::Td10, false),
        (&v5_10, 5, BodyKind::Td10, false),
        (&v5_15, 5, BodyKind::Td15, true),
        (V5, 5, BodyKind::Td15Extended, true),
    ];
    for (bytes, version, kind, more) in cases {
        let quote = parse(bytes).unwrap();
        assert_eq!((quote.version(), quote.kind()), (version, kind));
        assert_eq!(quote.td15().is_some(), more, "{kind:?}");
        assert!(quote.certificates().unwrap().starts_with(b"-----BEGIN CERT") || version == 5);
    }
}

#[test]
fn fields_stand_where_intel_puts_them() {
    let quote = parse(V4).unwrap();
    let body = &V4[48..];
    assert_eq!(quote.tee_tcb_svn(), body[..16]);
    let offsets = [136, 328, 376, 424, 472, 184, 232, 280, 16, 64];
    for (register, at) in Register::ALL.into_iter().zip(offsets) {
        assert_eq!(
            quote.register(register).0,
            body[at..at + 48],
            "{}",
            register.name()
        );
    }
    assert_eq!(quote.report_data(), body[520..584]);
    assert_eq!(
        quote.attributes().to_string(),
        "0x10000000: no debugging, access to pages not accepted ends it"
    );
    assert_eq!(quote.xfam().to_le_bytes(), body[128..136]);
    let zeros = [Register::MrSignerSeam, Register::MrOwner, Register::MrOwnerConfig];
    assert!(
        zeros
            .iter()
            .all(|register| quote.register(*register).0 == [0; 48])
    );
    assert!(quote.register(Register::Mrtd).0 != [0; 48] && quote.register(Register::MrSeam).0 != [0; 48]);

    let (svn, service) = parse(V5).unwrap().td15().unwrap();
    assert_eq!(
        (&svn[..], &service[..]),
        (&V5[54 + 584..][..16], &V5[54 + 600..][..48])
    );
}

#[test]
fn attributes_that_let_the_host_look_are_debug() {
    for bit in 0..64 {
        let attributes = Attributes(1 << bit);
        assert_eq!(attributes.debug(), bit < 8, "{bit}");
    }
    assert_eq!(Attributes(1).to_string(), "0x1: the host may debug it");
}

#[test]
fn zeros_may_follow_and_nothing_else() {
    let mut padded = V4.to_vec();
    padded.resize(8000, 0);
    assert_eq!(parse(&padded), parse(V4));
    padded[7999] = 1;
    let bytes = 8000 - V4_BYTES;
    assert_eq!(parse(&padded), Err(QuoteError::Trailing { part: "quote", bytes }));
}

#[test]
fn what_is_no_quote_is_named() {
    let with = |at: usize, value: &[u8]| {
        let mut changed = V4.to_vec();
        changed[at..at + value.len()].copy_from_slice(value);
        changed
    };
    let v5_with = |value: &[u8]| {
        let mut changed = V5.to_vec();
        changed[48..54].copy_from_slice(value);
        changed
    };
    // Offsets behind the body: length of the rest, signature, key, type and length of the certification data.
    let auth = 48 + 584;
    let certification = auth + 4 + 128;
    let chain = certification + 6 + 384 + 64 + 2 + 32;
    let long = u32::MAX.to_le_bytes();
    let cases = [
        (vec![], QuoteError::Short("header")),
        (vec![0; MOST_BYTES + 1], QuoteError::Long(MOST_BYTES + 1)),
        (with(0, &[3, 0]), QuoteError::Version(3)),
        (with(0, &[6, 0]), QuoteError::Version(6)),
        (with(4, &[0]), QuoteError::Tee(0)),
        (with(2, &[3]), QuoteError::KeyType(3)),
        (
            v5_with(&[1, 0, 0x80, 1, 0, 0]),
            QuoteError::Body { kind: 1, bytes: 384 },
        ),
        (
            v5_with(&[4, 0, 0, 0, 0, 0]),
            QuoteError::Body { kind: 4, bytes: 0 },
        ),
        (
            v5_with(&[9, 0, 0xff, 0xff, 0xff, 0xff]),
            QuoteError::Body {
                kind: 9,
                bytes: u32::MAX,
            },
        ),
        (with(auth, &long), QuoteError::Short("signature")),
        (with(auth, &[0; 4]), QuoteError::Short("signature")),
        (with(certification, &[5]), QuoteError::Certification(5)),
        (
            with(certification + 2, &long),
            QuoteError::Short("certification data"),
        ),
        (with(chain + 2, &long), QuoteError::Short("certificates")),
    ];
    for (bytes, error) in cases {
        assert_eq!(parse(&bytes), Err(error), "{error}");
    }
    for cut in 0..V4_BYTES {
        assert!(parse(&V4[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn a_change_of_any_signed_byte_is_seen_without_collateral() {
    for (whole, signed) in [(V4, 48 + 584), (V5, 48 + 6 + 885)] {
        assert_eq!(parse(whole).unwrap().check_signature(), Ok(()));
        let after = signed + 4;
        // Header, body, signature and key.
        for at in (0..signed).chain(after..after + 128) {
            let mut changed = whole.to_vec();
            changed[at] ^= 1;
            let refused = parse(&changed).map_or(true, |quote| quote.check_signature().is_err());
            assert!(refused, "byte {at}");
        }
        // What the enclave's report says of the key, and what else it binds.
        let report_data = after + 128 + 6 + 320;
        let enclave_data = report_data + 64 + 64 + 2;
        for at in (report_data..report_data + 64).chain(enclave_data..enclave_data + 32) {
            let mut changed = whole.to_vec();
            changed[at] ^= 0x80;
            let fault = parse(&changed).unwrap().check_signature();
            assert_eq!(fault, Err(SignatureFault::Key), "byte {at}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_panic(at in 0..V5.len(), value in proptest::num::u32::ANY, cut in 0..V5.len()) {
        for whole in [V4, V5] {
            let mut changed = whole[..cut.min(whole.len())].to_vec();
            for (slot, byte) in changed.iter_mut().skip(at).zip(value.to_le_bytes()) {
                *slot = byte;
            }
            if let Ok(quote) = parse(&changed) {
                let _ = quote.check_signature();
            }
        }
    }
}
