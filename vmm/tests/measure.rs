//! `cvmm measure` as a shell meets it. `golden/` holds what each machine measures: together with the images in `shim/`
//! it is a frozen contract. If one of these files no longer matches, the change belongs into a new machine.
//! (`NEW_MACHINE=v3 cargo test -p vmm --test measure` writes those of v3, as long as nobody has used it yet.)

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "a test stops at the first surprise"
)]

#[path = "../../snp/tests/images/mod.rs"]
mod images;
mod kernel;
#[path = "../../tdx/tests/images/mod.rs"]
mod td_images;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use sha2::{Digest, Sha256, Sha384};

/// A directory with the test's kernel and initrd, which goes away again.
struct Inputs(PathBuf);

impl Inputs {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("cvmm-measure-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut kernel = kernel::stand_in();
        kernel[0x236] = 0x7f;
        kernel[0x260..0x264].copy_from_slice(&[0, 0, 0x80, 2]);
        fs::write(dir.join("kernel"), kernel).unwrap();
        let initrd: Vec<u8> = (0..5000u32).map(|i| ((i * i) >> 3) as u8).collect();
        fs::write(dir.join("initrd"), initrd).unwrap();
        Self(dir)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), content).unwrap();
    }

    /// Runs `cvmm measure` in the directory; exit code, output, error.
    fn measure(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
        command.arg("measure").args(args).current_dir(&self.0);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// The output for the test's guest with `more` flags, which must succeed.
    fn guest(&self, more: &[&str]) -> String {
        let args = [&["--kernel", "kernel", "--initrd", "initrd"], more].concat();
        let (code, out, err) = self.measure(&args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
        out
    }
}

impl Drop for Inputs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|d| std::str::from_utf8(d).unwrap());
    digits.map(|d| u8::from_str_radix(d, 16).unwrap()).collect()
}

/// Compares with a golden file.
fn same(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var("NEW_MACHINE").is_ok_and(|machine| name.starts_with(&format!("{machine}-"))) {
        fs::write(&path, found).unwrap();
    }
    let frozen = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == frozen,
        "machines are frozen, but {name} is now:\n{found}"
    );
}

const MACHINES: [&str; 2] = ["v1", "v2"];

/// Images from which guests are running somewhere. Whoever has to change a line here breaks their owners' digests.
#[test]
fn images_are_frozen() {
    for (name, sha256) in [
        (
            "v1.bin",
            "232c064a5064bce284519b0b1d1a3998cfac39bc2d89f1c64ddc56c0dfc0dcaf",
        ),
        (
            "v2.bin",
            "5ba0ed60c72996cb8a8f10d2c3f1d17c2ea5e19f13cf7666bb1aa10034998127",
        ),
        (
            "v1-reset.bin",
            "685b6bbddfae112505c51863a6e3d3c8605110dccdef2919afb8ef9db74bf8a9",
        ),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shim").join(name);
        let found = Sha256::digest(fs::read(path).unwrap());
        assert_eq!(found.to_vec(), unhex(sha256), "{name}");
    }
}

#[test]
fn machines_are_frozen() {
    let inputs = Inputs::new("golden");
    for (machine, platform) in MACHINES.into_iter().flat_map(|m| [(m, "soft"), (m, "snp")]) {
        let flags = [
            "--machine",
            machine,
            "--platform",
            platform,
            "--cmdline",
            "console=ttyS0 ro",
        ];
        let table = inputs.guest(&[&flags[..], &["--table", "4"]].concat());
        same(&format!("{machine}-{platform}-digests.txt"), &table);
        let pages = inputs.guest(&[&flags[..], &["--cpus", "2", "--explain"]].concat());
        same(&format!("{machine}-{platform}-pages.txt"), &pages);
        for (cpus, line) in (1..).zip(table.lines()) {
            let cpus = format!("{cpus}");
            let digest = inputs.guest(&[&flags[..], &["--cpus", &cpus]].concat());
            assert_eq!(format!("{cpus} {digest}"), format!("{line}\n"));
        }
        let last = pages.lines().last().unwrap();
        let second = table.lines().nth(1).unwrap().trim_start_matches("2 ");
        assert!(last.contains(second), "{last}");
    }
}

