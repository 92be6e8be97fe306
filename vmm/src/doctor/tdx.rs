//! Intel TDX, piece by piece.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use arch::kvm::system::Host;
use arch::kvm::vm::Vm;
use tdx::commands::Capabilities as Offered;
use tdx::host::{self, Missing, VM_TYPE};
use tdx::ioctl::KvmTdx;
use tdx::launch;

use super::report::{Check, TDX, up_to_the_first_lack};

/// From the CPU upwards, in the order of [`host::check`].
const RUNGS: [(&str, &str); 3] = [
    ("tdx.cpu", "CPU and kernel have TDX"),
    ("tdx.kvm-intel", "tdx=Y"),
    ("tdx.vm-type", "KVM creates TDs"),
];

/// Looks at all that TDX needs of its own. `root` is `/`; `vm_types` is `KVM_CAP_VM_TYPES`; `ask` is [`ask`].
pub(super) fn checks(
    root: &Path,
    vm_types: u32,
    ask: impl FnOnce() -> Result<Offered, String>,
) -> Vec<Check> {
    if let Err(missing) = host::check(root, vm_types) {
        return up_to_the_first_lack(RUNGS.map(|(name, good)| {
            if name == rung(missing) {
                Check::missing(name, TDX, missing.found(), missing.remedy())
            } else {
                Check::ok(name, good)
            }
        }));
    }
    let mut checks: Vec<_> = RUNGS.map(|(name, good)| Check::ok(name, good)).into();
    let capacity = fs::read_to_string(root.join("sys/fs/cgroup/misc.capacity"));
    checks.push(key_ids(&capacity.unwrap_or_default()));
    checks.push(match ask() {
        Ok(offered) => offers(&offered),
        Err(why) => Check::missing(
            "tdx.offers",
            TDX,
            why,
            "look for tdx in `dmesg`: the TDX module must be initialised",
        ),
    });
    checks
}

/// The check that tells of a piece.
const fn rung(missing: Missing) -> &'static str {
    match missing {
        Missing::Cpu | Missing::Bios => "tdx.cpu",
        Missing::KvmIntel | Missing::Kernel | Missing::Parameter => "tdx.kvm-intel",
        Missing::Module => "tdx.vm-type",
    }
}

/// What a scratch VM's module and KVM offer.
pub(super) fn ask(host: &Host) -> Result<Offered, String> {
    let vm = Vm::create(host, VM_TYPE).map_err(|e| format!("no TD can be created: {e}"))?;
    launch::capabilities(&mut KvmTdx::new(Arc::new(vm))).map_err(|e| e.to_string())
}

fn offers(offered: &Offered) -> Check {
    let found = format!(
        "attributes {:#x}, XFAM {:#x}, {} configurable CPUID leaves",
        offered.attributes,
        offered.xfam,
        offered.cpuid.0.len()
    );
    match tdx::attributes::check(launch::LaunchConfig::default().attributes, offered.attributes) {
        Ok(()) => Check::ok("tdx.offers", found),
        Err(_) => Check::missing(
            "tdx.offers",
            TDX,
            format!("{found}; SEPT_VE_DISABLE is not among the attributes"),
            "update the TDX module and the kernel",
        ),
    }
}

