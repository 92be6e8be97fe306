//! AMD SEV-SNP, piece by piece.

use std::arch::x86_64::__cpuid;
use std::fs::File;
use std::path::Path;

use arch::kvm::system::{Capabilities, Host};
use snp::host::{Offered, PlatformStatus, VM_TYPE};

use super::checks::owner;
use super::report::{Check, SNP, Status, up_to_the_first_lack};
use super::system;

const DEVICE: &str = "/dev/sev";
/// AMD64 APM volume 3, "Function 8000_001Fh — Encrypted Memory Capabilities".
const LEAF: u32 = 0x8000_001f;
const SNP_BIT: u32 = 1 << 4;

pub(super) fn checks(host: &Host, has: &Capabilities, cpuinfo: &str) -> Vec<Check> {
    let leaf = if __cpuid(0x8000_0000).eax >= LEAF {
        Some(__cpuid(LEAF))
    } else {
        None
    };
    let in_cpu = leaf.is_some_and(|leaf| leaf.eax & SNP_BIT != 0);
    let parameter = |name| system::read(&format!("/sys/module/kvm_amd/parameters/{name}"));
    let parameters = ["sev", "sev_es", "sev_snp"].map(parameter);
    let offered = u64::from(has.vm_types) >> VM_TYPE & 1 != 0;
    let mut checks = up_to_the_first_lack([
        cpu(in_cpu, system::has_flag(cpuinfo, "sev_snp")),
        kvm_amd(parameters),
        vm_type(offered),
    ]);
    if checks.iter().all(|check| check.status == Status::Ok) {
        let capacity = system::read("/sys/fs/cgroup/misc.capacity");
        checks.push(features(Offered::ask(host)));
        checks.push(asids(leaf.map_or((0, 0), |leaf| (leaf.ecx, leaf.edx)), &capacity));
        checks.extend(device());
    }
    checks
}

fn cpu(in_cpu: bool, in_kernel: bool) -> Check {
    match (in_cpu, in_kernel) {
        (_, true) => Check::ok("snp.cpu", "CPU and kernel have SEV-SNP"),
        (true, false) => Check::missing(
            "snp.cpu",
            SNP,
            "the CPU has SEV-SNP, but the kernel has switched it off",
            "enable SMEE, SEV-SNP and the RMP table in the firmware, keep the IOMMU on (no iommu=pt), remove \
             mem_encrypt=off, and look for SEV-SNP in `dmesg`",
        ),
        (false, false) => Check::missing(
            "snp.cpu",
            SNP,
            "this CPU shows no SEV-SNP (CPUID 0x8000001f)",
            "take an AMD EPYC 7003 or later; if this is one, enable SEV-SNP in the firmware",
        ),
    }
}

fn kvm_amd(parameters: [String; 3]) -> Check {
    let [sev, sev_es, sev_snp] = parameters;
    let found = format!(
        "sev={} sev_es={} sev_snp={}",
        sev.trim(),
        sev_es.trim(),
        sev_snp.trim()
    );
    match sev_snp.trim() {
        "Y" | "1" => Check::ok("snp.kvm-amd", found),
        "" => Check::missing(
            "snp.kvm-amd",
            SNP,
            "kvm_amd is not loaded, or has no SNP",
            "modprobe kvm_amd",
        ),
        _ => Check::missing(
            "snp.kvm-amd",
            SNP,
            found,
            "load it with `modprobe kvm_amd sev=1 sev_es=1 sev_snp=1`; if SNP stays off, `dmesg | grep -i -e sev -e rmp`",
        ),
    }
}

fn vm_type(offered: bool) -> Check {
    if offered {
        Check::ok("snp.vm-type", "KVM creates SNP guests")
    } else {
        Check::missing(
            "snp.vm-type",
            SNP,
            "KVM creates no SNP guests",
            "it takes Linux 6.11 or later with CONFIG_KVM_AMD_SEV=y",
        )
    }
}

fn features(offered: Offered) -> Check {
    let certificates = if offered.certificates { "yes" } else { "no" };
    let found = format!(
        "VMSA features {:#x}, policy bits {:#x}, certificates {certificates}",
        offered.features, offered.policy
    );
    Check::ok("snp.offers", found)
}

/// `first_sev` is the lowest ASID of a plain SEV guest; those below it are for SEV-ES and SNP.
fn asids((total, first_sev): (u32, u32), misc_capacity: &str) -> Check {
    let for_snp = first_sev.saturating_sub(1).min(total);
    let limit = misc_capacity
        .lines()
        .find_map(|line| line.strip_prefix("sev_es "));
    let found = format!(
        "{for_snp} of {total} key ids are for SNP{}",
        limit.map_or_else(String::new, |n| format!(
            "; the misc controller counts {}",
            n.trim()
        ))
    );
    if for_snp == 0 {
        Check::missing(
            "snp.asids",
            SNP,
            found,
            "raise \"SEV-ES ASID space limit\" (minimum SEV non-ES ASID) in the firmware",
        )
    } else {
        Check::ok("snp.asids", found)
    }
}

