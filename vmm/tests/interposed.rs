//! The whole program, unmodified, from its command line to the guest's first instructions, on hosts with SNP and
//! TDX that are models (`tests/interpose`). An ordinary VM of this host's KVM runs what the guest runs, so without
//! /dev/kvm these tests fail.
#![expect(
    clippy::unwrap_used,
    clippy::too_many_lines,
    reason = "a test stops at the first surprise"
)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use interpose::place::{KERNEL_PORT, Place};
use interpose::{INFO, Outcome, PAGE_ACCEPT, RTMR_EXTEND, Scenario};

const CVMM: &str = env!("CARGO_BIN_EXE_cvmm");

fn place(name: &str) -> Place {
    Place::new(name).unwrap()
}

fn run(place: &Place, args: &[&str], change: impl FnOnce(&mut Scenario)) -> Outcome {
    place.run(Path::new(CVMM), args, change).unwrap()
}

/// `KVM_EXIT_X86_RDMSR`.
const EXIT_RDMSR: u32 = 29;
const SEV_STATUS: u32 = 0xc001_0131;

/// What `cvmm measure` prints for the same guest.
fn predicted(place: &Place, platform: &str) -> String {
    let kernel = place.path().join("kernel");
    let output = Command::new(CVMM)
        .args(["measure", "--platform", platform, "--cpus", "2", "--kernel"])
        .arg(kernel)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn an_snp_guest_is_launched_as_predicted_and_runs_its_first_instructions() {
    let place = place("snp");
    let outcome = run(&place, &["--platform", "snp", "--cpus", "2"], |s| {
        s.enough = |progress| !progress.exits.is_empty()
    });
    let names = [
        "INIT2",
        "SNP_LAUNCH_START",
        "SNP_LAUNCH_UPDATE",
        "SNP_LAUNCH_FINISH",
    ];
    let mut seen = outcome.command_names();
    seen.dedup();
    assert_eq!(seen, names, "{}", outcome.stderr);
    assert!(
        outcome.commands.iter().all(|(_, errno)| *errno == 0),
        "{:?}",
        outcome.commands
    );
    let digest = hex(&outcome.measurement.unwrap());
    let printed = predicted(&place, "snp");
    assert!(printed.contains(&digest), "{digest}\n{printed}");
    let first = &outcome.exits[0];
    assert_eq!(
        (first.vcpu, first.result, first.reason),
        (0, 0, EXIT_RDMSR),
        "{first:x?}"
    );
    assert_eq!(first.body[3], SEV_STATUS, "{first:x?}");
    assert!(
        (0x10_0000..0x10_c000).contains(&first.rip),
        "outside the shim: {first:x?}"
    );
    assert_eq!(first.code[..2], [0x0f, 0x32], "RDMSR");
}

#[test]
fn a_policy_that_lets_the_host_debug_the_guest_is_warned_of() {
    let place = place("debug");
    for (policy, warns) in [("0x30000", false), ("0xb0000", true)] {
        let outcome = run(&place, &["--platform", "snp", "--policy", policy], |s| {
            s.enough = |progress| !progress.exits.is_empty()
        });
        assert!(outcome.measurement.is_some(), "{}", outcome.stderr);
        let warned = outcome
            .stderr
            .contains("THE HOST MAY READ AND WRITE GUEST MEMORY");
        assert_eq!(warned, warns, "{}", outcome.stderr);
    }
}

/// A host where something is wrong, and what cvmm makes of it.
struct Case {
    name: &'static str,
    args: &'static [&'static str],
    /// A file of the host with other contents; gone if they are empty.
    file: Option<(&'static str, &'static str)>,
    change: fn(&mut Scenario),
    code: i32,
    says: &'static str,
}

const AS_IT_IS: Case = Case {
    name: "",
    args: &[],
    file: None,
    change: |_| {},
    code: 0,
    says: "",
};

