//! The seam: KVM's commands for a TD as typed calls. `ioctl` sends them to a VM, `model` answers them as KVM and
//! the TDX module would.

use std::fmt;

use arch::x86::cpuid::CpuidTable;

use crate::error::Refusal;

/// A command, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `KVM_TDX_CAPABILITIES`, on the VM.
    Capabilities,
    /// `KVM_TDX_INIT_VM`, on the VM.
    InitVm,
    /// `KVM_TDX_GET_CPUID`, on a vCPU.
    GetCpuid,
    /// `KVM_SET_CPUID2`, on a vCPU: no TDX command, but one without which none of the next succeeds.
    SetCpuid,
    /// `KVM_TDX_INIT_VCPU`, on a vCPU.
    InitVcpu,
    /// `KVM_TDX_INIT_MEM_REGION`, on a vCPU.
    InitMemRegion,
    /// `KVM_TDX_FINALIZE_VM`, on the VM.
    FinalizeVm,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capabilities => "KVM_TDX_CAPABILITIES",
            Self::InitVm => "KVM_TDX_INIT_VM",
            Self::GetCpuid => "KVM_TDX_GET_CPUID",
            Self::SetCpuid => "KVM_SET_CPUID2",
            Self::InitVcpu => "KVM_TDX_INIT_VCPU",
            Self::InitMemRegion => "KVM_TDX_INIT_MEM_REGION",
            Self::FinalizeVm => "KVM_TDX_FINALIZE_VM",
        })
    }
}

/// What KVM and the TDX module of this host let a TD have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Bits of ATTRIBUTES that may be set.
    pub attributes: u64,
    /// Bits of XFAM that may be set.
    pub xfam: u64,
    /// Bits of R11 in `TDG.VP.VMCALL<GetTdVmCallInfo>` leaf 1 that user space may claim for what it serves.
    pub user_calls: u64,
    /// Configurable CPUID: a set bit is one that INIT_VM may set. Every entry has a sub-leaf, 0 where the leaf has none.
    /// Leaf 0x80000008 has all ones in EAX bits 23:16, where a TD's guest-physical address width goes.
    pub cpuid: CpuidTable,
}

/// Everything about a TD that is fixed before it has vCPUs or memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitVm {
    /// ATTRIBUTES; KVM adds the bits that must be one.
    pub attributes: u64,
    /// XFAM; KVM adds the bits that must be one.
    pub xfam: u64,
    /// What the owner ties the TD to that is not software, e.g. a configuration's hash; in every report.
    pub mrconfigid: [u8; 48],
    /// Whose TD this is; in every report.
    pub mrowner: [u8; 48],
    /// The owner's configuration; in every report.
    pub mrownerconfig: [u8; 48],
    /// Values for configurable leaves. Every entry must be one that [`Capabilities::cpuid`] lists.
    pub cpuid: CpuidTable,
}

/// One page of contents, aligned as the kernel wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);

/// Initial private memory. KVM advances it by what it has done, whether it succeeds or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRegion<'a> {
    /// Guest-physical address of the first page, without the shared bit.
    pub gpa: u64,
    /// Contents.
    pub source: &'a [Page],
    /// Contents enter MRTD, not only the address.
    pub measured: bool,
}

impl MemRegion<'_> {
    /// Moves past the first `pages` pages, or past all if there are fewer.
    pub fn advance(&mut self, pages: u64) {
        let pages = usize::try_from(pages)
            .unwrap_or(usize::MAX)
            .min(self.source.len());
        self.source = self.source.get(pages..).unwrap_or_default();
        self.gpa = self.gpa.saturating_add((pages as u64).saturating_mul(4096));
    }
}

/// Commands to one VM and its vCPUs. Call order is checked by the kernel, not here; nothing here tries twice.
pub trait TdxCommands {
    /// How a vCPU is named: the open vCPU for KVM.
    type Vcpu;

    /// What TDs may have; works in every state.
    ///
    /// # Errors
    /// `E2BIG` if there are more than `room` configurable CPUID entries, and no word of how many.
    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal>;
    /// Creates the TD. No vCPU may exist.
    ///
    /// # Errors
    /// The kernel's or the module's.
    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal>;
    /// CPUID as the module will show it to the TD; between `init_vm` and `finalize_vm`.
    ///
    /// # Errors
    /// `E2BIG` for more than `room` entries; the module's.
    fn get_cpuid(&mut self, vcpu: &mut Self::Vcpu, room: usize) -> Result<CpuidTable, Refusal>;
    /// CPUID as KVM takes the vCPU to have it.
    ///
    /// # Errors
    /// The kernel's; `E2BIG` for more than 256 entries.
    fn set_cpuid(&mut self, vcpu: &mut Self::Vcpu, table: &CpuidTable) -> Result<(), Refusal>;
    /// Makes the vCPU runnable at the reset vector, with `rcx` in RCX and R8. Its CPUID must offer x2APIC.
    ///
    /// # Errors
    /// The kernel's or the module's.
    fn init_vcpu(&mut self, vcpu: &mut Self::Vcpu, rcx: u64) -> Result<(), Refusal>;
    /// Adds pages that are private and backed by guest_memfd, by way of any initialised vCPU.
    ///
    /// # Errors
    /// The kernel's or the module's; `region` begins with the page that it is about.
    fn init_mem_region(&mut self, vcpu: &mut Self::Vcpu, region: &mut MemRegion<'_>) -> Result<(), Refusal>;
    /// Seals the TD and its MRTD.
    ///
    /// # Errors
    /// The kernel's or the module's.
    fn finalize_vm(&mut self) -> Result<(), Refusal>;
}

impl<C: TdxCommands> TdxCommands for &mut C {
    type Vcpu = C::Vcpu;

    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal> {
        C::capabilities(self, room)
    }

    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal> {
        C::init_vm(self, init)
    }

    fn get_cpuid(&mut self, vcpu: &mut Self::Vcpu, room: usize) -> Result<CpuidTable, Refusal> {
        C::get_cpuid(self, vcpu, room)
    }

    fn set_cpuid(&mut self, vcpu: &mut Self::Vcpu, table: &CpuidTable) -> Result<(), Refusal> {
        C::set_cpuid(self, vcpu, table)
    }

    fn init_vcpu(&mut self, vcpu: &mut Self::Vcpu, rcx: u64) -> Result<(), Refusal> {
        C::init_vcpu(self, vcpu, rcx)
    }

    fn init_mem_region(&mut self, vcpu: &mut Self::Vcpu, region: &mut MemRegion<'_>) -> Result<(), Refusal> {
        C::init_mem_region(self, vcpu, region)
    }

    fn finalize_vm(&mut self) -> Result<(), Refusal> {
        C::finalize_vm(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_advances_to_its_end_and_no_further() {
        let source = vec![Page([7; 4096]); 3];
        let mut region = MemRegion {
            gpa: 0x10_0000,
            source: &source,
            measured: true,
        };
        for (by, gpa, left) in [(2, 0x10_2000, 1), (0, 0x10_2000, 1), (9, 0x10_3000, 0)] {
            region.advance(by);
            assert_eq!((region.gpa, region.source.len()), (gpa, left), "{by}");
        }
    }
}
