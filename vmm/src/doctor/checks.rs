//! KVM itself, and the order of all checks.

use std::io::{self, ErrorKind};
use std::path::Path;

use arch::kvm::system::{Capabilities, Host};

use super::probe::{self, Outcome, Step};
use super::report::{ALL, Check, PRIVATE, Report, SOFT};
use super::{snp, system, tdx};

/// Device that everything hangs on.
const KVM: &str = "/dev/kvm";
/// `KVM_GET_API_VERSION` since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
const ATTRIBUTE_PRIVATE: u32 = 8;
/// `KVM_HC_MAP_GPA_RANGE`.
const MAP_GPA_RANGE: u32 = 12;
/// Types `snp` and `tdx`.
const CONFIDENTIAL: u32 = 0b11_0000;
const VM_TYPES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];

/// Looks at everything. Takes a few milliseconds, and a few seconds on a host that hangs.
pub(super) fn examine() -> Report {
    let cpuinfo = system::read("/proc/cpuinfo");
    let release = system::read("/proc/sys/kernel/osrelease").trim().to_owned();
    let modules: Vec<_> = ["kvm_amd", "kvm_intel", "kvm_pvm"]
        .into_iter()
        .filter(|name| Path::new("/sys/module").join(name).exists())
        .collect();
    let mut checks = vec![system::kernel(&release)];
    checks.push(module(&modules, &cpuinfo));
    match Host::open(Path::new(KVM)) {
        Err(e) => checks.push(no_device(&e)),
        Ok(host) => {
            checks.push(Check::ok("kvm.device", format!("{KVM} can be opened")));
            let capabilities = host.capabilities();
            checks.extend(kvm(&capabilities));
            checks.push(stock_guest(&probe::run(), &modules));
            checks.extend(snp::checks(&host, &capabilities, &cpuinfo));
            checks.extend(tdx::checks(Path::new("/"), capabilities.vm_types, || {
                tdx::ask(&host)
            }));
        }
    }
    checks.extend(system::checks());
    Report::new(release, checks)
}

fn no_device(cause: &io::Error) -> Check {
    let missing = |found, remedy: &str| Check::missing("kvm.device", ALL, found, remedy);
    if cause.kind() == ErrorKind::NotFound {
        missing(
            format!("{KVM} does not exist"),
            "load kvm_amd or kvm_intel and enable virtualisation in the firmware; in a VM, enable nested \
             virtualisation; in a container, pass the device on",
        )
    } else if cause.kind() == ErrorKind::PermissionDenied {
        missing(
            format!("{KVM} may not be opened by this user ({})", owner(Path::new(KVM))),
            "add this user to the device's group (`usermod -aG kvm $USER`, then log in again)",
        )
    } else {
        missing(
            format!("{KVM}: {cause}"),
            "see the kernel log (`dmesg | grep -i kvm`)",
        )
    }
}

/// Who may open a device, as numbers: no name service is worth a look-up here.
pub(super) fn owner(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    match path.metadata() {
        Ok(m) => format!("mode {:o}, uid {}, gid {}", m.mode() & 0o7777, m.uid(), m.gid()),
        Err(e) => e.to_string(),
    }
}

fn module(modules: &[&str], cpuinfo: &str) -> Check {
    let flags: Vec<_> = ["svm", "vmx"]
        .into_iter()
        .filter(|flag| system::has_flag(cpuinfo, flag))
        .collect();
    let list = |words: &[&str]| {
        if words.is_empty() {
            "none".into()
        } else {
            words.join(" ")
        }
    };
    let found = format!("modules: {}; CPU flags: {}", list(modules), list(&flags));
    if modules.contains(&"kvm_pvm") {
        Check::warn(
            "kvm.module",
            found,
            "this is paravirtual nesting (PVM), which cannot run stock kernels; take a host with svm or vmx",
        )
    } else if flags.is_empty() {
        Check::warn(
            "kvm.module",
            found,
            "this CPU shows no svm or vmx; enable virtualisation in the firmware, or nested virtualisation in the VM",
        )
    } else {
        Check::ok("kvm.module", found)
    }
}

/// A capability: what it is called, whether it is there, who needs it.
type Capability<'a> = (&'static str, bool, &'static [&'static str], &'a str);

fn kvm(has: &Capabilities) -> Vec<Check> {
    let types = VM_TYPES.iter().zip(0_u32..);
    let names: Vec<_> = types
        .filter(|(_, bit)| has.vm_types.wrapping_shr(*bit) & 1 != 0)
        .map(|(name, _)| *name)
        .collect();
    let update = "update the host's kernel: it takes Linux 6.11 or later with guest_memfd";
    let capabilities: [Capability<'_>; 6] = [
        (
            "kvm.api",
            has.api_version == API_VERSION,
            ALL,
            "the KVM API is not version 12",
        ),
        (
            "kvm.split-irqchip",
            has.split_irqchip,
            ALL,
            "no split interrupt controller",
        ),
        (
            "kvm.exit-hypercall",
            has.exit_hypercall.wrapping_shr(MAP_GPA_RANGE) & 1 != 0,
            ALL,
            "page conversion requests cannot be sent to user space",
        ),
        ("kvm.guest-memfd", has.guest_memfd, PRIVATE, "no guest_memfd"),
        (
            "kvm.memory-attributes",
            has.memory_attributes & ATTRIBUTE_PRIVATE != 0,
            PRIVATE,
            "no private memory attribute",
        ),
        (
            "kvm.memory-fault",
            has.memory_fault_info,
            PRIVATE,
            "no memory fault exits",
        ),
    ];
    let mut checks = vec![
        Check::ok("kvm.vm-types", names.join(" ")),
        Check::ok("kvm.max-vcpus", has.max_vcpus.to_string()),
    ];
    // Where KVM creates no confidential VMs it may offer nothing for them either; the lack to tell of is another one.
    let private = has.vm_types & CONFIDENTIAL != 0;
    for (name, there, needed_by, lack) in capabilities {
        if there {
            checks.push(Check::ok(name, "yes"));
        } else if private || needed_by != PRIVATE {
            checks.push(Check::missing(name, needed_by, lack, update));
        }
    }
    checks
}