/// Runs each case; every one ends in one line that says what and why, with the documented code.
fn refusals(platform: &str, cases: &[Case]) {
    for case in cases {
        let place = place(&format!("{platform}-{}", case.name.replace(' ', "-")));
        if let Some((name, content)) = case.file {
            if content.is_empty() {
                fs::remove_file(place.path().join(name)).unwrap();
            } else {
                place.file(name, content.as_bytes()).unwrap();
            }
        }
        let args = [&["--platform", platform], case.args].concat();
        let outcome = run(&place, &args, case.change);
        let told = &outcome.stderr;
        assert_eq!(outcome.code(), Some(case.code), "{}: {told}", case.name);
        assert!(told.contains(case.says), "{}: {told}", case.name);
        assert_eq!(
            (told.lines().count(), outcome.exits.len()),
            (1, 0),
            "{}: {told}",
            case.name
        );
        assert!(told.starts_with("cvmm: "), "{}: {told}", case.name);
        println!("{}: {}: {told}", case.name, case.code);
    }
}

#[test]
fn what_an_snp_host_lacks_or_refuses_is_said_in_one_line() {
    refusals(
        "snp",
        &[
            Case {
                name: "another cpu",
                file: Some(("proc/cpuinfo", "flags : fpu\n")),
                code: 20,
                says: "no SEV-SNP",
                ..AS_IT_IS
            },
            Case {
                name: "module parameter",
                file: Some(("sys/module/kvm_amd/parameters/sev_snp", "N\n")),
                code: 20,
                says: "sev_snp=1",
                ..AS_IT_IS
            },
            Case {
                name: "old kernel",
                change: |s| s.vm_types = 0xf,
                code: 20,
                says: "Linux 6.11",
                ..AS_IT_IS
            },
            Case {
                name: "no security processor",
                file: Some(("dev/sev", "")),
                code: 20,
                says: "/dev/sev",
                ..AS_IT_IS
            },
            Case {
                name: "asids used up",
                change: |s| s.snp = |m| m.kernel.asids = Some(0),
                code: 22,
                says: "INIT2",
                ..AS_IT_IS
            },
            Case {
                name: "no asids",
                change: |s| s.snp = |m| m.kernel.asids = None,
                code: 22,
                says: "INIT2",
                ..AS_IT_IS
            },
            Case {
                name: "firmware refuses",
                change: |s| s.snp = |m| m.firmware.fail_next = Some(snp::error::FirmwareStatus(7)),
                code: 22,
                says: "POLICY_FAILURE",
                ..AS_IT_IS
            },
            Case {
                name: "signals without end",
                change: |s| s.snp = |m| m.signals = u32::MAX,
                code: 22,
                says: "SNP_LAUNCH_UPDATE",
                ..AS_IT_IS
            },
            Case {
                name: "policy not offered",
                args: &["--policy", "0x1030000"],
                code: 2,
                says: "ciphertext-hiding",
                ..AS_IT_IS
            },
            Case {
                name: "feature not offered",
                args: &["--secure-tsc"],
                change: |s| s.snp = |m| m.kernel.vmsa_features = 0,
                code: 2,
                says: "secure-tsc",
                ..AS_IT_IS
            },
        ],
    );
}

#[test]
fn an_snp_launch_survives_what_passes_by() {
    let place = place("snp-passing");
    let outcome = run(&place, &["--platform", "snp"], |s| {
        s.enough = |progress| !progress.exits.is_empty();
        s.snp = |model| {
            model.signals = 1;
            let clear = [0, 0, 0, 1];
            model.firmware.cpuid.push(snp::model::CpuidRule {
                leaf: 1,
                subleaf: 0,
                clear,
            });
        };
    });
    let failed: Vec<_> = outcome.commands.iter().filter(|(_, errno)| *errno != 0).collect();
    assert_eq!(
        failed.len(),
        2,
        "a signal, and a CPUID page that firmware corrects: {failed:?}"
    );
    assert_eq!(outcome.exits.len(), 1, "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("corrects the guest's CPUID"),
        "{}",
        outcome.stderr
    );
}

/// `KVM_EXIT_IO`.
const EXIT_IO: u32 = 2;

