//! The seam between the machine and its confidential platform: three phases, three traits. Chosen once at
//! run time; there is no cargo feature and no `cfg`.

use std::io;
use std::sync::Arc;

use crate::addr::PageRange;
use crate::exit::PlatformExit;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::mem::SharedMem;
use crate::mem::map::HostRam;
use crate::x86::cpuid::CpuidTable;
use crate::x86::regs::BootState;

/// What a launch page is for; each platform maps this to its own page type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Contents are measured.
    Measured,
    /// Contents are loaded but not measured.
    Unmeasured,
    /// Zero-filled, and measured as such.
    Zero,
    /// SNP secrets page; firmware fills it.
    Secrets,
    /// SNP CPUID page; firmware checks it and may correct it.
    Cpuid,
}

/// One range of the initial image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchPage {
    /// What the range holds, for people ("shim", "CONFIG").
    pub name: &'static str,
    /// Where the guest will see it.
    pub range: PageRange,
    /// How it enters the measurement.
    pub kind: PageKind,
    /// Plaintext, `range.bytes()` long; empty for `Zero` and `Secrets`.
    pub bytes: Vec<u8>,
}

/// The whole initial state, in measurement order. Built without hardware, then either applied to a
/// [`Launch`] or folded to a digest by `snp::measure` or `tdx::measure`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LaunchPlan {
    /// Pages in the order firmware sees them.
    pub pages: Vec<LaunchPage>,
    /// vCPU boot states by index.
    pub vcpus: Vec<BootState>,
}

impl LaunchPlan {
    /// Feeds every page and vCPU to `launch`, in order, and seals it.
    ///
    /// # Errors
    /// The first step that the platform refuses.
    pub fn apply(
        &mut self,
        mut launch: Box<dyn Launch>,
        vcpus: &mut [Vcpu],
    ) -> Result<Box<dyn Sealed>, PlatformError> {
        for page in &mut self.pages {
            log::debug!(
                "launch: \"{}\" at {:#x}, {} bytes, {:?}",
                page.name,
                page.range.start().0,
                page.range.bytes(),
                page.kind
            );
            launch.add_page(page)?;
        }
        for (vcpu, state) in vcpus.iter_mut().zip(&self.vcpus) {
            launch.add_vcpu(vcpu, state)?;
        }
        log::debug!("launch: {} vCPUs; measuring", self.vcpus.len());
        launch.seal()
    }
}

/// Error of any platform, with the step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{platform}: {step}")]
pub struct PlatformError {
    /// Short platform name, e.g. "sev-snp".
    pub platform: &'static str,
    /// What was being done, e.g. "adding the page at 0xfffff000".
    pub step: String,
    /// Cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl PlatformError {
    /// Names the platform and the step that an error belongs to, for `map_err`.
    pub fn at<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        platform: &'static str,
        step: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |source| Self {
            platform,
            step,
            source: source.into(),
        }
    }
}

/// The empty machine that a platform begins to launch: a VM with its memory slots, no vCPU yet.
#[derive(Clone, Debug)]
pub struct Foundation {
    /// The VM.
    pub vm: Arc<Vm>,
    /// The shared side of guest RAM, as the host has it mapped.
    pub ram: HostRam,
    /// The same as devices see it: private pages refused.
    pub shared: SharedMem,
    /// CPUID as the guest's first vCPU sees it.
    pub cpuid: CpuidTable,
}

/// Phase 1, before the VM exists.
pub trait Platform: Send {
    /// Name as on the command line.
    fn name(&self) -> &'static str;
    /// Argument of `KVM_CREATE_VM` (`KVM_X86_*_VM`).
    fn vm_type(&self) -> u64;
    /// True if guest RAM is private from the start and backed by guest_memfd.
    fn private_memory(&self) -> bool;
    /// Changes what the host offers in CPUID into what this platform's guests may see.
    fn adapt_cpuid(&self, cpuid: &mut CpuidTable);
    /// Initialises the VM for this platform. No vCPU may exist yet.
    ///
    /// # Errors
    /// What the host lacks or firmware refuses.
    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError>;
}

/// Phase 2, between VM creation and the first `KVM_RUN`.
pub trait Launch {
    /// Adds initial state; call order is measurement order. `page.bytes` may be corrected by firmware.
    ///
    /// # Errors
    /// What firmware or kernel refuses.
    fn add_page(&mut self, page: &mut LaunchPage) -> Result<(), PlatformError>;
    /// Gives a vCPU its boot state; call order is vCPU order.
    ///
    /// # Errors
    /// What firmware or kernel refuses.
    fn add_vcpu(&mut self, vcpu: &mut Vcpu, state: &BootState) -> Result<(), PlatformError>;
    /// Freezes the image. Consumes the launch, so nothing can be added afterwards.
    ///
    /// # Errors
    /// What firmware or kernel refuses.
    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError>;
}

/// What the machine does after a platform exit.
pub enum PlatformFlow {
    /// Enter the guest again.
    Resume,
    /// Let KVM finish what the exit interrupted without running the guest, then drop this and go on.
    Finish(Box<dyn Send>),
    /// The guest ended itself; the reason in words, safe to print.
    Terminated(String),
}

impl std::fmt::Debug for PlatformFlow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Resume => f.write_str("Resume"),
            Self::Finish(_) => f.write_str("Finish"),
            Self::Terminated(why) => f.debug_tuple("Terminated").field(why).finish(),
        }
    }
}

/// Phase 3, shared by all vCPU threads.
pub trait Sealed: Send + Sync + std::fmt::Debug {
    /// Serves an exit that only this platform understands.
    ///
    /// # Errors
    /// The host cannot serve it; the VM ends.
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError>;
    /// What the guest did if `KVM_RUN` fails with `error`; `None` if that can only be the host's fault.
    fn explain_failure(&self, error: &io::Error) -> Option<String> {
        let _ = error;
        None
    }
    /// What the guest did if the CPU refuses to enter it for `reason`; `None` if that can only be the host's fault.
    fn explain_entry_failure(&self, reason: u64) -> Option<String> {
        let _ = reason;
        None
    }
}
