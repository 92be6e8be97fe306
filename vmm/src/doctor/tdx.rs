//! Intel TDX, piece by piece.

use arch::kvm::system::Capabilities;

use super::report::{Check, TDX};
use super::system;
use crate::spec::host::TDX_VM;

pub(super) fn checks(has: &Capabilities, cpuinfo: &str) -> Vec<Check> {
    let parameter = system::read("/sys/module/kvm_intel/parameters/tdx");
    let offered = has.vm_types.wrapping_shr(TDX_VM) & 1 != 0;
    vec![
        cpu(system::has_flag(cpuinfo, "tdx_host_platform")),
        kvm_intel(parameter.trim()),
        vm_type(offered),
        Check::missing(
            "tdx.cvmm",
            TDX,
            "this version of cvmm launches no TDX guests",
            "take a later version",
        ),
    ]
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
        ];
        for (check, status, found) in cases {
            assert_eq!((check.status, check.found.as_str()), (status, found));
        }
    }
}
