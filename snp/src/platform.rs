//! SNP behind the traits that the machine knows.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::exit::PlatformExit;
use arch::kvm::vcpu::Vcpu;
use arch::mem::SharedMem;
use arch::platform::{
    Foundation, Launch, LaunchPage, PageKind, Platform, PlatformError, PlatformFlow, Sealed,
};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::BootState;
use vm_memory::{Bytes, GuestAddress};

use crate::certs::CertFile;
use crate::cpuid_page;
use crate::error::SnpError;
use crate::exit::{CertAnswer, CertRequest, OwnReasons, SnpExit};
use crate::host;
use crate::ioctl::KvmSev;
use crate::launch::{LaunchConfig, Launching};
use crate::measure::Measurement;

/// Name in messages and on the command line.
const NAME: &str = "snp";

/// The platform; one per VM.
#[derive(Debug)]
pub struct Snp {
    sev: Arc<File>,
    config: LaunchConfig,
    certs: Option<CertFile>,
    reasons: OwnReasons,
    digest: Arc<Mutex<Option<Measurement>>>,
}

impl Snp {
    /// A platform on the open `/dev/sev` (see [`host::open`]); `reasons` knows the codes with which the measured
    /// firmware terminates. `config.certificates` follows from `certs`.
    pub fn new(sev: Arc<File>, config: LaunchConfig, certs: Option<CertFile>, reasons: OwnReasons) -> Self {
        let config = LaunchConfig {
            certificates: certs.is_some(),
            ..config
        };
        Self {
            sev,
            config,
            certs,
            reasons,
            digest: Arc::default(),
        }
    }

    /// Where the launch digest appears once the guest is sealed.
    pub fn digest(&self) -> Arc<Mutex<Option<Measurement>>> {
        Arc::clone(&self.digest)
    }
}

fn error<E: std::error::Error + Send + Sync + 'static>(
    step: impl Into<String>,
) -> impl FnOnce(E) -> PlatformError {
    PlatformError::at(NAME, step)
}

impl Platform for Snp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn vm_type(&self) -> u64 {
        host::VM_TYPE
    }

    fn private_memory(&self) -> bool {
        true
    }

    fn adapt_cpuid(&self, cpuid: &mut CpuidTable) {
        cpuid_page::sanitise(cpuid);
    }

    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError> {
        let commands = KvmSev::new(on.vm, Arc::clone(&self.sev));
        let launching =
            Launching::begin(commands, self.config.clone()).map_err(error("beginning the launch"))?;
        let guest = Guest {
            _sev: Arc::clone(&self.sev),
            certs: self.certs.clone(),
            shared: on.shared,
            reasons: self.reasons,
        };
        let digest = Arc::clone(&self.digest);
        Ok(Box::new(SnpLaunch {
            launching,
            guest,
            cpuid: on.cpuid,
            corrected: false,
            digest,
        }))
    }
}

struct SnpLaunch {
    launching: Launching<KvmSev>,
    guest: Guest,
    cpuid: CpuidTable,
    /// Firmware changed values of `cpuid`, which the vCPUs must see too.
    corrected: bool,
    digest: Arc<Mutex<Option<Measurement>>>,
}

impl SnpLaunch {
    /// Adds the CPUID page. Where firmware wants other values, it gets them, the vCPUs too, and the log says so:
    /// the guest believes only what firmware has checked, and the host cannot offer more than that anyway.
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
        let step = format!("adding \"{}\" at {:#x}", page.name, page.range.start().0);
        if page.kind != PageKind::Cpuid {
            return self.launching.add(page).map_err(error(step));
        }
        if page.bytes.is_empty() {
            // Not measured, so a plan leaves it to the host that launches.
            let table = self.cpuid.clone().for_vcpu(0);
            page.bytes = cpuid_page::build(&table).map_err(error(step.clone()))?;
        }
        self.add_cpuid(page).map_err(error(step))
    }

    fn add_vcpu(&mut self, vcpu: &mut Vcpu, state: &BootState) -> Result<(), PlatformError> {
        let index = vcpu.index();
        if self.corrected {
            vcpu.set_cpuid(&self.cpuid.clone().for_vcpu(index))
                .map_err(error(format!("setting CPUID of vCPU {index}")))?;
        }
        vcpu.set_state(state)
            .map_err(error(format!("setting the registers of vCPU {index}")))?;
        if index != 0 {
            // KVM starts a further vCPU by the guest's AP_CREATE only if it finds it halted.
            vcpu.set_halted()
                .map_err(error(format!("parking vCPU {index}")))?;
        }
        self.launching.add_vcpu(state);
        Ok(())
    }

    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError> {
        let (_, digest) = self.launching.finish().map_err(error("sealing the guest"))?;
        *self.digest.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
        Ok(Box::new(self.guest))
    }
}

/// A sealed guest.
#[derive(Debug)]
struct Guest {
    /// KVM issues the guest's report requests through this descriptor's number.
    _sev: Arc<File>,
    certs: Option<CertFile>,
    shared: SharedMem,
    reasons: OwnReasons,
}

