//! `cvmm quote` on quotes of real TDX hosts.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod kernel;
mod shell;

use std::fs;
use std::path::Path;

use serde_json::Value;
use shell::{Scratch, feed};

/// A second at which the collateral of `td10-v4` holds, and one for `td15ex-v5`.
const V4_TIME: &str = "1751000000";
const V5_TIME: &str = "1792500000";

fn recorded(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tdx/tests/recorded/quote");
    path.join(name).display().to_string()
}

/// `cvmm quote` with these arguments.
fn quote(dir: &Path, args: &[&str]) -> (i32, String, String) {
    feed(dir, &[&["quote"], args].concat(), b"")
}

fn v4(more: &[&str]) -> (i32, String, String) {
    let (file, collateral) = (recorded("td10-v4.quote"), recorded("td10-v4.json"));
    let args = [file.as_str(), "--collateral", &collateral, "--at", V4_TIME];
    quote(Path::new("/"), &[&args, more].concat())
}

/// What a quote states of `name`, from the JSON.
fn stated(name: &str) -> String {
    let (_, out, _) = v4(&["--json"]);
    let answer: Value = serde_json::from_str(&out).unwrap();
    answer["quote"][name].as_str().unwrap().to_owned()
}

#[test]
fn a_real_quote_verifies_in_every_form() {
    let (code, out, err) = v4(&[]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let begins = "\
ok     signature     ECDSA P-256 by the key that the quoting enclave vouches for
ok     chain         signed up to Intel's root, all valid
ok     tcb           UpToDate
ok     attributes    0x10000000: no debugging, access to pages not accepted ends it
-      mrtd          ";
    assert!(out.starts_with(begins), "{out}");
    assert!(
        out.ends_with("\nthe quote verifies, but it may be of any guest; --mrtd says which one is meant\n"),
        "{out}"
    );
    let raw = fs::read(recorded("td10-v4.quote")).unwrap();
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    let collateral = recorded("td10-v4.json");
    for input in [raw.as_slice(), hex.as_bytes()] {
        let args = ["quote", "-", "--collateral", &collateral, "--at", V4_TIME];
        assert_eq!(
            feed(Path::new("/"), &args, input),
            (0, out.clone(), String::new())
        );
    }
}

#[test]
fn a_quote_of_version_5_verifies_too() {
    let (file, collateral) = (recorded("td15ex-v5.quote"), recorded("td15ex-v5.json"));
    let args = [
        file.as_str(),
        "--collateral",
        &collateral,
        "--at",
        V5_TIME,
        "--json",
    ];
    let (code, out, err) = quote(Path::new("/"), &args);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&answer["schema"], &answer["verified"]),
        (&1.into(), &true.into())
    );
    assert_eq!(
        (&answer["quote"]["version"], &answer["quote"]["body"]),
        (&5.into(), &"TD 1.5 extended".into())
    );
    assert_eq!(answer["quote"]["mrservicetd"], "00".repeat(48));
}

#[test]
fn without_collateral_nothing_verifies_and_that_is_said() {
    let file = recorded("td10-v4.quote");
    let mrtd = stated("mrtd");
    let (code, out, err) = quote(Path::new("/"), &[&file, "--mrtd", &mrtd]);
    assert_eq!((code, err.as_str()), (40, ""));
    assert!(
        out.contains("\n-      chain         signature chain not verified: "),
        "{out}"
    );
    assert!(out.contains(&format!("\nok     mrtd          {mrtd}\n")), "{out}");
    assert!(
        out.contains("\nTHE QUOTE IS NOT VERIFIED: anybody can have made it; "),
        "{out}"
    );
}

