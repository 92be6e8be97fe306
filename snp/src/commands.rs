//! The seam: KVM's commands for an SNP launch as typed calls. `ioctl` sends them to a VM, `model` answers them as
//! KVM and firmware would.

use std::fmt;

use crate::error::Refusal;
use crate::id_block::{IdAuth, IdBlock};
use crate::measure::PageType;
use crate::policy::Policy;

/// A command, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `KVM_SEV_INIT2`.
    Init2,
    /// `KVM_SEV_SNP_ENABLE_REQ_CERTS`.
    EnableReqCerts,
    /// `KVM_SEV_SNP_LAUNCH_START`.
    Start,
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`.
    Update,
    /// `KVM_SEV_SNP_LAUNCH_FINISH`.
    Finish,
    /// `SNP_PLATFORM_STATUS` on `/dev/sev`.
    PlatformStatus,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Init2 => "INIT2",
            Self::EnableReqCerts => "SNP_ENABLE_REQ_CERTS",
            Self::Start => "SNP_LAUNCH_START",
            Self::Update => "SNP_LAUNCH_UPDATE",
            Self::Finish => "SNP_LAUNCH_FINISH",
            Self::PlatformStatus => "SNP_PLATFORM_STATUS",
        })
    }
}

/// Who the guest is, beside its digest; all of it appears in reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The signed ID block, if the launch has to match one.
    pub id_block: Option<(IdBlock, Box<IdAuth>)>,
    /// Free bytes.
    pub host_data: [u8; 32],
    /// Reports may only be signed by the VLEK.
    pub vcek_disabled: bool,
}

/// Commands to one VM. Call order is checked by the kernel, not here.
pub trait SevCommands {
    /// Makes the VM an SNP guest with these VMSA features, without the SNP bit. No vCPU may exist.
    ///
    /// # Errors
    /// The kernel's or firmware's.
    fn init2(&mut self, vmsa_features: u64) -> Result<(), Refusal>;
    /// Lets extended report requests exit to user space. No vCPU may exist.
    ///
    /// # Errors
    /// The kernel's.
    fn enable_req_certs(&mut self) -> Result<(), Refusal>;
    /// Creates the guest context.
    ///
    /// # Errors
    /// The kernel's or firmware's.
    fn launch_start(&mut self, policy: Policy) -> Result<(), Refusal>;
    /// Adds `pages` pages from frame `gfn` on and returns how many were added, which may be fewer. `source` is
    /// page-aligned and `pages` pages long; `Zero` ignores it, for `Cpuid` firmware may write it.
    ///
    /// # Errors
    /// The kernel's or firmware's; the first page was not added.
    fn launch_update(
        &mut self,
        kind: PageType,
        gfn: u64,
        pages: u64,
        source: &mut [u8],
    ) -> Result<u64, Refusal>;
    /// Measures every vCPU and seals the guest. Not repeatable, even after an error.
    ///
    /// # Errors
    /// The kernel's or firmware's.
    fn launch_finish(&mut self, identity: &Identity) -> Result<(), Refusal>;
}

impl<C: SevCommands> SevCommands for &mut C {
    fn init2(&mut self, vmsa_features: u64) -> Result<(), Refusal> {
        C::init2(self, vmsa_features)
    }

    fn enable_req_certs(&mut self) -> Result<(), Refusal> {
        C::enable_req_certs(self)
    }

    fn launch_start(&mut self, policy: Policy) -> Result<(), Refusal> {
        C::launch_start(self, policy)
    }

    fn launch_update(
        &mut self,
        kind: PageType,
        gfn: u64,
        pages: u64,
        source: &mut [u8],
    ) -> Result<u64, Refusal> {
        C::launch_update(self, kind, gfn, pages, source)
    }

    fn launch_finish(&mut self, identity: &Identity) -> Result<(), Refusal> {
        C::launch_finish(self, identity)
    }
}
