//! The one place that knows which platforms exist.

mod snp;
mod soft;

use arch::platform::Platform;

use crate::plan::Mode;
use crate::spec::PlatformSpec;

/// Opens the platform.
pub fn open(spec: &PlatformSpec) -> Box<dyn Platform> {
    match spec {
        PlatformSpec::Soft => Box::new(soft::Soft),
        PlatformSpec::Snp(spec) => Box::new(snp::Snp::new(spec)),
    }
}

/// How the shim is entered on a platform.
pub fn mode(spec: &PlatformSpec) -> Mode {
    match spec {
        PlatformSpec::Soft => Mode::Soft,
        PlatformSpec::Snp(_) => Mode::Snp,
    }
}