#[test]
fn a_td_is_launched_as_predicted_and_all_its_vcpus_enter_the_shim() {
    for (cpus, all) in [("1", 1), ("4", 4)] {
        let place = place(&format!("tdx-{cpus}"));
        let outcome = run(&place, &["--platform", "tdx", "--cpus", cpus], |s| {
            // The launch is over when the first has come; the others are waited for.
            s.enough = |progress| progress.tdcalls.iter().any(|call| call.leaf == PAGE_ACCEPT);
            if all == 4 {
                // The first asks twice.
                s.enough = |progress| {
                    (0..4).all(|vcpu| {
                        progress
                            .tdcalls
                            .iter()
                            .any(|call| call.leaf == INFO && call.vcpu == vcpu)
                    })
                };
            }
        });
        let mut expected = vec!["CAPABILITIES", "INIT_VM", "GET_CPUID", "INIT_VCPU"];
        expected.extend(["INIT_MEM_REGION"; 6]);
        expected.extend(vec!["INIT_VCPU"; all - 1]);
        expected.push("FINALIZE_VM");
        assert_eq!(outcome.command_names(), expected, "{}", outcome.stderr);
        assert!(
            outcome.commands.iter().all(|(_, errno)| *errno == 0),
            "{:?}",
            outcome.commands
        );
        let mrtd = hex(&outcome.measurement.unwrap());
        let printed = predicted(&place, "tdx");
        assert!(printed.contains(&mrtd), "{mrtd}\n{printed}");
        // From the reset vector by way of 32-bit code to the shim, which asks the module who it is.
        let asked = outcome.tdcalls.iter().filter(|call| call.leaf == INFO);
        let mut came: Vec<_> = asked.map(|call| call.vcpu).collect();
        came.sort_unstable();
        came.dedup();
        assert_eq!(came, (0..all).collect::<Vec<_>>(), "{}", outcome.stderr);
    }
}

#[test]
fn a_td_reaches_its_kernel_with_one_exit_and_the_predicted_registers() {
    let place = place("tdx-kernel");
    // Where KVM emulates the shim, the interposer has to do a little of it by ioctls that cvmm's own filters forbid.
    let outcome = run(&place, &["--platform", "tdx", "--sandbox", "off"], |s| {
        s.limit = Duration::from_secs(60);
        s.enough = |progress| progress.exits.len() == 2;
    });
    let [release, kernel] = outcome.exits.as_slice() else {
        panic!("{:x?} {}", outcome.exits, outcome.stderr);
    };
    // One byte or four out of a port: direction, size, port.
    let out = |size: u32, port: u32| 1 | size << 8 | port << 16;
    assert_eq!(
        (release.reason, release.body[0]),
        (EXIT_IO, out(4, 0x604)),
        "{release:x?}"
    );
    assert_eq!(
        (kernel.reason, kernel.body[0]),
        (EXIT_IO, out(1, KERNEL_PORT.into())),
        "{kernel:x?}"
    );
    assert!((0x100_0200..0x100_0204).contains(&kernel.rip), "{kernel:x?}");
    let printed = predicted(&place, "tdx");
    let rtmrs = outcome.rtmrs.unwrap();
    for register in &rtmrs[1..3] {
        assert!(printed.contains(&hex(register)), "{}\n{printed}", hex(register));
    }
    assert_eq!((rtmrs[0], rtmrs[3]), ([0; 48], [0; 48]));
    let count = |leaf| outcome.tdcalls.iter().filter(|call| call.leaf == leaf).count();
    assert_eq!(
        (count(INFO), count(RTMR_EXTEND)),
        (2, 3),
        "the entry code asks too"
    );
}

#[test]
fn a_td_that_gives_up_says_why() {
    let place = place("tdx-fatal");
    let debugged = |model: &mut tdx::model::Model| model.module.shows = Some(1 << 28 | 1);
    let outcome = run(&place, &["--platform", "tdx"], |s| s.tdx = debugged);
    let told = &outcome.stderr;
    assert_eq!((outcome.code(), told.lines().count()), (Some(11), 1), "{told}");
    assert!(told.contains("the boot shim stopped: "), "{told}");
}

const ENTROPY: fn(&mut Scenario) = |s| s.tdx = |m| m.module.without_entropy = u32::MAX;

