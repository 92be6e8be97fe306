//! The one place that knows which platforms exist.

mod soft;

use std::sync::{Arc, Mutex, PoisonError};

use arch::measurement::{MeasureError, Measurement};
use arch::platform::{LaunchPlan, Platform};
use shim::layout;
use shim::reason::Reason;
use snp::measure;
use snp::platform::Snp;
use snp::vmsa::SevFeatures;
use tdx::get_quote::Source;
use tdx::measure::Order;
use tdx::platform::Tdx;

use crate::plan::Mode;
use crate::sandbox::{Sandbox, Thread};
use crate::spec::PlatformSpec;

/// Where a platform that measures leaves the digest of its launch once the guest is sealed.
#[derive(Clone, Debug, Default)]
pub struct Launched(Option<Arc<Mutex<Option<Measurement>>>>);

impl Launched {
    /// The digest of the launch; `None` before the guest is sealed, and on a platform that measures nothing.
    pub fn digest(&self) -> Option<Measurement> {
        let slot = self.0.as_ref()?;
        *slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the platform; its own threads live under `sandbox`.
pub fn open(spec: &PlatformSpec, sandbox: Sandbox) -> (Box<dyn Platform>, Launched) {
    match spec {
        PlatformSpec::Soft => (Box::new(soft::Soft), Launched::default()),
        PlatformSpec::Snp(spec) => {
            let words = |code| Reason::from_code(code).map(|reason| reason.to_string());
            let snp = Snp::new(
                Arc::clone(&spec.sev),
                spec.config.clone(),
                spec.certs.clone(),
                words,
            );
            let launched = Launched(Some(snp.digest()));
            (Box::new(snp), launched)
        }
        PlatformSpec::Tdx(spec) => {
            let quotes = spec.quotes.clone().map(|address| Source {
                address,
                enter: Arc::new(move || sandbox.confine(Thread::Quotes)),
            });
            let tdx = Tdx::new(spec.config.clone(), quotes, td_reason);
            let launched = Launched(Some(tdx.digest()));
            (Box::new(tdx), launched)
        }
    }
}

/// The shim's reason in words; `None` if the code is none of the shim's.
fn td_reason(code: u32) -> Option<String> {
    let [reason, ..] = code.to_le_bytes();
    let ours = code & !0xff == layout::TD_FATAL_MARK;
    ours.then(|| Reason::from_code(reason))?
        .map(|reason| reason.to_string())
}

/// How the shim is entered on a platform.
pub fn mode(spec: &PlatformSpec) -> Mode {
    match spec {
        PlatformSpec::Soft => Mode::Soft,
        PlatformSpec::Snp(_) => Mode::Snp,
        PlatformSpec::Tdx(_) => Mode::Tdx,
    }
}

/// The digest that `cvmm measure` prints for the same arguments.
///
/// # Errors
/// A mistake in the plan.
pub fn predict(spec: &PlatformSpec, plan: &LaunchPlan) -> Result<Measurement, MeasureError> {
    let features = match spec {
        PlatformSpec::Soft => SevFeatures::SNP,
        PlatformSpec::Snp(spec) => spec.config.features,
        PlatformSpec::Tdx(_) => return tdx::measure::mrtd(plan, Order::SinglePass),
    };
    measure::digest(plan, features)
}
