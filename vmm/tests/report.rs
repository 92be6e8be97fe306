//! `cvmm report` and `cvmm id-block` as a shell meets them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

#[path = "../../snp/tests/forge/mod.rs"]
mod forge;
mod kernel;
mod shell;

use std::fs;
use std::path::Path;

use forge::{Cert, Key};
use serde_json::Value;
use shell::Scratch;
use snp::certs::{CertKind, CertTable};

/// In 2026; the real certificates are valid then.
const NOW: &str = "1790000000";

fn recorded(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../snp/tests/recorded");
    path.join(name).to_str().unwrap().to_owned()
}

impl Scratch {
    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.join(name)).unwrap()
    }

    fn feed(&self, args: &[&str], input: &[u8]) -> (i32, String, String) {
        shell::feed(&self.0, args, input)
    }

    fn cvmm(&self, args: &[&str]) -> (i32, String, String) {
        self.feed(args, b"")
    }
}

const MILAN: &str = "\
ok     certificates signed up to the root, all valid
-      revocation   whether one was revoked takes --crl (not compared)
ok     signature    ECDSA P-384 with SHA-384
ok     chip         the VCEK of chip ";

#[test]
fn a_real_report_of_a_milan_chip_verifies_in_every_form() {
    let dir = Scratch::new("milan");
    let (file, vcek) = (recorded("report/milan.bin"), recorded("report/vcek-milan.der"));
    let args = ["report", &file, "--vcek", &vcek, "--at", NOW];
    let (code, out, err) = dir.cvmm(&args);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with(MILAN), "{out}");
    assert!(
        out.contains("\nok     tcb          boot loader 3, tee 0, snp 8, microcode 115\n"),
        "{out}"
    );
    assert!(out.contains("\n-      measurement  7a1e5c266c0108db"), "{out}");
    assert!(
        out.contains("\nthe report verifies, but it may be of any guest; "),
        "{out}"
    );
    let raw = fs::read(&file).unwrap();
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    for input in [raw.as_slice(), hex.as_bytes()] {
        let args = ["report", "-", "--vcek", &vcek, "--at", NOW];
        assert_eq!(dir.feed(&args, input), (0, out.clone(), String::new()));
    }
}

/// A machine with a root of its own, as the emulated host is one.
struct Forged {
    dir: Scratch,
    vcek: Key,
    report: Vec<u8>,
}

impl Forged {
    fn new(name: &str) -> Self {
        let dir = Scratch::new(name);
        let (ark, ask, vcek) = (Key::new(), Key::new(), Key::new());
        let cert = |subject, issuer, key, signer, extensions| {
            let validity = ["200101000000Z", "450101000000Z"];
            Cert {
                subject,
                issuer,
                key,
                signer,
                validity,
                extensions,
            }
            .der()
        };
        let root = cert("ARK", "ARK", &ark, &ark, forge::authority());
        let mut table = CertTable::default();
        let ask_der = cert("ASK", "ARK", &ask, &ark, forge::authority());
        let vcek_der = cert(
            "VCEK",
            "ASK",
            &vcek,
            &ask,
            forge::vcek([4, 0, 24, 219], None, &[0x5c; 64]),
        );
        let levels = forge::vcek([4, 0, 24, 219], None, &[0x5c; 64]);
        let vlek_der = cert("VLEK", "ASK", &vcek, &ask, [levels, forge::provider()].concat());
        let certs = [
            (CertKind::Ark, &root),
            (CertKind::Ask, &ask_der),
            (CertKind::Vcek, &vcek_der),
            (CertKind::Vlek, &vlek_der),
        ];
        for (kind, der) in certs {
            table.add(kind, der).unwrap();
        }
        dir.write("certs", table.to_bytes());
        dir.write("ark", root);
        let now = ["260101000000Z", "270101000000Z"];
        dir.write("none-revoked", forge::revocation_list("ARK", &ark, &now, &[7]));
        dir.write("all-revoked", forge::revocation_list("ARK", &ark, &now, &[1]));
        let mut report = vec![0; 1184];
        report[0] = 3;
        report[4] = 7;
        report[8..16].copy_from_slice(&0x30000_u64.to_le_bytes());
        report[0x34] = 1;
        for tcb in [0x38, 0x180, 0x1e0, 0x1f0] {
            report[tcb..tcb + 8].copy_from_slice(&[4, 0, 0, 0, 0, 0, 24, 219]);
        }
        report[0x50..0x54].fill(0x11);
        report[0x90..0xc0].fill(0x22);
        report[0xc0..0xe0].fill(0x33);
        report[0xe0..0x110].fill(0x44);
        report[0x110..0x140].fill(0x55);
        report[0x188..0x18b].copy_from_slice(&[0x19, 1, 1]);
        report[0x1a0..0x1e0].fill(0x5c);
        let forged = Self { dir, vcek, report };
        forged.sign(|_| {});
        forged
    }