#[test]
fn machines_as_tds_are_frozen() {
    let inputs = Inputs::new("golden-td");
    let flags = ["--platform", "tdx", "--cmdline", "console=ttyS0 ro"];
    for machine in MACHINES {
        let flags = [&flags[..], &["--machine", machine]].concat();
        same(&format!("{machine}-tdx-registers.txt"), &inputs.guest(&flags));
        let steps = inputs.guest(&[&flags[..], &["--explain"]].concat());
        same(&format!("{machine}-tdx-steps.txt"), &steps);
    }
    let registers = inputs.guest(&flags);
    let steps = inputs.guest(&[&flags[..], &["--explain"]].concat());
    assert!(steps.contains(registers.split_whitespace().nth(1).unwrap()));
    let id = "ab".repeat(48);
    for more in [
        &["--cpus", "64", "--memory", "8G"][..],
        &[
            "--td-attributes",
            "0x10000000",
            "--mrconfigid",
            &id,
            "--mrowner",
            &id,
        ],
        &["--disk", "/nonexistent", "--rng"],
    ] {
        assert_eq!(inputs.guest(&[&flags[..], more].concat()), registers, "{more:?}");
    }
    let pages = steps.lines().filter(|line| line.contains(" ADD ")).count();
    assert!(pages <= 20, "{pages} pages");
    let json = inputs.guest(&[&flags[..], &["--json", "--explain", "--mrowner", &id]].concat());
    let answer: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&answer["mrowner"], &answer["mrconfigid"]),
        (&id.into(), &"00".repeat(48).into())
    );
    assert_eq!(answer["attributes"], "0x10000000");
    assert_eq!(answer["pages"], pages);
    assert_eq!(answer["extends"], 16 * pages);
    assert_eq!(answer["measured_bytes"], 4096 * pages);
    assert_eq!(answer["digest"], answer["mrtd"]);
    let values = std::iter::once(&answer["mrtd"]).chain(answer["rtmrs"].as_array().unwrap());
    for (line, value) in registers.lines().zip(values) {
        assert_eq!(line.split_whitespace().nth(1), value.as_str(), "{line}");
    }
    assert_eq!(registers.lines().count(), 5);
}

/// The registers that a TD extends follow from the listed events, and MRTD is the last step's.
#[test]
fn the_registers_of_a_td_follow_from_the_listing() {
    let inputs = Inputs::new("fold-td");
    let flags = ["--platform", "tdx"];
    let mut registers = vec![vec![0; 48]; 4];
    let mut mrtd = String::new();
    for line in inputs.guest(&["--platform", "tdx", "--explain"]).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0].strip_prefix("RTMR") {
            Some(index) => {
                let register = &mut registers[index.parse::<usize>().unwrap()];
                *register = Sha384::digest([&register[..], &unhex(words[2])].concat()).to_vec();
                assert_eq!(*register, unhex(words[3]), "{line}");
            }
            None => mrtd = words[3].into(),
        }
    }
    let text = inputs.guest(&flags);
    let mut lines = text.lines().map(|line| line.split_whitespace().nth(1).unwrap());
    assert_eq!(lines.next(), Some(mrtd.as_str()));
    let found: Vec<Vec<u8>> = lines.map(unhex).collect();
    assert_eq!(found, registers);
    assert_eq!((&found[0], &found[3]), (&vec![0; 48], &vec![0; 48]));
    let initrd = inputs.measure(&["--kernel", "kernel", "--platform", "tdx"]).1;
    assert_ne!(initrd.lines().nth(2), text.lines().nth(2));
    assert_eq!(initrd.lines().nth(3), text.lines().nth(3));
}