fn device() -> Vec<Check> {
    let opened = File::options().read(true).write(true).open(DEVICE);
    let sev = match opened {
        Ok(sev) => sev,
        Err(e) if Path::new(DEVICE).exists() => {
            let found = format!("{DEVICE}: {e} ({})", owner(Path::new(DEVICE)));
            let remedy = "add this user to the device's group, or change its mode by a udev rule";
            return vec![Check::missing("snp.device", SNP, found, remedy)];
        }
        Err(_) => {
            let found = format!("{DEVICE} does not exist");
            let remedy = "load the module ccp and enable the security processor in the firmware";
            return vec![Check::missing("snp.device", SNP, found, remedy)];
        }
    };
    let firmware = match PlatformStatus::ask(&sev) {
        Err(e) => Check::missing(
            "snp.firmware",
            SNP,
            e.to_string(),
            "update the SEV firmware (amd_sev_*.sbin)",
        ),
        Ok(status) => firmware(&status),
    };
    vec![
        Check::ok("snp.device", format!("{DEVICE} can be opened")),
        firmware,
    ]
}

fn firmware(status: &PlatformStatus) -> Check {
    let (major, minor) = status.abi;
    let state = if status.initialised {
        "initialised"
    } else {
        "not initialised"
    };
    let found = format!(
        "ABI {major}.{minor} build {}, {state}, {} guests, TCB {:#x}",
        status.build, status.guests, status.current_tcb.0
    );
    if !status.initialised {
        Check::missing(
            "snp.firmware",
            SNP,
            found,
            "look for SEV-SNP in `dmesg`, and reload ccp and kvm_amd",
        )
    } else if status.chip_key_masked && !status.vlek {
        Check::warn(
            "snp.firmware",
            format!("{found}; reports are not signed by the chip's key"),
            "load a VLEK, or let firmware sign with the VCEK (snphost config)",
        )
    } else {
        Check::ok("snp.firmware", found)
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Report;
    use super::*;

    #[test]
    fn each_lack_is_told_once_with_its_remedy_and_decides() {
        let on = || [(); 3].map(|()| "Y\n".to_owned());
        let off = || ["Y\n", "Y\n", "N\n"].map(str::to_owned);
        let none = || [(); 3].map(|()| String::new());
        let cases = [
            ([cpu(false, false), kvm_amd(none()), vm_type(false)], "snp.cpu"),
            ([cpu(true, false), kvm_amd(off()), vm_type(false)], "snp.cpu"),
            ([cpu(true, true), kvm_amd(none()), vm_type(false)], "snp.kvm-amd"),
            ([cpu(true, true), kvm_amd(off()), vm_type(false)], "snp.kvm-amd"),
            ([cpu(true, true), kvm_amd(on()), vm_type(false)], "snp.vm-type"),
        ];
        for (rungs, name) in cases {
            let report = Report::new("7.2".into(), up_to_the_first_lack(rungs));
            let lack = report.only_lack();
            assert!(lack.name == name && lack.remedy.is_some(), "{lack:?}");
            assert!(
                !report.usable.snp && report.usable.tdx && report.usable.soft,
                "{name}"
            );
        }
        let good = up_to_the_first_lack([cpu(true, true), kvm_amd(on()), vm_type(true)]);
        assert_eq!(good.len(), 3);
        assert!(Report::new("7.2".into(), good).usable.snp);
    }

    #[test]
    fn each_piece_is_named() {
        let text = |s: &str| s.to_owned();
        let cases = [
            (
                cpu(false, false),
                Status::Missing,
                "this CPU shows no SEV-SNP (CPUID 0x8000001f)",
            ),
            (
                cpu(true, false),
                Status::Missing,
                "the CPU has SEV-SNP, but the kernel has switched it off",
            ),
            (cpu(true, true), Status::Ok, "CPU and kernel have SEV-SNP"),
            (
                kvm_amd([text("Y\n"), text("Y\n"), text("N\n")]),
                Status::Missing,
                "sev=Y sev_es=Y sev_snp=N",
            ),
            (
                kvm_amd([text(""), text(""), text("")]),
                Status::Missing,
                "kvm_amd is not loaded, or has no SNP",
            ),
            (
                kvm_amd([text("Y"), text("Y"), text("Y")]),
                Status::Ok,
                "sev=Y sev_es=Y sev_snp=Y",
            ),
            (
                asids((509, 1), ""),
                Status::Missing,
                "0 of 509 key ids are for SNP",
            ),
            (
                asids((509, 100), "sev 410\nsev_es 99\n"),
                Status::Ok,
                "99 of 509 key ids are for SNP; the misc controller counts 99",
            ),
        ];
        for (check, status, found) in cases {
            assert_eq!((check.status, check.found.as_str()), (status, found));
            assert_eq!(check.remedy.is_some(), status == Status::Missing, "{found}");
        }
    }
}