    /// Writes the report with a change that the key signs too.
    fn sign(&self, change: impl FnOnce(&mut [u8])) {
        let mut report = self.report.clone();
        change(&mut report);
        forge::sign_report(&mut report, &self.vcek);
        self.dir.write("report", report);
    }

    fn verify(&self, more: &[&str]) -> (i32, String, String) {
        let args = [
            "report", "report", "--certs", "certs", "--root", "ark", "--at", NOW,
        ];
        self.dir.cvmm(&[&args, more].concat())
    }
}

fn wishes() -> Vec<String> {
    let pairs = [
        ("--measurement", "21".repeat(48)),
        ("--measurement", "22".repeat(48)),
        ("--host-data", "33".repeat(32)),
        ("--nonce", "11111111".into()),
        ("--id-key-digest", "44".repeat(48)),
        ("--author-key-digest", "55".repeat(48)),
        ("--min-svn", "7".into()),
        ("--policy", "0x30000".into()),
        ("--min-tcb", "boot-loader=4,snp=24,microcode=200".into()),
    ];
    pairs
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
}

#[test]
fn each_check_has_its_line_and_one_failure_fails_the_report() {
    type Change = fn(&mut [u8]);
    let cases: &[(Change, &str)] = &[
        (|r| r[0x90] ^= 1, "FAILED measurement  the launch digest 23"),
        (
            |r| r[0xc0] ^= 1,
            "FAILED host-data    HOST_DATA is not the expected one",
        ),
        (
            |r| r[0x50] ^= 1,
            "FAILED report-data  REPORT_DATA is not the expected nonce",
        ),
        (|r| r[0xe0] ^= 1, "FAILED id-key       "),
        (|r| r[0x110] ^= 1, "FAILED author-key   "),
        (
            |r| r[4] = 6,
            "FAILED guest-svn    the guest's security version is 6, expected at least 7",
        ),
        (
            |r| r[10] |= 8,
            "FAILED policy       the policy lets the host read and write",
        ),
        (
            |r| r[10] |= 4,
            "FAILED policy       the policy is weaker than expected in \"migration-agent\"",
        ),
        (
            |r| r[0x1f6] = 23,
            "FAILED tcb          the guest was launched on TCB (boot loader 4, tee 0, snp 23",
        ),
        (
            |r| r[0x30] = 1,
            "FAILED vmpl         the report was requested at VMPL 1",
        ),
        (
            |r| r[0x1a0] ^= 1,
            "FAILED chip         the VCEK certificate is another chip's",
        ),
        (
            |r| r[0x180] = 3,
            "FAILED tcb          the certificate is for TCB (boot loader 4",
        ),
        (|r| r[0x34] = 2, "FAILED signature    signature algorithm 2"),
    ];
    let forged = Forged::new("checks");
    let wishes = wishes();
    let wishes: Vec<&str> = wishes.iter().map(String::as_str).collect();
    let (code, out, err) = forged.verify(&wishes);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.ends_with("\nthe report verifies\n"), "{out}");
    assert_eq!(
        out.lines().filter(|line| line.starts_with("ok ")).count(),
        12,
        "{out}"
    );
    for (change, says) in cases {
        forged.sign(*change);
        let (code, out, err) = forged.verify(&wishes);
        assert_eq!((code, err.as_str()), (40, ""), "{says}: {out}");
        let failed: Vec<&str> = out.lines().filter(|line| line.starts_with("FAILED")).collect();
        assert!(failed.len() == 1 && failed[0].starts_with(says), "{says}: {out}");
        assert!(out.ends_with("\nTHE REPORT DOES NOT VERIFY\n"), "{out}");
    }
}

#[test]
fn a_revoked_key_is_known_by_the_roots_list() {
    let forged = Forged::new("crl");
    let cases = [
        (
            &[][..],
            0,
            "\n-      revocation   whether one was revoked takes --crl (not compared)\n",
        ),
        (
            &["--crl", "none-revoked"],
            0,
            "\nok     revocation   none of them is on the root's list\n",
        ),
        (
            &["--crl", "all-revoked"],
            40,
            "the ASK certificate is revoked; trust no key below it\n",
        ),
    ];
    for (more, expected, says) in cases {
        let (code, out, err) = forged.verify(more);
        assert_eq!((code, err.as_str()), (expected, ""), "{out}");
        assert!(out.contains(says), "{out}");
    }
    let (code, _, err) = forged.verify(&["--crl", "certs"]);
    assert_eq!(code, 2);
    assert!(err.contains("the revocation list is not X.509"), "{err}");
}