#[test]
fn a_td_is_compared_with_a_td() {
    let inputs = Inputs::new("diff-td");
    for (name, rest) in [
        ("a", ""),
        ("cpus", r#","cpus":4"#),
        ("quiet", ""),
        ("old", r#","machine":"v1""#),
        ("snp", r#","platform":"snp""#),
    ] {
        let cmdline = if name == "quiet" {
            r#","cmdline":"quiet""#
        } else {
            ""
        };
        let platform = if name == "snp" { "" } else { r#","platform":"tdx""# };
        let text = format!(r#"{{"boot":{{"kernel":"kernel"{cmdline}}}{platform}{rest}}}"#);
        inputs.write(&format!("{name}.json"), text);
    }
    let cases = [
        ("cpus", 0, "the launches are the same"),
        (
            "quiet",
            40,
            "the contents of \"CONFIG\" differ, first in byte 0x78 of the page at 0x10e000\n\
             \x20 cmdline: console=ttyS0\n      not: quiet",
        ),
        ("old", 40, "the contents of \"shim\" differ, first in byte "),
        ("old", 40, "\n  machine: v2\n      not: v1\n"),
        (
            "snp",
            2,
            "cvmm: diff: a TD and another guest have nothing to compare; ",
        ),
    ];
    for (other, expected, says) in cases {
        let second = format!("{other}.json");
        let (code, out, err) = inputs.measure(&["--diff", "a.json", &second]);
        assert_eq!(code, expected, "{other}: {out}{err}");
        assert!(format!("{out}{err}").contains(says), "{other}: {out}{err}");
    }
}

/// Digests by Python's hashlib, as in `tdx/tests/tdvf_images.rs`; `tests/measure` does the same for Debian's image.
#[test]
fn firmware_images_of_tds_are_measured_in_both_orders() {
    let inputs = Inputs::new("tdvf");
    inputs.write("tdvf", td_images::image(td_images::TDVF, td_images::By::Table));
    inputs.write(
        "td-shim",
        td_images::image(td_images::TD_SHIM, td_images::By::Offset),
    );
    let cases: [(&[&str], &str); 4] = [
        (
            &["tdvf"],
            "73a56e3669e2f35288a0f0f14d44416f64a4e51b7c8f1ef46da01c8003422fbee0c211a5392603aa71a4be6af800cfac",
        ),
        (
            &["tdvf", "--two-pass"],
            "d34ba6451872b449e44d1595f052b252455f8e77c719d23d0be67ae8326f20393c554ebbf85fa6daabcea9ad7458b837",
        ),
        (
            &["td-shim", "--platform", "tdx"],
            "efe83581f1a3cf1599f60b7d5540ab4713dffd7746dd68b2a266443b57857e6a2de309dc88fedb7823459c5b9fdcc0b4",
        ),
        (
            &["td-shim", "--platform", "tdx", "--two-pass"],
            "338351fc0b10f262ec7968748d7e0a471a7b4b6582bc106e7c6bd93a7fe77164a12514a993110755d5200ef3d1a10500",
        ),
    ];
    for (flags, expected) in cases {
        let args = [&["--payload", "tdvf", "--firmware"], flags].concat();
        let found = inputs.measure(&args);
        assert_eq!(
            found,
            (0, format!("MRTD  {expected}\n"), String::new()),
            "{flags:?}"
        );
    }
}

/// The listing is enough for somebody who does not trust cvmm's arithmetic.
#[test]
fn the_digest_follows_from_the_listed_pages() {
    let inputs = Inputs::new("fold");
    let mut digest = vec![0; 48];
    for line in inputs.guest(&["--cpus", "3", "--explain"]).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (gpa, words) = match words[0].strip_prefix("0x") {
            Some(gpa) => (u64::from_str_radix(gpa, 16).unwrap(), &words[1..]),
            None => (0xffff_ffff_f000, &words[2..]),
        };
        let kinds = ["", "NORMAL", "VMSA", "ZERO", "UNMEASURED", "SECRETS", "CPUID"];
        let kind = kinds.iter().position(|kind| *kind == words[0]).unwrap() as u8;
        let contents = if words[1] == "-" {
            vec![0; 48]
        } else {
            unhex(words[1])
        };
        let head = [0x70, 0, kind, 0, 0, 0, 0, 0];
        let info = [&digest[..], &contents, &head, &gpa.to_le_bytes()].concat();
        digest = Sha384::digest(&info).to_vec();
        assert_eq!(digest, unhex(words[2]), "{line}");
    }
    assert_eq!(digest, unhex(inputs.guest(&["--cpus", "3"]).trim()));
}

#[test]
fn what_no_launch_measures_changes_nothing_and_is_not_opened() {
    let inputs = Inputs::new("same");
    let plain = inputs.guest(&[]);
    assert_eq!(plain.len(), 97);
    let cases: &[&[&str]] = &[
        &["--platform", "snp"],
        &["--platform", "auto", "--cpus", "1"],
        &["--machine", "v2"],
        &["--memory", "64G"],
        &["--cmdline", "console=ttyS0"],
        &["--disk", "/nonexistent", "--net", "tap=none", "--rng"],
        &["--policy", "0x20000", "--host-data", &"ab".repeat(32)],
        &["--id-block", "/nonexistent", "--id-auth", "/nonexistent"],
        &["--certs", "/nonexistent"],
    ];
    for more in cases {
        assert_eq!(inputs.guest(more), plain, "{more:?}");
    }
    let cases: &[&[&str]] = &[
        &["--platform", "soft"],
        &["--cpus", "2"],
        &["--machine", "v1"],
        &["--cmdline", "console=ttyS0 "],
        &["--debug-swap"],
        &["--secure-tsc"],
    ];
    for more in cases {
        assert_ne!(inputs.guest(more), plain, "{more:?}");
    }
}

#[test]
fn json_says_everything_at_once() {
    let inputs = Inputs::new("json");
    let json = inputs.guest(&["--cpus", "2", "--json", "--explain", "--debug-swap"]);
    let answer: Value = serde_json::from_str(&json).unwrap();
    let table = inputs.guest(&["--table", "2", "--debug-swap"]);
    let digests: Vec<&str> = table.lines().map(|line| &line[2..]).collect();
    assert_eq!(answer["digests"], serde_json::to_value(&digests).unwrap());
    assert_eq!(answer["digest"], digests[1]);
    let steps = answer["steps"].as_array().unwrap();
    let pages = answer["pages"].as_u64().unwrap();
    assert_eq!(steps.len() as u64, pages + 2);
    assert!(pages <= 20, "{pages} pages");
    assert_eq!(steps.last().unwrap()["digest"], digests[1]);
    let expected = [
        ("schema", Value::from(1)),
        ("platform", "snp".into()),
        ("payload", "shim".into()),
        ("machine", "v2".into()),
        ("cpus", 2.into()),
        ("sev_features", "0x21".into()),
        ("policy", "0x30000".into()),
        ("host_data", "00".repeat(32).into()),
        ("cmdline", "console=ttyS0".into()),
    ];
    for (field, value) in expected {
        assert_eq!(answer[field], value, "{field}");
    }
    assert_eq!(answer["kernel"]["bytes"], 3072);
    assert_eq!(answer["initrd"]["path"], "initrd");
    let (_, found, _) = inputs.measure(&["--kernel", "kernel", "--json"]);
    let answer: Value = serde_json::from_str(&found).unwrap();
    assert!(answer["initrd"].is_null() && answer["steps"].is_null());
}

#[test]
fn a_configuration_means_what_its_flags_mean() {
    let inputs = Inputs::new("config");
    let flags = [
        "--cpus",
        "3",
        "--cmdline",
        "quiet",
        "--secure-tsc",
        "--platform",
        "snp",
    ];
    inputs.write(
        "guest.json",
        r#"{"boot":{"kernel":"kernel","initrd":"initrd","cmdline":"quiet"},"cpus":3,"platform":"snp","snp":{"secure_tsc":true}}"#,
    );
    let (code, out, err) = inputs.measure(&["--config", "guest.json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, inputs.guest(&flags));
    // A pipe can be read once.
    let program = env!("CARGO_BIN_EXE_cvmm");
    for platform in ["snp", "tdx"] {
        let config = format!(r#"{{"boot":{{"kernel":"kernel"}},"platform":"{platform}"}}"#);
        let script = format!("echo '{config}' | {program} measure --config /dev/stdin");
        let mut shell = Command::new("sh");
        let piped = shell
            .args(["-c", &script])
            .current_dir(&inputs.0)
            .output()
            .unwrap();
        let direct = inputs.measure(&["--kernel", "kernel", "--platform", platform]).1;
        assert_eq!(piped.stdout, direct.as_bytes(), "{piped:?}");
    }
}

#[test]
fn a_difference_is_named() {
    let inputs = Inputs::new("diff");
    let file = |name: &str, boot: &str, rest: &str| {
        inputs.write(
            &format!("{name}.json"),
            format!(r#"{{"boot":{{"kernel":"kernel"{boot}}}{rest}}}"#),
        );
    };
    file("a", "", "");
    file("memory", "", r#","memory":"4G""#);
    file("cmdline", r#","cmdline":"quiet""#, "");
    file("initrd", r#","initrd":"initrd""#, "");
    file("swap", "", r#","snp":{"debug_swap":true}"#);
    file("cpus", "", r#","cpus":4"#);
    file("soft", "", r#","platform":"soft""#);
    file("old", "", r#","machine":"v1""#);
    let cases = [
        ("memory", 0, "the launches are the same"),
        (
            "cmdline",
            40,
            "the contents of \"CONFIG\" differ, first in byte 0x78 of the page at 0x10e000\n\
             \x20 cmdline: console=ttyS0\n      not: quiet",
        ),
        (
            "initrd",
            40,
            "the contents of \"CONFIG\" differ, first in byte 0x50 of the page at 0x10e000\n\
             \x20 initrd: none\n     not: 5000 bytes, SHA-256 ",
        ),
        (
            "swap",
            40,
            "the registers of vCPU 0 differ: sev_features: 0x1 and 0x21",
        ),
        ("cpus", 40, "the first plan has 1 vCPUs, the second 4"),
        ("old", 40, "the contents of \"shim\" differ, first in byte "),
        (
            "soft",
            40,
            "the contents of \"boot page tables\" differ, first in byte ",
        ),
    ];
    for (other, expected, says) in cases {
        let second = format!("{other}.json");
        let (code, out, err) = inputs.measure(&["--diff", "a.json", &second]);
        assert_eq!((code, err.as_str()), (expected, ""), "{other}: {out}");
        let words = out.splitn(3, '\n').last().unwrap();
        assert!(words.starts_with(says), "{other}: {words}");
    }
}

/// Digests that sev-snp-measure gave for the same images (`snp/tests/recorded`).
#[test]
fn firmware_digests_equal_those_of_sev_snp_measure() {
    let inputs = Inputs::new("ovmf");
    inputs.write("k", "not a kernel, but hashed like one");
    inputs.write("i", "nor an initrd");
    for (name, sections) in images::LAYOUTS {
        inputs.write(name, images::image(sections));
    }
    let recorded = include_str!("../../snp/tests/recorded/sev-snp-measure.txt");
    let boot: &[&str] = &["--kernel", "k", "--initrd", "i", "--cmdline", "console=ttyS0 ro"];
    let cases: [(&str, &[&str], &[&str]); 5] = [
        ("hashes QEMU 1 EPYC-v4 0x1 - ", &["hashes"], &[]),
        (
            "hashes QEMU 4 EPYC-IBPB 0x21 kernel+initrd+console=ttyS0 ro ",
            &[
                "hashes",
                "--cpus",
                "4",
                "--vcpu-type",
                "EPYC-IBPB",
                "--debug-swap",
            ],
            boot,
        ),
        (
            "hashes QEMU 64 EPYC-Genoa 0x1 - ",
            &["hashes", "--cpus", "64", "--vcpu-type", "EPYC-Genoa"],
            &[],
        ),
        (
            "hashes QEMU 2 EPYC-Milan-v2 0x221 - ",
            &[
                "hashes",
                "--cpus",
                "2",
                "--vcpu-type",
                "EPYC-Milan-v2",
                "--guest-features",
                "0x221",
            ],
            &[],
        ),
        (
            "cpuid-first QEMU 2 EPYC-v4 0x1 kernel ",
            &["cpuid-first", "--cpus", "2"],
            &["--kernel", "k"],
        ),
    ];
    for (row, flags, boot) in cases {
        let line = recorded.lines().find_map(|line| line.split_once(row));
        let expected = line.unwrap_or_else(|| unreachable!("no record of {row}")).1;
        let args = [&["--payload", "ovmf", "--firmware"], flags, boot].concat();
        assert_eq!(
            inputs.measure(&args),
            (0, format!("{expected}\n"), String::new()),
            "{args:?}"
        );
    }
}

#[test]
fn mistakes_are_named_with_a_remedy() {
    let inputs = Inputs::new("mistakes");
    inputs.write("text", "just text, no kernel and no firmware");
    let ovmf = |more: &[&'static str]| [&["--payload", "ovmf", "--firmware"], more].concat();
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "cvmm: no kernel given; add --kernel PATH"),
        (vec!["--kernel", "text"], "cvmm: kernel text: not a bzImage"),
        (
            vec!["--kernel", "kernel", "--initrd", "none"],
            "cvmm: initrd none: not found; check the path",
        ),
        (
            vec!["--kernel", "kernel", "--table", "0"],
            "'--table <N>': 0 is not in 1..=256",
        ),
        (
            vec!["--kernel", "kernel", "--platform", "tdx", "--table", "4"],
            "cvmm: --table: MRTD does not depend on the number of virtual CPUs; leave it out",
        ),
        (
            vec!["--kernel", "kernel", "--platform", "tdx", "--policy", "0x30000"],
            "cvmm: --policy: only an SNP guest has it; ",
        ),
        (
            vec![
                "--kernel",
                "kernel",
                "--platform",
                "snp",
                "--td-attributes",
                "0x10000000",
            ],
            "cvmm: --td-attributes: only a TDX guest has it; ",
        ),
        (
            vec!["--kernel", "kernel", "--platform", "snp", "--two-pass"],
            "cvmm: --two-pass: only a TD has two possible orders; give --platform tdx",
        ),
        (
            vec!["--platform", "tdx", "--firmware", "text", "--payload", "ovmf"],
            "cvmm: payload ovmf: that is an image as SNP launches it; give --payload tdvf",
        ),
        (
            vec!["--platform", "snp", "--firmware", "text", "--payload", "tdvf"],
            "cvmm: payload tdvf: such an image is a TD's; give --platform tdx",
        ),
        (
            vec![
                "--payload",
                "tdvf",
                "--firmware",
                "text",
                "--vcpu-type",
                "EPYC-v4",
            ],
            "cvmm: --vcpu-type: registers have no part in MRTD; leave it out",
        ),
        (
            vec!["--payload", "tdvf", "--firmware", "text", "--kernel", "kernel"],
            "cvmm: kernel: no part of a TDVF image's MRTD",
        ),
        (
            vec!["--payload", "tdvf", "--firmware", "text"],
            "cvmm: firmware text: a firmware image is 4 KiB to 64 MiB",
        ),
        (vec!["--payload", "tdvf"], "--firmware <PATH>"),
        (
            vec!["--kernel", "kernel", "--platform", "soft", "--debug-swap"],
            "cvmm: --debug-swap: only an SNP guest has it; ",
        ),
        (
            vec!["--kernel", "kernel", "--policy", "0x1"],
            "cvmm: policy: 0x1 is not a guest policy: ",
        ),
        (
            ovmf(&["text"]),
            "cvmm: firmware text: a firmware image is 4 KiB to 64 MiB",
        ),
        (
            ovmf(&["text", "--cmdline", "quiet"]),
            "cvmm: cmdline: without a kernel no launch of a firmware image measures it; add --kernel PATH",
        ),
        (
            ovmf(&["text", "--initrd", "initrd"]),
            "cvmm: initrd: without a kernel no launch of a firmware image measures it; add --kernel PATH",
        ),
        (
            ovmf(&["text", "--vcpu-type", "Opteron"]),
            "cvmm: vcpu-type Opteron: unknown; give EPYC-v4",
        ),
        (
            ovmf(&["text", "--guest-features", "0x1", "--debug-swap"]),
            "'--guest-features <HEX>' cannot be used with '--debug-swap'",
        ),
        (vec!["--payload", "ovmf"], "--firmware <PATH>"),
        (
            ovmf(&["text", "--platform", "soft"]),
            "cvmm: platform soft: a firmware image is measured by SNP alone",
        ),
        (
            vec!["--payload", "shim", "--firmware", "text"],
            "cvmm: firmware: cvmm's shim needs none; ",
        ),
        (
            vec!["--kernel", "kernel", "--vcpu-type", "EPYC-v4"],
            "--firmware <PATH>",
        ),
        (vec!["--diff", "none", "none"], "cvmm: config none: "),
    ];
    for (args, says) in cases {
        let (code, out, err) = inputs.measure(&args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
    }
}

/// `run` says before the guest's first instruction what `measure` said without a host.
#[test]
fn a_run_announces_the_digest_that_was_predicted() {
    let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(e) = kvm {
        println!("SKIPPED: /dev/kvm: {e}");
        return;
    }
    let inputs = Inputs::new("event");
    let flags = [
        "--platform",
        "soft",
        "--cpus",
        "2",
        "--initrd",
        "initrd",
        "--kernel",
        "kernel",
    ];
    let (code, predicted, err) = inputs.measure(&flags);
    assert_eq!(code, 0, "{err}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
    command
        .arg("run")
        .args(flags)
        .args(["--events", "fd:1", "--console", "none", "--no-reboot"]);
    command
        .current_dir(&inputs.0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut run = command.spawn().unwrap();
    let mut events = BufReader::new(run.stdout.take().unwrap()).lines();
    let mut seen = Vec::new();
    // The kernel is none, so the guest ends by itself soon.
    let measured = events.by_ref().map_while(Result::ok).find_map(|line| {
        let event: Value = serde_json::from_str(&line).unwrap();
        seen.push(event["event"].to_string());
        (event["event"] == "measured").then_some(event)
    });
    run.kill().unwrap();
    let output = run.wait_with_output().unwrap();
    let Some(event) = measured else {
        let err = String::from_utf8(output.stderr).unwrap();
        unreachable!("no digest after {seen:?}: {err}");
    };
    assert_eq!(event["digest"], predicted.trim());
    assert_eq!(event["protected"], false);
    assert_eq!(seen, ["\"started\"", "\"sandbox\"", "\"measured\""]);
}
