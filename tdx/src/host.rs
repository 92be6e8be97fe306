//! What this host has and what it lacks for TDs, piece by piece.

use std::fs;
use std::io;
use std::path::Path;

/// `KVM_X86_TDX_VM`.
pub const VM_TYPE: u64 = 5;

/// The piece that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}; {}", self.found(), self.remedy())]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Missing {
    Cpu,
    Bios,
    KvmIntel,
    Kernel,
    Parameter,
    Module,
}

impl Missing {
    /// What was found.
    pub const fn found(self) -> &'static str {
        match self {
            Self::Cpu => "this CPU has no TDX",
            Self::Bios => "the kernel sees no TDX in this CPU",
            Self::KvmIntel => "the module kvm_intel is not loaded",
            Self::Kernel => "this kernel's KVM has no TDX",
            Self::Parameter => "kvm_intel has TDX off",
            Self::Module => "KVM creates no TDs although kvm_intel has TDX on",
        }
    }

    /// What to do.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "it takes an Intel Xeon of the 5th generation or later",
            Self::Bios => {
                "it takes an Intel Xeon of the 5th generation or later, with TME-MK, TDX and TDX key ids enabled in the \
                 BIOS, and a kernel with CONFIG_INTEL_TDX_HOST=y"
            }
            Self::KvmIntel => "load it: modprobe kvm_intel tdx=1",
            Self::Kernel => "it takes Linux 6.16 or later with CONFIG_KVM_INTEL_TDX=y",
            Self::Parameter => {
                "load it with tdx=1 (modprobe kvm_intel tdx=1), and if that does not help look for \"tdx\" in the kernel \
                 log: hibernation must be off (nohibernate), and the TDX module must be loaded"
            }
            Self::Module => "look for \"tdx\" in the kernel log",
        }
    }
}

/// Checks what there is, from the CPU upwards. `root` is `/`; `vm_types` is `KVM_CAP_VM_TYPES`.
///
/// # Errors
/// The first piece that is missing.
pub fn check(root: &Path, vm_types: u32) -> Result<(), Missing> {
    if u64::from(vm_types) >> VM_TYPE & 1 != 0 {
        return Ok(());
    }
    let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let has = |wanted| cpuinfo.split_whitespace().any(|word| word == wanted);
    if !has("GenuineIntel") {
        return Err(Missing::Cpu);
    }
    if !has("tdx_host_platform") {
        return Err(Missing::Bios);
    }
    let module = root.join("sys/module/kvm_intel");
    match fs::read_to_string(module.join("parameters/tdx")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && !module.exists() => Err(Missing::KvmIntel),
        Err(_) => Err(Missing::Kernel),
        Ok(value) if !matches!(value.trim(), "Y" | "1") => Err(Missing::Parameter),
        Ok(_) => Err(Missing::Module),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sev_snp\n";
    const OLD: &str = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n";
    const TDX: &str = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx tdx_host_platform\n";

    #[test]
    fn the_first_missing_piece_is_named_with_its_remedy() {
        let root = std::env::temp_dir().join(format!("cvmm-tdx-host-{}", std::process::id()));
        let with = |cpuinfo: &str, loaded: bool, parameter: Option<&str>, types: u32| {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(root.join("proc")).unwrap();
            fs::write(root.join("proc/cpuinfo"), cpuinfo).unwrap();
            let module = root.join("sys/module/kvm_intel/parameters");
            if loaded {
                fs::create_dir_all(&module).unwrap();
            }
            if let Some(value) = parameter {
                fs::write(module.join("tdx"), value).unwrap();
            }
            check(&root, types)
        };
        let cases = [
            ("", false, None, 1, Missing::Cpu, "5th generation"),
            (AMD, false, None, 0x1f, Missing::Cpu, "no TDX"),
            (OLD, true, None, 1, Missing::Bios, "BIOS"),
            (TDX, false, None, 1, Missing::KvmIntel, "modprobe kvm_intel tdx=1"),
            (TDX, true, None, 1, Missing::Kernel, "Linux 6.16"),
            (TDX, true, Some("N\n"), 1, Missing::Parameter, "nohibernate"),
            (TDX, true, Some("Y\n"), 1, Missing::Module, "kernel log"),
        ];
        for (cpuinfo, loaded, parameter, types, missing, says) in cases {
            let error = with(cpuinfo, loaded, parameter, types).unwrap_err();
            assert_eq!(error, missing);
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(with(TDX, true, Some("Y\n"), 0x21), Ok(()));
        assert_eq!(with("", false, None, 0x21), Ok(()));
        fs::remove_dir_all(root).unwrap();
    }
}
