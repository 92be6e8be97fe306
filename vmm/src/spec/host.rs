//! What a machine's checks need to know of the host.

use std::fs;
use std::io;
use std::path::Path;

use arch::kvm::system::{Capabilities, Host};

/// What the host has, asked once before any check.
#[derive(Debug)]
pub struct HostFacts {
    /// KVM's capabilities, or why there is no KVM.
    pub kvm: Result<Capabilities, io::Error>,
    /// Size of the host's memory in bytes.
    pub memory_bytes: u64,
}

/// Something that the host lacks.
#[derive(Debug, thiserror::Error)]
pub enum HostLack {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm: not found; load kvm_amd or kvm_intel, or enable virtualisation in the firmware (`cvmm doctor` tells more)"
    )]
    NoKvm,
    /// `/dev/kvm` may not be opened.
    #[error(
        "/dev/kvm: permission denied; add this user to the group kvm (`usermod -aG kvm $USER`, then log in again)"
    )]
    KvmPermission,
    /// `/dev/kvm` does not work.
    #[error("/dev/kvm: {cause}; `cvmm doctor` tells more")]
    Kvm {
        /// The kernel's answer.
        cause: String,
    },
    /// The platform that was asked for.
    #[error(
        "platform {platform}: KVM on this host offers no such VM; `cvmm doctor --for {platform}` names what is missing"
    )]
    Platform {
        /// "snp" or "tdx".
        platform: &'static str,
    },
    /// `auto` found nothing.
    #[error(
        "platform auto: this host has neither SEV-SNP nor TDX; for a guest without any protection say --platform soft (`cvmm doctor` names what is missing)"
    )]
    NoProtection,
    /// A platform that this version does not launch.
    #[error(
        "platform tdx: this version of cvmm cannot launch TDX guests; take --platform snp, or soft for no protection"
    )]
    TdxUnsupported,
}

pub(super) const SNP_VM: u32 = 4;
pub(super) const TDX_VM: u32 = 5;

impl HostFacts {
    /// Asks `/dev/kvm` and `/proc/meminfo`.
    pub fn probe() -> Self {
        let kvm = Host::open(Path::new("/dev/kvm")).map(|host| host.capabilities());
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            kvm,
            memory_bytes: total_memory(&meminfo),
        }
    }

    pub(super) fn offers(&self, vm_type: u32) -> bool {
        let types = self.kvm.as_ref().map_or(0, |kvm| kvm.vm_types);
        types.wrapping_shr(vm_type) & 1 != 0
    }

    /// Why nothing can run here at all.
    pub(super) fn require_kvm(&self) -> Result<&Capabilities, HostLack> {
        let cause = match &self.kvm {
            Ok(capabilities) => return Ok(capabilities),
            Err(cause) => cause,
        };
        Err(if cause.kind() == io::ErrorKind::NotFound {
            HostLack::NoKvm
        } else if cause.kind() == io::ErrorKind::PermissionDenied {
            HostLack::KvmPermission
        } else {
            HostLack::Kvm {
                cause: cause.to_string(),
            }
        })
    }
}

/// The line `MemTotal:     24689400 kB`; unlimited where `/proc` does not tell.
pub(crate) fn total_memory(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}
