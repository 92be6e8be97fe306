//! Real quotes against the collateral that Intel published for them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use tdx::quote::parse;
use tdx::quote::verify::{ChainFault, Collateral, TcbLevel, verify as verify_quote};

const V4: &[u8] = include_bytes!("recorded/quote/td10-v4.quote");
const V4_COLLATERAL: &[u8] = include_bytes!("recorded/quote/td10-v4.json");
/// A second at which that collateral holds: in June 2025.
const V4_TIME: u64 = 1_751_000_000;
const V5: &[u8] = include_bytes!("recorded/quote/td15ex-v5.quote");
const V5_COLLATERAL: &[u8] = include_bytes!("recorded/quote/td15ex-v5.json");
const V5_TIME: u64 = 1_792_500_000;

fn verify(quote: &[u8], collateral: &Collateral, at: u64) -> Result<TcbLevel, ChainFault> {
    verify_quote(&parse(quote).unwrap(), collateral, at)
}

fn collateral(json: &[u8]) -> Collateral {
    Collateral::parse(json).unwrap()
}

#[test]
fn real_quotes_verify_up_to_intels_root() {
    let best = TcbLevel {
        status: "UpToDate".into(),
        advisories: vec![],
    };
    assert_eq!(verify(V4, &collateral(V4_COLLATERAL), V4_TIME), Ok(best.clone()));
    assert_eq!(verify(V5, &collateral(V5_COLLATERAL), V5_TIME), Ok(best));
}

#[test]
fn collateral_of_another_time_or_host_is_refused() {
    let (v4, v5) = (collateral(V4_COLLATERAL), collateral(V5_COLLATERAL));
    let outdated = collateral(include_bytes!("recorded/quote/outdated-v4.json"));
    let cases: [(&[u8], &Collateral, u64, &str); 5] = [
        (V4, &v4, 1_735_689_600, "TCBInfo issue date is in the future"),
        (V4, &v4, 1_760_000_000, "TCBInfo expired"),
        (
            V4,
            &v4,
            1_780_000_000,
            "a revocation list of the collateral has expired",
        ),
        (V4, &v5, V5_TIME, "Signature is invalid for qe_report in quote"),
        (
            include_bytes!("recorded/quote/outdated-v4.quote"),
            &outdated,
            1_772_000_000,
            "No matching TCB level found",
        ),
    ];
    for (quote, collateral, at, says) in cases {
        let fault = verify(quote, collateral, at).unwrap_err().to_string();
        assert!(fault.contains(says), "{says}: {fault}");
    }
}

#[test]
fn a_change_of_any_signed_byte_is_refused() {
    let v4 = collateral(V4_COLLATERAL);
    let starts =
        |mark: &[u8]| -> Vec<usize> { (0..V4.len()).filter(|at| V4[*at..].starts_with(mark)).collect() };
    // The third certificate is the root, of which the verifier has its own copy.
    let (begin, end) = (starts(b"-----BEGIN CERTIFICATE-----"), starts(b"\n-----END"));
    assert_eq!((begin.len(), end.len()), (3, 3));
    let certificates = (0..2).flat_map(|n| begin[n] + 28..end[n]);
    let in_certificates = certificates.filter(|at| V4[*at] != b'\n').step_by(3);
    for at in (0..begin[0]).chain(in_certificates) {
        let mut changed = V4.to_vec();
        changed[at] ^= 1;
        let verified = parse(&changed).is_ok_and(|quote| verify_quote(&quote, &v4, V4_TIME).is_ok());
        assert!(!verified, "byte {at}");
    }
}

#[test]
fn a_change_of_any_byte_of_the_collateral_is_refused() {
    let quote = parse(V4).unwrap();
    // The verifier compares what is signed; names of fields, white space and the roots in the chains are not.
    let text = std::str::from_utf8(V4_COLLATERAL).unwrap();
    let fields = [
        "root_ca_crl",
        "pck_crl",
        "tcb_info",
        "tcb_info_signature",
        "qe_identity",
        "qe_identity_signature",
    ];
    for field in fields {
        let name = format!("\"{field}\": \"");
        let start = text.find(&name).unwrap() + name.len();
        let length = text[start..]
            .find("\",\n")
            .or(text[start..].find("\"\n"))
            .unwrap();
        for at in (start..start + length).step_by(length / 40 + 1) {
            let mut changed = V4_COLLATERAL.to_vec();
            // Digits and letters stay digits and letters of the same kind.
            changed[at] ^= 1;
            let verified =
                Collateral::parse(&changed).is_ok_and(|json| verify_quote(&quote, &json, V4_TIME).is_ok());
            assert!(!verified, "{field}: byte {at}");
        }
    }
}

/// Whoever hands out collateral could else write over what a terminal says of the quote.
#[test]
fn words_of_the_collateral_stay_on_their_line() {
    let text = std::str::from_utf8(V4_COLLATERAL).unwrap();
    let status = r#"tcbStatus\":\"UpToDate"#;
    assert!(text.contains(status));
    let hostile = text.replacen(status, r#"tcbStatus\":\"\\u001b[2J\\nok \\u202e"#, 1);
    let fault = verify(V4, &collateral(hostile.as_bytes()), V4_TIME)
        .unwrap_err()
        .to_string();
    assert!(
        fault.contains("unknown variant") && fault.contains("[2J"),
        "{fault:?}"
    );
    assert!(
        fault.chars().all(|c| c == ' ' || c.is_ascii_graphic()),
        "{fault:?}"
    );
}

#[test]
fn what_is_no_collateral_is_named() {
    for json in [&b""[..], b"{}", b"[]", &V4_COLLATERAL[..100]] {
        let error = Collateral::parse(json).unwrap_err().to_string();
        assert!(error.starts_with("not collateral ("), "{error}");
    }
}