#[test]
fn flipped_bytes_and_other_roots_are_refused() {
    let forged = Forged::new("flips");
    let report = forged.dir.read("report");
    for at in (0..1184).step_by(37) {
        let mut bytes = report.clone();
        bytes[at] ^= 0x10;
        forged.dir.write("report", &bytes);
        let (code, out, err) = forged.verify(&[]);
        // A version that nobody knows is no report.
        let expected = if at == 0 { 2 } else { 40 };
        assert_eq!(code, expected, "byte {at:#x}: {out}{err}");
    }
    forged.dir.write("report", &report);
    // The table's own root must not make itself trusted.
    let args = ["report", "report", "--certs", "certs", "--at", NOW];
    let (code, out, err) = forged.dir.cvmm(&args);
    assert_eq!((code, out.as_str()), (40, ""));
    assert!(
        err.starts_with("cvmm: certificates: the certificates lead to no pinned root; "),
        "{err}"
    );
    let (code, out, _) = forged.verify(&["--at", "0"]);
    assert!(code == 2 && out.is_empty(), "--at twice");
    let args = [
        "report", "report", "--certs", "certs", "--root", "ark", "--at", "0",
    ];
    let (code, out, _) = forged.dir.cvmm(&args);
    assert_eq!(code, 40);
    assert!(
        out.starts_with("FAILED certificates the ARK certificate is not valid yet; "),
        "{out}"
    );
}

#[test]
fn a_report_finds_the_certificate_of_its_key_in_the_table() {
    let forged = Forged::new("vlek");
    let (code, out, err) = forged.verify(&[]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("the VCEK of chip 5c5c"), "{out}");
    forged.sign(|r| r[0x48] = 1 << 2);
    let (code, out, err) = forged.verify(&[]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("\nok     chip         a VLEK\n"), "{out}");
}

#[test]
fn json_names_the_checks_and_the_fields() {
    let forged = Forged::new("json");
    let (code, out, _) = forged.verify(&["--json", "--host-data", &"32".repeat(32)]);
    assert_eq!(code, 40);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&answer["schema"], &answer["verified"]),
        (&1.into(), &false.into())
    );
    let status = |name: &str| {
        let checks = answer["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == name).unwrap()["status"].clone()
    };
    assert_eq!(
        ["signature", "host-data", "measurement"].map(status),
        ["ok", "failed", "not_compared"]
    );
    assert_eq!(answer["report"]["measurement"], "22".repeat(48));
    assert_eq!(answer["report"]["guest_svn"], 7);
}

#[test]
fn what_is_no_report_or_certificate_is_named() {
    let forged = Forged::new("bad");
    forged.dir.write("short", [0; 1183]);
    forged.dir.write("cut", &forged.dir.read("certs")[..100]);
    let vcek = recorded("report/vcek-milan.der");
    let cases: [(&[&str], &str); 10] = [
        (
            &["report", "--certs", "certs", "--min-svn", "7"],
            "cvmm: min-svn: anybody can make an ID block with any security version; give --id-key-digest",
        ),
        // As the host's own request states it.
        (
            &["report", "--certs", "certs", "--vmpl", "4294967295"],
            "4294967295 is not in 0..=3",
        ),
        (
            &["none", "--certs", "certs"],
            "cvmm: report none: not found; check the path",
        ),
        (
            &["short", "--certs", "certs"],
            "cvmm: report: a report has 1184 bytes, this has 1183; ",
        ),
        (
            &["report", "--certs", "cut"],
            "cvmm: certs: the certificate table is cut off",
        ),
        (
            &["report", "--vcek", "short"],
            "cvmm: certificates: the VCEK or VLEK certificate is not X.509",
        ),
        (
            &["report", "--vcek", &vcek, "--ark", "short"],
            "the ARK certificate is not X.509",
        ),
        (&["report"], "--certs <PATH>"),
        (
            &["report", "--certs", "certs", "--policy", "0"],
            "cvmm: policy: 0x0 is not a guest policy",
        ),
        (
            &["report", "--certs", "certs", "--min-tcb", "x=1"],
            "not patch levels; write for example",
        ),
    ];
    for (args, says) in cases {
        let (code, out, err) = forged.dir.cvmm(&[&["report"], args].concat());
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
    }
}

