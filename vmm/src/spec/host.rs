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
    /// TDX, or why there is none; `None` if nobody asked.
    pub tdx: Option<Result<(), tdx::host::Missing>>,
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
    #[error("platform tdx: {0}")]
    Tdx(tdx::host::Missing),
    /// `auto` found nothing.
    #[error(
        "platform auto: this host can protect no guest (for SEV-SNP: {snp}; for TDX: {tdx}); \
         for a guest without any protection say --platform soft"
    )]
    NoProtection {
        /// What SEV-SNP lacks.
        snp: Missing,
        /// What TDX lacks.
        tdx: tdx::host::Missing,
    },
}

/// `auto` decided.
#[derive(Debug)]
pub(super) enum Chosen {
    /// No protection.
    Soft,
    /// AMD SEV-SNP.
    Snp(SnpHost),
    /// Intel TDX.
    Tdx,
}

/// What is missing; `unasked` if nobody asked, which no caller lets happen.
fn lack<T, E>(asked: Option<Result<T, E>>, unasked: E) -> E {
    match asked {
        Some(Err(missing)) => missing,
        Some(Ok(_)) | None => unasked,
    }
}

impl HostFacts {
    /// Asks KVM and the kernel, and for each platform only if `platform` may mean it.
    pub fn probe(platform: PlatformName) -> Self {
        let host = Host::open(Path::new("/dev/kvm"));
        let may_be = |name| platform == PlatformName::Auto || platform == name;
        let (kvm, snp, tdx) = match host {
            Err(cause) => (Err(cause), None, None),
            Ok(host) => {
                let capabilities = host.capabilities();
                let snp = may_be(PlatformName::Snp).then(|| SnpHost::open(&host, &capabilities));
                let tdx = may_be(PlatformName::Tdx)
                    .then(|| tdx::host::check(Path::new("/"), capabilities.vm_types));
                (Ok(capabilities), snp, tdx)
            }
        };
        let system = rustix::system::sysinfo();
        Self {
            kvm,
            snp,
            tdx,
            memory_bytes: system.totalram.saturating_mul(u64::from(system.mem_unit)),
        }
    }

    /// What protects the guest, with what its launch needs of the host.
    pub(super) fn choose(self, wanted: PlatformName) -> Result<Chosen, HostLack> {
        Ok(match (wanted, self.snp, self.tdx) {
            (PlatformName::Soft, ..) => Chosen::Soft,
            (PlatformName::Auto | PlatformName::Snp, Some(Ok(host)), _) => Chosen::Snp(host),
            (PlatformName::Auto | PlatformName::Tdx, _, Some(Ok(()))) => Chosen::Tdx,
            (PlatformName::Snp, snp, _) => return Err(HostLack::Snp(lack(snp, Missing::Cpu))),
            (PlatformName::Tdx, _, tdx) => return Err(HostLack::Tdx(lack(tdx, tdx::host::Missing::Cpu))),
            (PlatformName::Auto, snp, tdx) => {
                return Err(HostLack::NoProtection {
                    snp: lack(snp, Missing::Cpu),
                    tdx: lack(tdx, tdx::host::Missing::Cpu),
                });
            }
        })
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
