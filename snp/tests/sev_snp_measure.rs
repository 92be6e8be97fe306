//! Our arithmetic against sev-snp-measure: live when the tool is there (`SEV_SNP_MEASURE` or the path), and always
//! against the answers it gave when `recorded/sev-snp-measure.txt` was written (`CVMM_RECORD=1` with the tool
//! installed writes it anew). `CVMM_OVMF_DIR` names a directory with Debian's OVMF images to try as well.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod images;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use snp::measure::{Measurement, by_vcpus, digest, sha256};
use snp::ovmf::{Firmware, Flavour, Guest, KernelHashes};
use snp::vmsa::{CpuSignature, SevFeatures};

const KERNEL: &[u8] = b"not a kernel, but hashed like one";
const INITRD: &[u8] = b"nor an initrd";

/// A row: image, hypervisor, vCPUs, vCPU type, feature bits, and `-` or what is booted.
const CASES: &[(&str, &str, u32, &str, u64, &str)] = &[
    ("hashes", "QEMU", 1, "EPYC-v4", 0x1, "-"),
    ("hashes", "QEMU", 2, "EPYC-v4", 0x1, "-"),
    ("hashes", "QEMU", 4, "EPYC-Milan", 0x1, "-"),
    ("hashes", "QEMU", 64, "EPYC-Genoa", 0x1, "-"),
    ("hashes", "QEMU", 3, "EPYC-Turin", 0x1, "-"),
    ("hashes", "QEMU", 1, "EPYC-Rome-v2", 0x21, "-"),
    ("hashes", "QEMU", 2, "EPYC-Milan-v2", 0x221, "-"),
    ("hashes", "QEMU", 1, "EPYC-v4", 0x1, "kernel"),
    ("hashes", "QEMU", 2, "EPYC-Genoa-v1", 0x1, "kernel+initrd"),
    (
        "hashes",
        "QEMU",
        4,
        "EPYC-IBPB",
        0x21,
        "kernel+initrd+console=ttyS0 ro",
    ),
    ("hashes", "QEMU", 1, "EPYC", 0x1, "kernel+append only"),
    ("no-hashes", "QEMU", 1, "EPYC-v4", 0x1, "-"),
    ("no-hashes", "QEMU", 5, "EPYC-Milan", 0x1, "-"),
    ("cpuid-first", "QEMU", 2, "EPYC-v4", 0x1, "kernel"),
    ("hashes", "ec2", 1, "-", 0x1, "-"),
    ("hashes", "ec2", 4, "-", 0x1, "-"),
    ("cpuid-first", "ec2", 2, "-", 0x1, "-"),
    ("hashes", "gce", 1, "-", 0x1, "-"),
    ("hashes", "gce", 8, "-", 0x1, "-"),
];

/// Of Debian's images, with the package versions of unstable in November 2026.
const DEBIAN: &[(&str, &str, u32, &str, u64, &str)] = &[
    ("OVMF.amdsev.fd", "QEMU", 1, "EPYC-v4", 0x1, "-"),
    (
        "OVMF.amdsev.fd",
        "QEMU",
        4,
        "EPYC-Milan",
        0x21,
        "kernel+initrd+console=ttyS0",
    ),
    ("OVMF.amdsev.fd", "QEMU", 16, "EPYC-Genoa", 0x1, "kernel"),
    ("OVMF.amdsev.fd", "ec2", 2, "-", 0x1, "-"),
    ("OVMF.fd", "QEMU", 2, "EPYC-Turin", 0x1, "kernel+initrd"),
    ("OVMF.fd", "gce", 2, "-", 0x1, "-"),
    ("OVMF.inteltdx.ms.fd", "QEMU", 2, "EPYC-v4", 0x1, "-"),
];

type Case = (&'static str, &'static str, u32, &'static str, u64, &'static str);

fn name(case: &Case) -> String {
    format!(
        "{} {} {} {} {:#x} {}",
        case.0, case.1, case.2, case.3, case.4, case.5
    )
}

/// Kernel, initrd, command line of a row.
fn booted(what: &str) -> Option<(bool, &str)> {
    let rest = what.strip_prefix("kernel")?.trim_start_matches('+');
    Some(
        rest.strip_prefix("initrd")
            .map_or((false, rest), |rest| (true, rest.trim_start_matches('+'))),
    )
}

fn ours(case: &Case, image: &[u8]) -> Measurement {
    let (_, flavour, vcpus, cpu, features, what) = *case;
    let hashes = booted(what)
        .map(|(initrd, cmdline)| KernelHashes::of(KERNEL, if initrd { INITRD } else { &[] }, cmdline));
    let guest = Guest {
        flavour: match flavour {
            "QEMU" => Flavour::Qemu,
            "ec2" => Flavour::Ec2,
            "gce" => Flavour::Gce,
            other => panic!("no flavour {other}"),
        },
        vcpus,
        signature: if cpu == "-" {
            CpuSignature(0)
        } else {
            CpuSignature::named(cpu).unwrap()
        },
        kernel: hashes.as_ref(),
    };
    let plan = Firmware::parse(image.to_vec()).unwrap().plan(&guest).unwrap();
    let features = SevFeatures::from_bits(features);
    let whole = digest(&plan, features).unwrap();
    assert_eq!(
        by_vcpus(&plan, features).unwrap().last(),
        Some(&whole),
        "{}",
        name(case)
    );
    whole
}