#[test]
fn what_a_tdx_host_lacks_or_refuses_is_said_in_one_line() {
    refusals(
        "tdx",
        &[
            Case {
                name: "another cpu",
                file: Some(("proc/cpuinfo", "flags : fpu\n")),
                change: |s| s.vm_types = 0x11,
                code: 20,
                says: "TDX",
                ..AS_IT_IS
            },
            Case {
                name: "module parameter",
                file: Some(("sys/module/kvm_intel/parameters/tdx", "N\n")),
                change: |s| s.vm_types = 0x11,
                code: 20,
                says: "tdx=1",
                ..AS_IT_IS
            },
            Case {
                name: "old kernel",
                change: |s| s.vm_types = 0x1f,
                code: 20,
                says: "TDX",
                ..AS_IT_IS
            },
            Case {
                name: "key ids used up",
                change: |s| s.tdx = |m| m.kernel.key_ids = 0,
                code: 22,
                says: "KVM_TDX_INIT_VM",
                ..AS_IT_IS
            },
            Case {
                name: "control group",
                change: |s| s.tdx = |m| m.kernel.group_full = true,
                code: 22,
                says: "KVM_TDX_INIT_VM",
                ..AS_IT_IS
            },
            Case {
                name: "operand",
                change: |s| s.tdx = |m| m.module.refuses = Some(69),
                code: 22,
                says: "CPUID_CONFIG",
                ..AS_IT_IS
            },
            Case {
                name: "no entropy",
                change: ENTROPY,
                code: 22,
                says: "KVM_TDX_INIT_VM",
                ..AS_IT_IS
            },
            Case {
                name: "seamcall fails",
                change: |s| s.tdx = |m| m.module.fails_after = Some(0),
                code: 22,
                says: "KVM_TDX_INIT_VM",
                ..AS_IT_IS
            },
            Case {
                name: "vcpu fails",
                change: |s| s.tdx = |m| m.module.fails_after = Some(1),
                code: 22,
                says: "KVM_TDX_INIT_VCPU",
                ..AS_IT_IS
            },
            Case {
                name: "page fails",
                change: |s| s.tdx = |m| m.module.fails_after = Some(2),
                code: 22,
                says: "KVM_TDX_INIT_MEM_REGION",
                ..AS_IT_IS
            },
            Case {
                name: "signals without end",
                change: |s| s.tdx = |m| m.interruptions.extend([(0, libc::EINTR); 400]),
                code: 22,
                says: "KVM_TDX_INIT_MEM_REGION",
                ..AS_IT_IS
            },
            Case {
                name: "busy without end",
                change: |s| s.tdx = |m| m.module.busy = u32::MAX,
                code: 22,
                says: "KVM_TDX_FINALIZE_VM",
                ..AS_IT_IS
            },
            Case {
                name: "cpuid unreadable",
                change: |s| s.tdx = |m| m.module.cpuid_unreadable = true,
                code: 22,
                says: "KVM_TDX_GET_CPUID",
                ..AS_IT_IS
            },
            Case {
                name: "no 1 GiB pages",
                change: |s| {
                    s.tdx = |m| {
                        for e in m.module.native.leaf_mut(0x8000_0001) {
                            e.edx &= !(1 << 26)
                        }
                    }
                },
                code: 22,
                says: "1 GiB pages",
                ..AS_IT_IS
            },
            Case {
                name: "attributes",
                args: &["--td-attributes", "0x10000001"],
                code: 22,
                says: "attributes",
                ..AS_IT_IS
            },
            Case {
                name: "too many vcpus",
                args: &["--cpus", "9"],
                code: 20,
                says: "at most --cpus 8",
                ..AS_IT_IS
            },
        ],
    );
}

#[test]
fn a_td_launch_survives_what_passes_by() {
    let place = place("tdx-passing");
    let outcome = run(&place, &["--platform", "tdx"], |s| {
        s.enough = |progress| !progress.tdcalls.is_empty();
        s.tdx = |model| {
            model.module.without_entropy = 3;
            model.module.busy = 3;
            model.interruptions.extend([
                (0, libc::EINTR),
                (1, libc::EINTR),
                (2, libc::EAGAIN),
                (0, libc::EINTR),
            ]);
        };
    });
    let failed = outcome.commands.iter().filter(|(_, errno)| *errno != 0).count();
    assert_eq!(
        (failed, outcome.tdcalls.len()),
        (10, 1),
        "{:?} {}",
        outcome.commands,
        outcome.stderr
    );
    let mrtd = hex(&outcome.measurement.unwrap());
    assert!(
        predicted(&place, "tdx").contains(&mrtd),
        "interruptions change nothing that is measured"
    );
}