impl Guest {
    /// Answers; the lock on the file must be held until firmware has made the report.
    fn certificates(&self, request: CertRequest<'_>) -> Option<File> {
        let Some(file) = &self.certs else {
            request.answer(CertAnswer::Failed);
            return None;
        };
        let at = GuestAddress(request.gpa().0);
        let served = file.serve(request.pages(), |table| {
            // A conversion of these pages by another vCPU waits, or is seen here.
            let _batch = self.shared.batch();
            self.shared.write_slice(table, at).is_ok()
        });
        request.answer(served.answer);
        served.lock
    }
}

/// An exit that no SNP guest makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "KVM_RUN left with reason {reason}, event {event}, which no SNP guest causes; report this as a bug in cvmm"
)]
pub struct UnknownExit {
    reason: u32,
    event: u32,
}

/// What an SNP guest did if `KVM_RUN` fails with `error` (Linux 7.2, arch/x86/kvm/svm/sev.c, `sev_handle_vmgexit` and
/// `snp_handle_guest_req`).
fn explain_failure(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EINVAL => Some("it asked the host for something that KVM does not know (VMGEXIT)"),
        libc::EIO => Some(
            "it gave pages for an attestation request that KVM cannot use, or KVM has given the VM up \
             (`dmesg | grep -i kvm` on the host tells which)",
        ),
        _ => None,
    }
}

/// `SVM_EXIT_ERR`: the save area is invalid or gone. The guest made all save areas but the first ones, and gives back what
/// it likes.
const INVALID_SAVE_AREA: u64 = u64::MAX;

impl Sealed for Guest {
    fn explain_failure(&self, error: &io::Error) -> Option<String> {
        explain_failure(error).map(Into::into)
    }

    fn explain_entry_failure(&self, reason: u64) -> Option<String> {
        (reason == INVALID_SAVE_AREA)
            .then(|| "a vCPU's save area is invalid, or the guest gave it back".into())
    }

    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        let unknown = UnknownExit {
            reason: exit.reason,
            event: crate::bytes::le32(exit.body, 0).unwrap_or(0),
        };
        match SnpExit::decode(exit) {
            Some(SnpExit::Terminated(termination)) => {
                Ok(PlatformFlow::Terminated(termination.words(self.reasons)))
            }
            Some(SnpExit::Certificates(request)) => Ok(match self.certificates(request) {
                Some(lock) => PlatformFlow::Finish(Box::new(lock)),
                None => PlatformFlow::Resume,
            }),
            None => Err(error("handling an exit")(unknown)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use arch::addr::{Gpa, PageRange};
    use arch::mem::map::HostRam;
    use arch::mem::{Visibility, VisibilityMap, Watch};
    use vm_memory::Permissions;

    use super::*;
    use crate::bytes::{le64, put};
    use crate::certs::CertTable;

    /// Tells whether a conversion that begins just before an access waits for it.
    #[derive(Debug)]
    struct Converts {
        visible: Arc<VisibilityMap>,
        waited: Mutex<Option<bool>>,
    }

    impl Watch for Converts {
        fn before(&self, at: Gpa, _: u64, _: Permissions) {
            let (done, drained) = channel();
            let visible = Arc::clone(&self.visible);
            std::thread::spawn(move || {
                visible.drain(PageRange::new(at, 4096).unwrap(), Duration::ZERO);
                let _ = done.send(());
            });
            let waits = drained.recv_timeout(Duration::from_millis(100)).is_err();
            *self.waited.lock().unwrap() = Some(waits);
        }
    }

    #[test]
    fn failures_that_a_guest_can_cause_are_the_guests() {
        let explain = |errno| explain_failure(&io::Error::from_raw_os_error(errno));
        assert!(explain(libc::EINVAL).is_some_and(|why| why.contains("VMGEXIT")));
        assert!(explain(libc::EIO).is_some_and(|why| why.contains("attestation request")));
        for errno in [
            libc::EBADF,
            libc::ENOMEM,
            libc::EBUSY,
            libc::ETIMEDOUT,
            libc::EHWPOISON,
        ] {
            assert_eq!(explain(errno), None, "{errno}");
        }
    }

    /// Else the table could be written to a page whose shared side was given back already.
    #[test]
    fn a_conversion_waits_for_the_certificate_table() {
        let path = std::env::temp_dir().join(format!("cvmm-certificates-{}", std::process::id()));
        std::fs::write(&path, CertTable::default().to_bytes()).unwrap();
        let ram = [PageRange::new(Gpa(0), 1 << 20).unwrap()];
        let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Shared));
        let watch = Arc::new(Converts {
            visible: Arc::clone(&visible),
            waited: Mutex::new(None),
        });
        let host = HostRam::allocate(&ram).unwrap();
        let shared = SharedMem::new(Arc::clone(host.map()), visible).watched(Arc::<Converts>::clone(&watch));
        let guest = Guest {
            _sev: Arc::new(File::open("/dev/null").unwrap()),
            certs: Some(CertFile::new(&path).unwrap()),
            shared,
            reasons: |_| None,
        };
        let mut body = [0; 256];
        put(&mut body, 0, &0x7000_u64.to_ne_bytes());
        put(&mut body, 8, &1_u64.to_ne_bytes());
        let exit = PlatformExit {
            vcpu: 0,
            reason: 43,
            body: &mut body,
        };
        assert!(matches!(guest.handle_exit(exit), Ok(PlatformFlow::Finish(_))));
        assert_eq!(le64(&body, 16), Some(0));
        assert_eq!(*watch.waited.lock().unwrap(), Some(true));
        std::fs::remove_file(path).unwrap();
    }
}
