//! The one place that knows which platforms exist.

mod soft;

use std::sync::Arc;

use arch::platform::Platform;
use shim::reason::Reason;
use snp::platform::Snp;

use crate::plan::Mode;
use crate::spec::PlatformSpec;

/// Opens the platform.
pub fn open(spec: &PlatformSpec) -> Box<dyn Platform> {
    match spec {
        PlatformSpec::Soft => Box::new(soft::Soft),
        PlatformSpec::Snp(spec) => {
            let words = |code| Reason::from_code(code).map(|reason| reason.to_string());
            Box::new(Snp::new(
                Arc::clone(&spec.sev),
                spec.config.clone(),
                spec.certs.clone(),
                words,
            ))
        }
    }
}

/// How the shim is entered on a platform.
pub fn mode(spec: &PlatformSpec) -> Mode {
    match spec {
        PlatformSpec::Soft => Mode::Soft,
        PlatformSpec::Snp(_) => Mode::Snp,
    }
}