#[test]
fn an_id_block_that_cannot_be_written_leaves_no_half() {
    let dir = Scratch::new("half");
    let key = recorded("id-block/id-key.pem");
    let digest = "2a".repeat(48);
    let cases = [
        (
            "block",
            "block",
            2,
            "cvmm: id-auth block: the same file as --id-block",
        ),
        ("block", &key, 2, "the same file as --id-key"),
        ("block", "/nonexistent/auth", 2, "cvmm: /nonexistent/auth: "),
        ("block", "/dev/full", 30, "cvmm: writing /dev/full: "),
        ("/dev/full", "block", 30, "cvmm: writing /dev/full: "),
    ];
    for (block, auth, expected, says) in cases {
        let words = ["--digest", &digest, "--id-key", &key];
        let places = ["--id-block", block, "--id-auth", auth];
        let (code, out, err) = dir.cvmm(&[&["id-block"], &words[..], &places].concat());
        assert_eq!((code, out.as_str()), (expected, ""), "{err}");
        assert!(err.contains(says), "{err}");
        assert!(fs::metadata(&key).unwrap().len() > 96, "the key is there");
        assert!(!dir.0.join("block").exists() && Path::new("/dev/full").exists());
    }
}

#[test]
fn an_id_block_equals_that_of_snp_create_id_block() {
    let dir = Scratch::new("id");
    let (key, author) = (
        recorded("id-block/id-key.pem"),
        recorded("id-block/author-key.pem"),
    );
    let digest = "2a".repeat(48);
    let args = [
        "id-block",
        "--digest",
        &digest,
        "--id-key",
        &key,
        "--author-key",
        &author,
        "--id-block",
        "block",
        "--id-auth",
        "auth",
    ];
    let (code, out, err) = dir.cvmm(&args);
    assert_eq!((code, err.as_str()), (0, ""));
    let digests = fs::read_to_string(recorded("id-block/digests.txt")).unwrap();
    let digests: Vec<&str> = digests.lines().collect();
    let expected = format!(
        "measurement       {digest}\npolicy            0x30000: runs on hosts with SMT\nid-key-digest     {}\nauthor-key-digest {}\n",
        digests[0], digests[1]
    );
    assert_eq!(out, expected);
    assert_eq!(
        dir.read("block"),
        fs::read(recorded("id-block/block.bin")).unwrap()
    );
    let theirs = fs::read(recorded("id-block/auth.bin")).unwrap();
    let ours = dir.read("auth");
    let signatures = [0x40..0x40 + 144, 0x680..0x680 + 144];
    for at in (0..4096).filter(|at| !signatures.iter().any(|s| s.contains(at))) {
        assert_eq!(ours[at], theirs[at], "byte {at:#x}");
    }
    let fields = [
        "--svn",
        "9",
        "--family-id",
        "0102",
        "--image-id",
        "ff",
        "--policy",
        "0x20000",
    ];
    let (code, _, err) = dir.cvmm(&[&args[..], &fields].concat());
    assert_eq!((code, err.as_str()), (0, ""));
    let block = dir.read("block");
    assert_eq!(block[0x30..0x33], [1, 2, 0]);
    assert_eq!(block[0x40..0x42], [0xff, 0]);
    assert_eq!(block[0x50..], [1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]);
}

#[test]
fn an_id_block_is_made_for_the_guest_of_a_configuration() {
    let dir = Scratch::new("id-config");
    dir.write("kernel", kernel::stand_in());
    dir.write(
        "guest.json",
        r#"{"boot":{"kernel":"kernel"},"cpus":2,"snp":{"id_block":"block","id_auth":"auth"}}"#,
    );
    let key = recorded("id-block/id-key.pem");
    let (code, out, err) = dir.cvmm(&["id-block", "--config", "guest.json", "--id-key", &key]);
    assert_eq!((code, err.as_str()), (0, ""));
    let (_, digest, _) = dir.cvmm(&["measure", "--config", "guest.json"]);
    assert_eq!(
        out.lines().next().unwrap(),
        format!("measurement       {}", digest.trim())
    );
    assert!(!out.contains("author"), "{out}");
    assert_eq!((dir.read("block").len(), dir.read("auth").len()), (96, 4096));

    let p256 = recorded("keys/p256.pem");
    let cases: [(&[&str], &str); 4] = [
        (
            &["--kernel", "kernel", "--id-key", &key],
            "cvmm: no place for the result; add --id-block PATH",
        ),
        (
            &["--config", "guest.json", "--id-key", &p256],
            "not a P-384 key; make one with: openssl genpkey",
        ),
        (
            &["--config", "guest.json", "--id-key", "kernel"],
            "cvmm: id-key kernel: not a private key",
        ),
        (&["--config", "guest.json"], "--id-key <PATH>"),
    ];
    for (args, says) in cases {
        let (code, out, err) = dir.cvmm(&[&["id-block"], args].concat());
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
    }
}
