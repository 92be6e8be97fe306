//! Intel TDX, piece by piece.

use std::sync::Arc;

use arch::kvm::system::{Capabilities, Host};
use arch::kvm::vm::Vm;
use tdx::commands::Capabilities as Offered;
use tdx::host::VM_TYPE;
use tdx::ioctl::KvmTdx;
use tdx::launch;

use super::report::{Check, TDX};
use super::system;

pub(super) fn checks(host: &Host, has: &Capabilities, cpuinfo: &str) -> Vec<Check> {
    let parameter = system::read("/sys/module/kvm_intel/parameters/tdx");
    let offered = u64::from(has.vm_types) >> VM_TYPE & 1 != 0;
    let mut checks = vec![
        cpu(system::has_flag(cpuinfo, "tdx_host_platform")),
        kvm_intel(parameter.trim()),
        vm_type(offered),
    ];
    if !offered {
        // Whatever follows would only repeat that.
        return checks;
    }
    checks.push(key_ids(&system::read("/sys/fs/cgroup/misc.capacity")));
    checks.push(match ask(host) {
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

/// What a scratch VM's module and KVM offer.
fn ask(host: &Host) -> Result<Offered, String> {
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

fn cpu(there: bool) -> Check {
    if there {
        return Check::ok("tdx.cpu", "CPU and kernel have TDX");
    }
    Check::missing(
        "tdx.cpu",
        TDX,
        "the kernel sees no TDX (flag tdx_host_platform)",
        "take a Xeon of the 5th generation or later, enable TME-MK and TDX in the firmware, and a kernel with \
         CONFIG_INTEL_TDX_HOST=y",
    )
}

fn kvm_intel(parameter: &str) -> Check {
    match parameter {
        "Y" | "1" => Check::ok("tdx.kvm-intel", "tdx=Y"),
        "" => Check::missing(
            "tdx.kvm-intel",
            TDX,
            "kvm_intel is not loaded, or has no TDX",
            "load kvm_intel of Linux 6.16 or later with CONFIG_KVM_INTEL_TDX=y",
        ),
        other => Check::missing(
            "tdx.kvm-intel",
            TDX,
            format!("tdx={other}"),
            "load it with `modprobe kvm_intel tdx=1` and boot with nohibernate; see `dmesg | grep -i tdx`",
        ),
    }
}

fn vm_type(offered: bool) -> Check {
    if offered {
        return Check::ok("tdx.vm-type", "KVM creates TDX guests");
    }
    Check::missing(
        "tdx.vm-type",
        TDX,
        "KVM creates no TDX guests",
        "mend the checks above",
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    fn with(attributes: u64) -> Offered {
        Offered {
            attributes,
            xfam: 0x207,
            ..Offered::default()
        }
    }

    #[test]
    fn each_piece_is_named() {
        let cases = [
            (cpu(true), Status::Ok, "CPU and kernel have TDX"),
            (
                cpu(false),
                Status::Missing,
                "the kernel sees no TDX (flag tdx_host_platform)",
            ),
            (kvm_intel("Y"), Status::Ok, "tdx=Y"),
            (kvm_intel("N"), Status::Missing, "tdx=N"),
            (
                kvm_intel(""),
                Status::Missing,
                "kvm_intel is not loaded, or has no TDX",
            ),
            (vm_type(false), Status::Missing, "KVM creates no TDX guests"),
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
