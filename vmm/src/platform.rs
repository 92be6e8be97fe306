//! The one place that knows which platforms exist, and `soft`, which needs no hardware.

use arch::addr::Gpa;
use arch::exit::PlatformExit;
use arch::kvm::vcpu::Vcpu;
use arch::platform::{Foundation, Launch, LaunchPage, Platform, PlatformError, PlatformFlow, Sealed};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::BootState;
use vm_memory::{Bytes, GuestAddress};

use crate::ending::RunError;
use crate::plan::Mode;
use crate::spec::PlatformSpec;

/// Opens the platform.
///
/// # Errors
/// The host lacks something that the platform needs.
pub fn open(spec: &PlatformSpec) -> Result<Box<dyn Platform>, RunError> {
    match spec {
        PlatformSpec::Soft => Ok(Box::new(Soft)),
        PlatformSpec::Snp(_) => Err(RunError::Internal("snp".into())),
    }
}

/// How the shim is entered on a platform.
pub fn mode(spec: &PlatformSpec) -> Mode {
    match spec {
        PlatformSpec::Soft => Mode::Soft,
        PlatformSpec::Snp(_) => Mode::Snp,
    }
}

/// `KVM_X86_DEFAULT_VM`.
const DEFAULT_VM: u64 = 0;

/// An ordinary VM: the launch image is copied into RAM, and visibility is enforced by cvmm alone.
#[derive(Debug)]
struct Soft;

impl Platform for Soft {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn vm_type(&self) -> u64 {
        DEFAULT_VM
    }

    fn private_memory(&self) -> bool {
        false
    }

    fn adapt_cpuid(&self, _: &mut CpuidTable) {}

    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError> {
        Ok(Box::new(SoftLaunch(on)))
    }
}

struct SoftLaunch(Foundation);

fn failed(step: String, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PlatformError {
    PlatformError {
        platform: "soft",
        step,
        source: source.into(),
    }
}

impl Launch for SoftLaunch {
    fn add_page(&mut self, page: &mut LaunchPage) -> Result<(), PlatformError> {
        let Gpa(at) = page.range.start();
        self.0
            .ram
            .map()
            .write_slice(&page.bytes, GuestAddress(at))
            .map_err(|e| failed(format!("placing {} at {at:#x}", page.name), e))
    }

    fn add_vcpu(&mut self, vcpu: &mut Vcpu, state: &BootState) -> Result<(), PlatformError> {
        // An application processor waits for INIT, which keeps the MSRs that this sets.
        vcpu.set_state(state)
            .map_err(|e| failed(format!("setting the registers of vCPU {}", vcpu.index()), e))
    }

    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError> {
        Ok(Box::new(SoftSealed))
    }
}

#[derive(Debug)]
struct SoftSealed;

impl Sealed for SoftSealed {
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        Err(failed(
            format!("serving exit {}", exit.reason),
            "an ordinary VM has no such exit",
        ))
    }
}
