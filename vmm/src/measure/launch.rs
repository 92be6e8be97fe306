//! From arguments to a plan, without a host.

use arch::platform::LaunchPlan;
use snp::measure::{self, MeasureError, Measurement};
use snp::policy::Policy;
use snp::vmsa::SevFeatures;

use super::ovmf::PayloadName;
use super::{Subject, Unpredictable, ovmf, size};
use crate::config::{Config, PlatformName, Size};
use crate::plan::{self, Mode, Payload};
use crate::spec::payload;
use crate::spec::snp::{self as options, check_absent};
use crate::spec::tdx;

/// A launch, and what it was made of.
#[derive(Debug)]
pub struct Launch {
    /// Pages and registers in order.
    pub plan: LaunchPlan,
    /// Part of every register set.
    pub features: SevFeatures,
    /// As in the report; not part of the digest.
    pub policy: Policy,
    /// The configuration with its defaults; `auto` is decided.
    pub config: Config,
    /// What boots.
    pub source: Source,
}

/// What boots, by its hashes.
#[derive(Debug)]
pub enum Source {
    /// A kernel, through cvmm's shim.
    Shim(Payload),
    /// A firmware image, perhaps with a kernel.
    Ovmf(ovmf::Source),
}

impl Launch {
    /// Plans the launch of `subject` as `cvmm run` does; `given` is its configuration.
    ///
    /// # Errors
    /// See [`Unpredictable`].
    pub fn plan(subject: &Subject, given: Config) -> Result<Self, Unpredictable> {
        if subject.two_pass {
            return Err(Unpredictable::OneOrder);
        }
        if subject.ovmf.payload == Some(PayloadName::Tdvf) {
            return Err(Unpredictable::TdvfElsewhere);
        }
        let mut config = given.clone().with_defaults();
        let cpus = size::check_cpus(config.cpus.unwrap_or(0), u32::MAX)?;
        let firmware = subject.ovmf.firmware()?;
        let mode = match config.platform.unwrap_or(PlatformName::Auto) {
            PlatformName::Soft if firmware.is_some() => return Err(Unpredictable::SoftFirmware),
            PlatformName::Soft => Mode::Soft,
            PlatformName::Auto | PlatformName::Snp => Mode::Snp,
            PlatformName::Tdx => return Err(Unpredictable::NotSnp),
        };
        tdx::check_absent(&config.tdx)?;
        if mode == Mode::Soft {
            check_absent(&config.snp)?;
        } else {
            config.platform = Some(PlatformName::Snp);
        }
        let policy = options::policy(&config.snp)?;
        let wished = options::features(&config.snp);
        if let Some(firmware) = firmware {
            // The default command line is `cvmm run`'s, not QEMU's.
            let (source, plan) = ovmf::plan(&subject.ovmf, firmware, &given.boot, cpus)?;
            return Ok(Self {
                plan,
                features: subject.ovmf.features().unwrap_or(wished),
                policy,
                config,
                source: Source::Ovmf(source),
            });
        }
        // The digest depends on no memory size, so only what fits no guest at all is refused.
        let files = payload::Payload::check(&config.boot, Size(u64::MAX))?;
        let payload = Payload::of(config.machine.unwrap_or_default(), &files)?;
        Ok(Self {
            plan: plan::launch_plan(mode, &payload, cpus)?,
            features: wished,
            policy,
            config,
            source: Source::Shim(payload),
        })
    }

    /// The digest with all vCPUs.
    ///
    /// # Errors
    /// A mistake in the plan.
    pub fn digest(&self) -> Result<Measurement, MeasureError> {
        measure::digest(&self.plan, self.features)
    }

    /// The digests with 1, 2, … vCPUs.
    ///
    /// # Errors
    /// A mistake in the plan.
    pub fn digests(&self) -> Result<Vec<Measurement>, MeasureError> {
        measure::by_vcpus(&self.plan, self.features)
    }
}
