//! What a machine's checks need to know of the host.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use arch::kvm::system::{Capabilities, Host};
use snp::host::{Missing, Offered};

use crate::config::PlatformName;

/// What the host has, asked once before any check.
#[derive(Debug)]
pub struct HostFacts {
    /// KVM's capabilities, or why there is no KVM.
    pub kvm: Result<Capabilities, io::Error>,
    /// SEV-SNP, or why there is none; `None` if nobody asked.
    pub snp: Option<Result<SnpHost, Missing>>,
    /// Size of the host's memory in bytes.
    pub memory_bytes: u64,
}

/// What an SNP launch needs of the host.
#[derive(Debug)]
pub struct SnpHost {
    /// The open `/dev/sev`.
    pub sev: Arc<File>,
    /// What KVM offers SNP guests.
    pub offered: Offered,
}

impl SnpHost {
    fn open(host: &Host, capabilities: &Capabilities) -> Result<Self, Missing> {
        Ok(Self {
            sev: snp::host::open(Path::new("/"), capabilities.vm_types)?,
            offered: Offered::ask(host),
        })
    }
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
    /// SEV-SNP was asked for.
    #[error("platform snp: {0}")]
    Snp(Missing),
    /// TDX was asked for.
    #[error(
        "platform tdx: KVM on this host offers no TDX guests; `cvmm doctor --for tdx` names what is missing"
    )]
    Tdx,
    /// `auto` found nothing.
    #[error(
        "platform auto: this host can protect no guest (no TDX; for SEV-SNP: {0}); \
         for a guest without any protection say --platform soft"
    )]
    NoProtection(Missing),
    /// A platform that this version does not launch.
    #[error(
        "platform tdx: this version of cvmm cannot launch TDX guests; take --platform snp, or soft for no protection"
    )]
    TdxUnsupported,
}

/// `KVM_X86_TDX_VM`.
pub(crate) const TDX_VM: u32 = 5;

impl HostFacts {
    /// Asks KVM and the kernel, and for SEV-SNP only if `platform` may mean it.
    pub fn probe(platform: PlatformName) -> Self {
        let host = Host::open(Path::new("/dev/kvm"));
        let wanted = matches!(platform, PlatformName::Auto | PlatformName::Snp);
        let (kvm, snp) = match host {
            Err(cause) => (Err(cause), None),
            Ok(host) => {
                let capabilities = host.capabilities();
                let snp = wanted.then(|| SnpHost::open(&host, &capabilities));
                (Ok(capabilities), snp)
            }
        };
        let system = rustix::system::sysinfo();
        Self {
            kvm,
            snp,
            memory_bytes: system.totalram.saturating_mul(u64::from(system.mem_unit)),
        }
    }

    pub(super) fn offers_tdx(&self) -> bool {
        let types = self.kvm.as_ref().map_or(0, |kvm| kvm.vm_types);
        types.wrapping_shr(TDX_VM) & 1 != 0
    }

    /// Why nothing can run here at all.
    pub(super) fn require_kvm(&self) -> Result<(), HostLack> {
        let cause = match &self.kvm {
            Ok(_) => return Ok(()),
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
