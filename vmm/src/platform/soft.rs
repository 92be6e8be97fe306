//! `soft`: an ordinary VM. The launch image is copied into RAM, and visibility is enforced by cvmm alone.

use arch::addr::Gpa;
use arch::exit::PlatformExit;
use arch::kvm::vcpu::Vcpu;
use arch::platform::{Foundation, Launch, LaunchPage, Platform, PlatformError, PlatformFlow, Sealed};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::BootState;
use vm_memory::{Bytes, GuestAddress};

const NAME: &str = "soft";
/// `KVM_X86_DEFAULT_VM`.
const DEFAULT_VM: u64 = 0;

/// The leaf by which KVM on a host with SEV offers it to any guest: Linux believes it, reads SEV_STATUS before it
/// can take an exception, and dies of the one that KVM raises for a VM without SEV.
const MEMORY_ENCRYPTION: u32 = 0x8000_001f;

/// The platform.
#[derive(Debug)]
pub(super) struct Soft;

impl Platform for Soft {
    fn name(&self) -> &'static str {
        NAME
    }

    fn vm_type(&self) -> u64 {
        DEFAULT_VM
    }

    fn private_memory(&self) -> bool {
        false
    }

    fn adapt_cpuid(&self, cpuid: &mut CpuidTable) {
        cpuid.0.retain(|entry| entry.leaf != MEMORY_ENCRYPTION);
    }

    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError> {
        Ok(Box::new(SoftLaunch(on)))
    }
}

struct SoftLaunch(Foundation);

impl Launch for SoftLaunch {
    fn add_page(&mut self, page: &mut LaunchPage) -> Result<(), PlatformError> {
        let Gpa(at) = page.range.start();
        self.0
            .ram
            .map()
            .write_slice(&page.bytes, GuestAddress(at))
            .map_err(PlatformError::at(
                NAME,
                format!("placing {} at {at:#x}", page.name),
            ))
    }

    fn add_vcpu(&mut self, vcpu: &mut Vcpu, state: &BootState) -> Result<(), PlatformError> {
        // An application processor waits for INIT, which keeps the MSRs that this sets.
        let step = format!("setting the registers of vCPU {}", vcpu.index());
        vcpu.set_state(state).map_err(PlatformError::at(NAME, step))
    }

    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError> {
        Ok(Box::new(SoftSealed))
    }
}

#[derive(Debug)]
struct SoftSealed;

impl Sealed for SoftSealed {
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        let failed = PlatformError::at(NAME, format!("serving exit {}", exit.reason));
        Err(failed("an ordinary VM has no such exit"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arch::x86::cpuid::CpuidEntry;

    #[test]
    fn a_guest_without_protection_is_not_told_of_any() {
        let entry = |leaf| CpuidEntry {
            leaf,
            ..Default::default()
        };
        let mut table = CpuidTable(vec![entry(1), entry(0x8000_001f), entry(0x8000_0020)]);
        Soft.adapt_cpuid(&mut table);
        assert_eq!(table, CpuidTable(vec![entry(1), entry(0x8000_0020)]));
    }
}