fn tool() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let named = std::env::var_os("SEV_SNP_MEASURE").map(PathBuf::from);
    named
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join("sev-snp-measure")))
        .find(|p| p.exists())
}

fn theirs(tool: &Path, case: &Case, image: &Path, dir: &Path) -> Measurement {
    let (_, flavour, vcpus, cpu, features, what) = *case;
    let (vcpus, features) = (vcpus.to_string(), format!("{features:#x}"));
    let mut command = Command::new(tool);
    command.args([
        "--mode",
        "snp",
        "--vmm-type",
        flavour,
        "--vcpus",
        &vcpus,
        "--guest-features",
        &features,
    ]);
    command.arg("--ovmf").arg(image);
    if cpu != "-" {
        command.args(["--vcpu-type", cpu]);
    }
    if let Some((initrd, cmdline)) = booted(what) {
        fs::write(dir.join("kernel"), KERNEL).unwrap();
        fs::write(dir.join("initrd"), INITRD).unwrap();
        command.arg("--kernel").arg(dir.join("kernel"));
        if initrd {
            command.arg("--initrd").arg(dir.join("initrd"));
        }
        if !cmdline.is_empty() {
            command.args(["--append", cmdline]);
        }
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}: {}",
        name(case),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().parse().unwrap()
}

/// A scratch directory that goes away again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("cvmm-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn recorded(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/recorded")
        .join(file)
}

/// Compares all rows whose image `find` yields, live and with the record; returns the rows compared.
fn compare(cases: &[Case], record: &str, find: impl Fn(&str) -> Option<Vec<u8>>) -> usize {
    let tool = tool();
    let scratch = Scratch::new(record);
    let lines = fs::read_to_string(recorded(record)).unwrap_or_default();
    let mut fresh = String::new();
    let mut compared = 0;
    for case in cases {
        let Some(image) = find(case.0) else { continue };
        let key = format!("{} {}", &hex(&sha256(&image))[..16], name(case));
        let answer = ours(case, &image);
        if let Some(tool) = &tool {
            let path = scratch.0.join("image");
            fs::write(&path, &image).unwrap();
            assert_eq!(answer, theirs(tool, case, &path, &scratch.0), "live: {key}");
        }
        let known = lines
            .lines()
            .find_map(|line| line.strip_prefix(&key))
            .map(|d| d.trim().parse().unwrap());
        if std::env::var_os("CVMM_RECORD").is_some() && tool.is_some() {
            fresh += &format!("{key} {answer}\n");
        } else if let Some(known) = known {
            assert_eq!(answer, known, "recorded: {key}");
        } else {
            assert!(tool.is_some(), "no recorded answer and no tool for {key}");
        }
        compared += 1;
    }
    if !fresh.is_empty() {
        fs::write(recorded(record), fresh).unwrap();
    }
    eprintln!(
        "{compared} digests compared, {}",
        if tool.is_some() {
            "live and recorded"
        } else {
            "recorded only"
        }
    );
    compared
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn digests_of_small_images_equal_those_of_sev_snp_measure() {
    let find = |name: &str| {
        images::LAYOUTS
            .iter()
            .find(|l| l.0 == name)
            .map(|l| images::image(l.1))
    };
    assert_eq!(compare(CASES, "sev-snp-measure.txt", find), CASES.len());
}

#[test]
fn digests_of_debian_images_equal_those_of_sev_snp_measure() {
    let dir = std::env::var_os("CVMM_OVMF_DIR").map_or("/usr/share/ovmf".into(), PathBuf::from);
    let compared = compare(DEBIAN, "sev-snp-measure-debian.txt", |name| {
        fs::read(dir.join(name)).ok()
    });
    if compared < DEBIAN.len() {
        eprintln!(
            "SKIPPED {} rows: no OVMF images in {}",
            DEBIAN.len() - compared,
            dir.display()
        );
    }
}

#[test]
fn a_kernel_needs_an_image_that_can_measure_it() {
    let hashes = KernelHashes::of(KERNEL, INITRD, "");
    let image = images::image(images::LAYOUTS[1].1);
    let guest = Guest {
        flavour: Flavour::Qemu,
        vcpus: 1,
        signature: CpuSignature::new(25, 1, 1),
        kernel: Some(&hashes),
    };
    let error = Firmware::parse(image).unwrap().plan(&guest).unwrap_err();
    assert_eq!(error, snp::ovmf::PlanError::NoKernelHashes);
}