fn key_ids(misc_capacity: &str) -> Check {
    let limit = misc_capacity.lines().find_map(|line| line.strip_prefix("tdx "));
    match limit.map(str::trim) {
        Some("0") => Check::missing(
            "tdx.key-ids",
            TDX,
            "there are no key ids for TDs",
            "give TDX a share of the TME-MK key ids in the firmware",
        ),
        Some(count) => Check::ok("tdx.key-ids", format!("{count} TDs at a time")),
        None => Check::ok("tdx.key-ids", "the misc controller does not count them"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::report::{Report, Status};
    use super::*;

    fn with(attributes: u64) -> Offered {
        Offered {
            attributes,
            xfam: 0x207,
            ..Offered::default()
        }
    }

    const INTEL: &str = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n";
    const XEON: &str = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx tdx_host_platform\n";

    /// A host's files under a temporary root, and what its KVM answers.
    struct FakeHost {
        cpuinfo: &'static str,
        parameter: Option<&'static str>,
        vm_types: u32,
        capacity: &'static str,
        module: Result<u64, &'static str>,
    }

    const GOOD: FakeHost = FakeHost {
        cpuinfo: XEON,
        parameter: Some("Y\n"),
        vm_types: 0x21,
        capacity: "tdx 31\n",
        module: Ok(1 << 28),
    };

    impl FakeHost {
        fn checks(&self) -> Vec<Check> {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let root = std::env::temp_dir().join(format!("cvmm-doctor-{}-{number}", std::process::id()));
            let write = |path: &str, text| {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            };
            write("proc/cpuinfo", self.cpuinfo);
            write("sys/fs/cgroup/misc.capacity", self.capacity);
            if let Some(parameter) = self.parameter {
                write("sys/module/kvm_intel/parameters/tdx", parameter);
            }
            let checks = checks(&root, self.vm_types, || {
                self.module.map(with).map_err(str::to_owned)
            });
            fs::remove_dir_all(root).unwrap();
            checks
        }
    }

    /// A host without the type of VM that KVM creates TDs by.
    const TYPELESS: FakeHost = FakeHost { vm_types: 1, ..GOOD };

    /// What is broken on which host, the check that tells of it, and words of what it finds and of its remedy.
    type Lack = (
        FakeHost,
        fn(&mut FakeHost),
        &'static str,
        &'static str,
        &'static str,
    );

    const LACKS: [Lack; 8] = [
        (
            TYPELESS,
            |h| h.cpuinfo = "",
            "tdx.cpu",
            "no TDX",
            "5th generation",
        ),
        (
            TYPELESS,
            |h| h.cpuinfo = INTEL,
            "tdx.cpu",
            "sees no TDX",
            "CONFIG_INTEL_TDX_HOST=y",
        ),
        (
            TYPELESS,
            |h| h.parameter = None,
            "tdx.kvm-intel",
            "not loaded",
            "modprobe kvm_intel tdx=1",
        ),
        (
            TYPELESS,
            |h| h.parameter = Some("N\n"),
            "tdx.kvm-intel",
            "off",
            "nohibernate",
        ),
        (TYPELESS, |_| (), "tdx.vm-type", "creates no TDs", "kernel log"),
        (
            GOOD,
            |h| h.capacity = "tdx 0\n",
            "tdx.key-ids",
            "no key ids",
            "firmware",
        ),
        (
            GOOD,
            |h| h.module = Err("EIO"),
            "tdx.offers",
            "EIO",
            "initialised",
        ),
        (
            GOOD,
            |h| h.module = Ok(0),
            "tdx.offers",
            "SEPT_VE_DISABLE",
            "update the TDX module",
        ),
    ];

    #[test]
    fn each_lack_is_told_once_with_its_remedy_and_decides() {
        for (mut host, spoil, name, found, remedy) in LACKS {
            spoil(&mut host);
            let report = Report::new("7.2".into(), host.checks());
            let lack = report.only_lack();
            assert_eq!(lack.name, name);
            assert!(lack.found.contains(found), "{}", lack.found);
            assert!(
                lack.remedy.as_ref().unwrap().contains(remedy),
                "{:?}",
                lack.remedy
            );
            assert!(
                !report.usable.tdx && report.usable.snp && report.usable.soft,
                "{name}"
            );
        }
    }

    #[test]
    fn where_kvm_creates_tds_the_files_of_the_system_decide_nothing() {
        // As in a container without /sys.
        let bare = FakeHost {
            cpuinfo: "",
            parameter: None,
            capacity: "",
            ..GOOD
        };
        for host in [GOOD, bare] {
            let checks = host.checks();
            assert!(
                checks.iter().all(|check| check.status == Status::Ok),
                "{checks:?}"
            );
            let names: Vec<_> = checks.iter().map(|check| check.name).collect();
            assert_eq!(
                names,
                [
                    "tdx.cpu",
                    "tdx.kvm-intel",
                    "tdx.vm-type",
                    "tdx.key-ids",
                    "tdx.offers"
                ]
            );
        }
    }

    #[test]
    fn each_piece_is_named() {
        let cases = [
            (key_ids("sev 0\ntdx 31\n"), Status::Ok, "31 TDs at a time"),
            (
                key_ids("tdx 0\n"),
                Status::Missing,
                "there are no key ids for TDs",
            ),
            (key_ids(""), Status::Ok, "the misc controller does not count them"),
            (
                offers(&with(1 << 28)),
                Status::Ok,
                "attributes 0x10000000, XFAM 0x207, 0 configurable CPUID leaves",
            ),
            (
                offers(&with(0)),
                Status::Missing,
                "attributes 0x0, XFAM 0x207, 0 configurable CPUID leaves; SEPT_VE_DISABLE is not among the attributes",
            ),
        ];
        for (check, status, found) in cases {
            assert_eq!((check.status, check.found.as_str()), (status, found));
        }
    }
}