#[test]
fn each_wish_has_its_line_and_one_failure_fails_the_quote() {
    let names = [
        "mrtd",
        "rtmr0",
        "rtmr1",
        "rtmr2",
        "rtmr3",
        "mrconfigid",
        "mrowner",
        "mrownerconfig",
        "mrseam",
    ];
    let mut all = vec!["--nonce".to_owned(), stated("report_data")];
    for name in names {
        all.extend([format!("--{name}"), stated(name)]);
    }
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let (code, out, err) = v4(&all);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.ends_with("\nthe quote verifies\n"), "{out}");
    let zeros = "00".repeat(48);
    let other = "5a".repeat(48);
    for name in names {
        let (code, out, _) = v4(&[&format!("--{name}"), &other]);
        let value = stated(name);
        let line = format!("\nFAILED {name:<13} {value} is not the expected one\n");
        assert!(code == 40 && out.contains(&line), "{out}");
        assert!(out.ends_with("\nTHE QUOTE DOES NOT VERIFY\n"), "{out}");
    }
    let (code, out, _) = v4(&["--nonce", "01"]);
    assert!(
        code == 40 && out.contains("\nFAILED report-data   REPORTDATA is not the expected nonce\n"),
        "{out}"
    );
    // One of several is enough.
    let (code, ..) = v4(&["--mrtd", &zeros, "--mrtd", &stated("mrtd")]);
    assert_eq!(code, 0);
}

