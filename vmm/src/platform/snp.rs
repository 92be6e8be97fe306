//! AMD SEV-SNP over the `snp` crate.

use std::fs::File;
use std::sync::{Arc, Mutex};

use arch::exit::PlatformExit;
use arch::kvm::vcpu::Vcpu;
use arch::mem::SharedMem;
use arch::platform::{Foundation, Launch, LaunchPage, PageKind, Platform, PlatformError, PlatformFlow, Sealed};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::BootState;
use shim::reason::Reason;
use snp::certs::CertFile;
use snp::cpuid_page;
use snp::error::SnpError;
use snp::exit::{CertAnswer, CertRequest, SnpExit};
use snp::ioctl::KvmSev;
use snp::launch::{LaunchConfig, Launching};
use vm_memory::{Bytes, GuestAddress};

use crate::cpuid;
use crate::spec::snp::SnpSpec;

/// `KVM_X86_SNP_VM`.
const SNP_VM: u64 = 4;

/// The platform.
#[derive(Debug)]
pub(super) struct Snp {
    sev: Arc<File>,
    config: LaunchConfig,
    certs: Option<CertFile>,
}

impl Snp {
    pub(super) fn new(spec: &SnpSpec) -> Self {
        Self {
            sev: Arc::clone(&spec.sev),
            config: spec.config.clone(),
            certs: spec.certs.clone(),
        }
    }
}

fn failed(
    step: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> PlatformError {
    PlatformError {
        platform: "sev-snp",
        step: step.into(),
        source: source.into(),
    }
}

impl Platform for Snp {
    fn name(&self) -> &'static str {
        "snp"
    }

    fn vm_type(&self) -> u64 {
        SNP_VM
    }

    fn private_memory(&self) -> bool {
        true
    }

    fn adapt_cpuid(&self, cpuid: &mut CpuidTable) {
        cpuid_page::sanitise(cpuid);
    }

    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError> {
        let commands = KvmSev::new(Arc::clone(&on.vm), Arc::clone(&self.sev));
        let launching =
            Launching::begin(commands, self.config.clone()).map_err(|e| failed("starting the launch", e))?;
        Ok(Box::new(SnpLaunch {
            launching,
            cpuid: on.cpuid,
            corrected: false,
            shared: on.shared,
            certs: self.certs.clone(),
        }))
    }
}

struct SnpLaunch {
    launching: Launching<KvmSev>,
    cpuid: CpuidTable,
    /// Firmware changed values of `cpuid`, which the vCPUs must see too.
    corrected: bool,
    shared: SharedMem,
    certs: Option<CertFile>,
}

impl SnpLaunch {
    /// Adds the CPUID page; where firmware wants other values, takes those and says so.
    fn add_cpuid(&mut self, page: &mut LaunchPage) -> Result<(), SnpError> {
        match self.launching.add(page) {
            Err(SnpError::CpuidRejected { corrections, .. }) => {
                for correction in &corrections {
                    log::warn!("firmware corrects the guest's CPUID: {correction}");
                }
                cpuid_page::accept(&corrections, &mut self.cpuid);
                self.corrected = true;
                self.launching.add(page)
            }
            other => other,
        }
    }
}

impl Launch for SnpLaunch {
    fn add_page(&mut self, page: &mut LaunchPage) -> Result<(), PlatformError> {
        let step = format!("adding {} at {:#x}", page.name, page.range.start().0);
        if page.kind != PageKind::Cpuid {
            return self.launching.add(page).map_err(|e| failed(step, e));
        }
        let table = cpuid::for_vcpu(self.cpuid.clone(), 0);
        page.bytes = cpuid_page::build(&table).map_err(|e| failed(step.clone(), e))?;
        self.add_cpuid(page).map_err(|e| failed(step, e))
    }

    fn add_vcpu(&mut self, vcpu: &mut Vcpu, state: &BootState) -> Result<(), PlatformError> {
        let index = vcpu.index();
        let set = || {
            if self.corrected {
                vcpu.set_cpuid(&cpuid::for_vcpu(self.cpuid.clone(), index))?;
            }
            vcpu.set_state(state)?;
            // Without this KVM waits for an INIT that an SNP guest never sends.
            if index == 0 { Ok(()) } else { vcpu.set_halted() }
        };
        set().map_err(|e| failed(format!("setting the registers of vCPU {index}"), e))?;
        self.launching.add_vcpu(state);
        Ok(())
    }

    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError> {
        let (commands, digest) = self
            .launching
            .finish()
            .map_err(|e| failed("sealing the guest", e))?;
        log::info!("launch digest {digest}");
        Ok(Box::new(SnpSealed {
            _commands: Mutex::new(commands),
            shared: self.shared,
            certs: self.certs,
        }))
    }
}

#[derive(Debug)]
struct SnpSealed {
    /// Keeps `/dev/sev` open under its number, by which KVM finds it for guest requests.
    _commands: Mutex<KvmSev>,
    shared: SharedMem,
    certs: Option<CertFile>,
}

impl SnpSealed {
    /// Answers; the lock on the file must be held until firmware has made the report.
    fn certificates(&self, request: CertRequest<'_>) -> Option<File> {
        let Some(certs) = &self.certs else {
            request.answer(CertAnswer::Failed);
            return None;
        };
        let at = GuestAddress(request.gpa().0);
        let served = certs.serve(request.pages(), |table| self.shared.write_slice(table, at).is_ok());
        request.answer(served.answer);
        served.lock
    }
}

impl Sealed for SnpSealed {
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        let reason = exit.reason;
        match SnpExit::decode(exit) {
            Some(SnpExit::Terminated(termination)) => {
                let own = |code| Reason::from_code(code).map(|reason| reason.to_string());
                Ok(PlatformFlow::Terminated(termination.words(own)))
            }
            Some(SnpExit::Certificates(request)) => Ok(match self.certificates(request) {
                Some(lock) => PlatformFlow::Finish(Box::new(lock)),
                None => PlatformFlow::Resume,
            }),
            None => Err(failed(
                format!("serving exit {reason}"),
                "an SNP guest has no such exit; report this",
            )),
        }
    }
}
