//! TDX behind the traits that the machine knows.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::exit::PlatformExit;
use arch::kvm::gmem::Gmem;
use arch::kvm::vcpu::Vcpu;
use arch::kvm::vm::{MsiMessage, Vm};
use arch::mem::{Visibility, map};
use arch::platform::{Foundation, Launch, LaunchPage, Platform, PlatformError, PlatformFlow, Sealed};
use arch::x86::cpuid::CpuidTable;
use arch::x86::regs::BootState;

use crate::answers::{Answers, Terms};
use crate::cpuid;
use crate::exit::OwnReasons;
use crate::get_quote::Source;
use crate::host;
use crate::ioctl::KvmTdx;
use crate::launch::{LaunchConfig, Launching};
use crate::measure::Measurement;

/// Name in messages and on the command line.
const NAME: &str = "tdx";

/// Cycle of a TD's APIC timer: the module shows a crystal of 25 MHz.
const APIC_CYCLE_NS: u64 = 40;
/// Unit of a TD's time-stamp counter frequency, in kHz.
const TSC_UNIT_KHZ: u32 = 25_000;

/// Where the page of the reset vector is.
const RESET_PAGE: u64 = 0xffff_f000;
/// Memory slot of that page: above those of RAM, below those of the staging area.
const RESET_SLOT: u32 = 15;

/// The platform; one per VM.
#[derive(Debug)]
pub struct Tdx {
    config: LaunchConfig,
    quotes: Option<Source>,
    reasons: OwnReasons,
    digest: Arc<Mutex<Option<Measurement>>>,
}

impl Tdx {
    /// A platform for one launch. `quotes` is where quotes come from; `reasons` knows the codes with which the
    /// measured firmware gives up.
    pub fn new(config: LaunchConfig, quotes: Option<Source>, reasons: OwnReasons) -> Self {
        Self {
            config,
            quotes,
            reasons,
            digest: Arc::default(),
        }
    }

    /// Where MRTD appears once the guest is sealed.
    pub fn digest(&self) -> Arc<Mutex<Option<Measurement>>> {
        Arc::clone(&self.digest)
    }
}

fn error<E: std::error::Error + Send + Sync + 'static>(
    step: impl Into<String>,
) -> impl FnOnce(E) -> PlatformError {
    PlatformError::at(NAME, step)
}

impl Platform for Tdx {
    fn name(&self) -> &'static str {
        NAME
    }

    fn vm_type(&self) -> u64 {
        host::VM_TYPE
    }

    fn private_memory(&self) -> bool {
        true
    }

    fn adapt_cpuid(&self, table: &mut CpuidTable) {
        cpuid::adapt(table);
    }

    fn begin(&self, on: Foundation) -> Result<Box<dyn Launch>, PlatformError> {
        on.vm
            .set_apic_bus_cycle(APIC_CYCLE_NS)
            .map_err(error("setting the APIC timer's frequency"))?;
        let commands = KvmTdx::new(Arc::clone(&on.vm));
        let launching =
            Launching::begin(commands, &self.config, on.cpuid).map_err(error("beginning the launch"))?;
        let reset = reset_page(&on.vm).map_err(error("making the page of the reset vector"))?;
        let terms = Terms {
            reasons: self.reasons,
            user_calls: launching.user_calls(),
            quotes: self.quotes.clone(),
        };
        let vm = on.vm;
        // The guest decides how often, so it is said once.
        let told = AtomicBool::new(false);
        let interrupt = move |vcpu, vector| {
            if let Err(e) = vm.signal(MsiMessage::to_vcpu(vcpu, vector))
                && !told.swap(true, Ordering::Relaxed)
            {
                log::warn!("the guest is not told that its quote is there: {e}");
            }
        };
        let answers = Answers::new(on.shared, terms, Box::new(interrupt))
            .map_err(error("starting the thread for quotes"))?;
        let guest = Guest { reset, answers };
        Ok(Box::new(TdxLaunch {
            launching,
            guest,
            digest: Arc::clone(&self.digest),
        }))
    }
}