#[test]
fn a_prediction_is_taken_from_the_json_of_measure() {
    let dir = Scratch::new("prediction");
    let (rtmr0, rtmr2, zeros) = (stated("rtmr0"), stated("rtmr2"), "00".repeat(48));
    let prediction = |mrtd: &str, rtmr1: &str| {
        let rtmrs = format!(r#"["{rtmr0}","{rtmr1}","{rtmr2}","{zeros}"]"#);
        format!(r#"{{"schema":1,"mrtd":"{mrtd}","rtmrs":{rtmrs}}}"#)
    };
    let (mrtd, rtmr1, other) = (stated("mrtd"), stated("rtmr1"), "5a".repeat(48));
    let owned = |name: &str, value: &str| format!(r#"{{"mrtd":"{mrtd}","{name}":"{value}"}}"#);
    let cases: [(String, &[&str], i32, &str); 12] = [
        (prediction(&mrtd, &rtmr1), &[], 0, "\nok     rtmr1 "),
        // What the owner gave to measure is expected; zeros are what nobody gave.
        (owned("mrconfigid", &other), &[], 40, "\nFAILED mrconfigid "),
        (owned("mrowner", &other), &[], 40, "\nFAILED mrowner "),
        (owned("mrownerconfig", &other), &[], 40, "\nFAILED mrownerconfig "),
        (owned("mrowner", &zeros), &[], 0, "\n-      mrowner "),
        (
            owned("mrowner", "0"),
            &[],
            2,
            "measure-json: mrowner is not 96 hexadecimal digits; ",
        ),
        (
            format!(r#"{{"mrtd":"{mrtd}","rtmrs":["{rtmr0}"]}}"#),
            &[],
            2,
            "measure-json: invalid length 1, expected an array of length 4",
        ),
        (prediction(&mrtd, &other), &[], 40, "\nFAILED rtmr1 "),
        (prediction(&other, &rtmr1), &[], 40, "\nFAILED mrtd "),
        (
            prediction(&other, &rtmr1),
            &["--mrtd", &mrtd],
            0,
            "\nok     mrtd ",
        ),
        (
            prediction("5a", &rtmr1),
            &[],
            2,
            "measure-json: mrtd is not 96 hexadecimal digits; ",
        ),
        (
            r#"{"digest":"00"}"#.into(),
            &[],
            2,
            "measure-json: missing field `mrtd`",
        ),
    ];
    for (json, more, expected, says) in cases {
        let file = dir.0.join(dir.write("predicted.json", &json));
        let (code, out, err) = v4(&[&["--measure-json", file.to_str().unwrap()], more].concat());
        assert!(
            code == expected && (out.contains(says) || err.contains(says)),
            "{json}: {out}{err}"
        );
    }
}

#[test]
fn measure_writes_what_quote_reads() {
    let dir = Scratch::new("measured");
    dir.write("kernel", kernel::stand_in());
    let args = ["measure", "--platform", "tdx", "--kernel", "kernel", "--json"];
    let (code, out, err) = feed(&dir.0, &args, b"");
    assert_eq!((code, err.as_str()), (0, ""));
    dir.write("predicted.json", &out);
    let file = recorded("td10-v4.quote");
    let (code, out, err) = quote(&dir.0, &[&file, "--measure-json", "predicted.json"]);
    assert_eq!((code, err.as_str()), (40, ""));
    for name in ["mrtd", "rtmr0", "rtmr1", "rtmr2"] {
        assert!(out.contains(&format!("\nFAILED {name} ")), "{out}");
    }
    assert!(out.contains("\n-      rtmr3 "), "{out}");
}

#[test]
fn changed_quotes_and_old_collateral_are_refused() {
    let dir = Scratch::new("changed");
    let collateral = recorded("td10-v4.json");
    let raw = fs::read(recorded("td10-v4.quote")).unwrap();
    // In the body: attributes, MRTD, report data; then the signature and the enclave's report.
    for at in [48 + 120, 48 + 136, 48 + 583, 640, 800] {
        let mut bytes = raw.clone();
        bytes[at] ^= 1;
        let file = dir.write("quote", bytes);
        let args = [file.as_str(), "--collateral", &collateral, "--at", V4_TIME];
        let (code, out, err) = quote(&dir.0, &args);
        assert_eq!((code, err.as_str()), (40, ""), "{at}");
        assert!(
            out.contains("FAILED chain ") && out.ends_with("\nTHE QUOTE DOES NOT VERIFY\n"),
            "{at}: {out}"
        );
        let signed = at < 700;
        assert_eq!(out.starts_with("FAILED signature "), signed, "{at}: {out}");
    }
    // A host that lets its operator look into the guest; the change breaks the signature as well.
    let mut bytes = raw;
    bytes[48 + 120] |= 1;
    let file = dir.write("quote", bytes);
    let (_, out, _) = quote(&dir.0, &[&file]);
    assert!(
        out.contains("\nFAILED attributes    0x10000001: the host may debug it"),
        "{out}"
    );
    let (_, out, _) = quote(&dir.0, &[&file, "--allow-debug"]);
    assert!(
        out.contains("\nok     attributes    0x10000001: the host may debug it"),
        "{out}"
    );

    let args = [
        &recorded("td10-v4.quote"),
        "--collateral",
        collateral.as_str(),
        "--at",
        "1780000000",
    ];
    let (code, out, _) = quote(&dir.0, &args);
    let expired = "\nFAILED chain         a revocation list of the collateral has expired (at second 17";
    assert!(code == 40 && out.contains(expired), "{out}");
    let advice = " since 1970); fetch the collateral again, or judge by an earlier time with --at\n";
    assert!(out.contains(advice), "{out}");
    let early = ["--collateral", collateral.as_str(), "--at", "1000000000"];
    let (_, out, _) = quote(
        &dir.0,
        &[&[recorded("td10-v4.quote").as_str()][..], &early].concat(),
    );
    assert!(
        out.contains("\nFAILED chain ") && !out.contains("UnixTime"),
        "{out}"
    );
}

#[test]
fn what_is_no_quote_or_collateral_is_named() {
    let dir = Scratch::new("bad");
    let file = recorded("td10-v4.quote");
    let raw = fs::read(&file).unwrap();
    dir.write("cut", &raw[..1000]);
    dir.write("sgx", [&[3, 0, 2, 0][..], &[0; 600]].concat());
    dir.write("text", "no quote");
    let cases: [(&[&str], &str); 6] = [
        (&["none"], "cvmm: quote none: not found; check the path"),
        (&["cut"], "cvmm: quote: the quote is cut off in its signature"),
        (&["sgx"], "cvmm: quote: version 3 of the quote format; "),
        (&["text"], "cvmm: quote: the quote is cut off in its header"),
        (
            &[&file, "--collateral", "text"],
            "cvmm: collateral: not collateral (",
        ),
        (&[&file, "--accept-tcb", "Revoked"], "invalid value 'Revoked'"),
    ];
    for (args, says) in cases {
        let (code, out, err) = quote(&dir.0, args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
    }
}