/// Judges what the tiny guest did. That is an ordinary VM, and says nothing about confidential ones: what they need is
/// asked of KVM, firmware and module themselves, and a host may run them alone.
fn stock_guest(outcome: &Outcome, modules: &[&str]) -> Check {
    let name = "kvm.stock-guest";
    let pvm = modules.contains(&"kvm_pvm");
    let kind = if pvm {
        "KVM by paravirtual nesting"
    } else {
        "this KVM"
    };
    let elsewhere =
        "stock kernels cannot boot here; take a host with svm or vmx, or the nested rig (`scripts/rig`)";
    match outcome {
        Outcome::Good => Check::ok(name, "a guest with an SSE instruction and a hypercall ran"),
        Outcome::Failed { doing, cause } => Check::missing(
            name,
            SOFT,
            format!("{doing}: {cause}"),
            "see the kernel log (`dmesg | grep -i kvm`)",
        ),
        Outcome::Stuck { at: Step::Start, how } => Check::missing(
            name,
            SOFT,
            format!("{kind} runs no 64-bit guest code: it {how}"),
            "see the kernel log (`dmesg | grep -i kvm`)",
        ),
        Outcome::Stuck { at: Step::Sse, how } => Check::missing(
            name,
            SOFT,
            format!("{kind} emulates guest kernel code and {how} at an SSE instruction"),
            elsewhere,
        ),
        Outcome::Stuck {
            at: Step::Hypercall,
            how,
        } => Check::missing(
            name,
            SOFT,
            format!("on {kind} a guest's hypercall {how}"),
            elsewhere,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    fn good() -> Capabilities {
        Capabilities {
            api_version: 12,
            vm_types: 0b01_0001,
            guest_memfd: true,
            guest_memfd_flags: 0,
            memory_attributes: 8,
            memory_fault_info: true,
            exit_hypercall: 1 << 12,
            split_irqchip: true,
            max_vcpus: 1024,
        }
    }

    #[test]
    fn each_lacking_capability_is_named() {
        let lacking = |has: &Capabilities| -> Vec<_> {
            let checks = kvm(has).into_iter();
            checks
                .filter(|c| c.status == Status::Missing)
                .map(|c| c.name)
                .collect()
        };
        assert_eq!(lacking(&good()), [""; 0]);
        let old = Capabilities {
            guest_memfd: false,
            memory_attributes: 0,
            ..good()
        };
        assert_eq!(lacking(&old), ["kvm.guest-memfd", "kvm.memory-attributes"]);
        let plain = Capabilities { vm_types: 1, ..old };
        assert_eq!(lacking(&plain), [""; 0]);
        let deaf = Capabilities {
            exit_hypercall: 1,
            ..good()
        };
        assert_eq!(lacking(&deaf), ["kvm.exit-hypercall"]);
        assert_eq!(kvm(&good())[0].found, "default snp");
    }

    #[test]
    fn a_kvm_that_cannot_run_stock_guests_is_told_from_a_good_one() {
        let stuck = |at, how: &str| Outcome::Stuck { at, how: how.into() };
        let cases = [
            (Outcome::Good, vec!["kvm_amd"], Status::Ok, "ran"),
            (
                stuck(Step::Sse, "ended the VM with Internal"),
                vec!["kvm_pvm"],
                Status::Missing,
                "KVM by paravirtual nesting emulates guest kernel code and ended the VM with Internal at an SSE",
            ),
            (
                stuck(Step::Hypercall, "never came back"),
                vec!["kvm_intel"],
                Status::Missing,
                "on this KVM a guest's hypercall never came back",
            ),
        ];
        for (outcome, modules, status, says) in cases {
            let check = stock_guest(&outcome, &modules);
            assert_eq!(check.status, status, "{outcome:?}");
            assert!(check.found.contains(says), "{}", check.found);
            let report = Report::new("6.12".into(), vec![check]);
            assert_eq!(report.usable.soft, status == Status::Ok);
            assert!(
                report.usable.tdx && report.usable.snp,
                "an ordinary VM decides for soft alone"
            );
        }
    }

    #[test]
    fn no_device_says_why() {
        let absent = no_device(&io::Error::from(ErrorKind::NotFound));
        assert_eq!(absent.found, "/dev/kvm does not exist");
        let forbidden = no_device(&io::Error::from(ErrorKind::PermissionDenied));
        assert!(
            forbidden
                .found
                .starts_with("/dev/kvm may not be opened by this user (")
        );
        assert!(forbidden.remedy.unwrap().contains("usermod -aG kvm"));
    }

    #[test]
    fn modules_and_flags_are_told() {
        let cases = [
            (
                vec!["kvm_amd"],
                "flags\t: fpu svm\n",
                Status::Ok,
                "modules: kvm_amd; CPU flags: svm",
            ),
            (
                vec!["kvm_pvm"],
                "flags\t: fpu\n",
                Status::Warn,
                "modules: kvm_pvm; CPU flags: none",
            ),
            (vec![], "", Status::Warn, "modules: none; CPU flags: none"),
        ];
        for (modules, cpuinfo, status, found) in cases {
            let check = module(&modules, cpuinfo);
            assert_eq!((check.status, check.found.as_str()), (status, found));
        }
    }
}