/// Private memory for the one page of the machine that lies outside RAM.
fn reset_page(vm: &Vm) -> io::Result<Gmem> {
    let range = PageRange::new(Gpa(RESET_PAGE), PAGE_SIZE).map_err(io::Error::other)?;
    let gmem = Gmem::new(vm, PAGE_SIZE)?;
    vm.map_slot(RESET_SLOT, map::map_bytes(range, &[])?, Some((&gmem, 0)))?;
    vm.set_visibility(range, Visibility::Private)?;
    Ok(gmem)
}

struct TdxLaunch {
    launching: Launching<KvmTdx>,
    guest: Guest,
    digest: Arc<Mutex<Option<Measurement>>>,
}

impl Launch for TdxLaunch {
    fn add_page(&mut self, page: &mut LaunchPage) -> Result<(), PlatformError> {
        let step = format!("adding \"{}\" at {:#x}", page.name, page.range.start().0);
        self.launching.add(page).map_err(error(step))
    }

    /// A TD's vCPUs begin at the reset vector, whatever `BootState` says.
    fn add_vcpu(&mut self, vcpu: &mut Vcpu, _: &BootState) -> Result<(), PlatformError> {
        let index = vcpu.index();
        let step = if index == 0 {
            "making vCPU 0 ready and loading the pages".to_owned()
        } else {
            format!("making vCPU {index} ready")
        };
        self.launching.add_vcpu(vcpu, index).map_err(error(step))?;
        if index == 0 {
            tell_tsc(vcpu);
        }
        Ok(())
    }

    fn seal(self: Box<Self>) -> Result<Box<dyn Sealed>, PlatformError> {
        let (_, digest) = self.launching.finish().map_err(error("sealing the guest"))?;
        *self.digest.lock().unwrap_or_else(PoisonError::into_inner) = Some(digest);
        Ok(Box::new(self.guest))
    }
}

/// KVM rounds the frequency without a word.
fn tell_tsc(vcpu: &Vcpu) {
    match vcpu.tsc_khz() {
        Ok(khz) => log::info!("the TD's time-stamp counter: {}", tsc_words(khz)),
        Err(e) => log::debug!("asking for the frequency of the time-stamp counter: {e}"),
    }
}

fn tsc_words(khz: u32) -> String {
    let units = khz / TSC_UNIT_KHZ;
    let mhz = units.saturating_mul(TSC_UNIT_KHZ) / 1000;
    match khz % TSC_UNIT_KHZ {
        0 => format!("{mhz} MHz, as the host's"),
        _ => format!("{mhz} MHz, the host's {khz} kHz rounded down to a multiple of 25 MHz"),
    }
}

/// What a TD did if `KVM_RUN` fails with `error`: `EIO` is the guest's doing on a sound host, and KVM's word for a VM
/// that it has given up.
pub fn explain_failure(error: &io::Error) -> Option<String> {
    const DEAD: &str = "it touched private memory that it had not accepted, or KVM has given the TD up \
         (`dmesg | grep -i tdx` on the host tells which)";
    (error.raw_os_error() == Some(libc::EIO)).then(|| DEAD.to_owned())
}

/// A sealed guest.
#[derive(Debug)]
struct Guest {
    /// Holds the reset page: without the file, the guest would lose it.
    #[expect(dead_code, reason = "kept for its lifetime")]
    reset: Gmem,
    answers: Answers,
}

/// An exit that no TD makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KVM_RUN left with reason {reason}, which no TD causes; report this as a bug in cvmm")]
pub struct UnknownExit {
    reason: u32,
}

impl Sealed for Guest {
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        let unknown = UnknownExit { reason: exit.reason };
        self.answers
            .serve(exit)
            .ok_or(unknown)
            .map_err(error("handling an exit"))
    }

    fn explain_failure(&self, error: &io::Error) -> Option<String> {
        explain_failure(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_frequency_is_a_multiple_of_25_mhz() {
        let cases = [
            (2_100_000, "2100 MHz, as the host's"),
            (
                2_194_843,
                "2175 MHz, the host's 2194843 kHz rounded down to a multiple of 25 MHz",
            ),
            (
                999,
                "0 MHz, the host's 999 kHz rounded down to a multiple of 25 MHz",
            ),
        ];
        for (khz, words) in cases {
            assert_eq!(tsc_words(khz), words);
        }
    }
}
