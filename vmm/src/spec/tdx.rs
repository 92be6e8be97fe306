//! What an Intel TDX launch is given. Attributes are checked when the launch begins, against what the module offers.

use ::tdx::launch::LaunchConfig;

use crate::config::{Blob48, Tdx};

/// A checked Intel TDX launch.
#[derive(Clone, Debug)]
pub struct TdxSpec {
    /// Attributes and identity.
    pub config: LaunchConfig,
}

/// An option that this guest cannot have.
#[derive(Debug, thiserror::Error)]
pub enum TdxOptionError {
    /// Options of TDX for another platform.
    #[error("{flag}: only a TDX guest has it; add --platform tdx or remove it")]
    OtherPlatform {
        /// The first such flag.
        flag: &'static str,
    },
}

/// Refuses options of TDX for a guest that is none.
pub(crate) fn check_absent(options: &Tdx) -> Result<(), TdxOptionError> {
    let given = [
        ("--td-attributes", options.td_attributes.is_some()),
        ("--mrconfigid", options.mrconfigid.is_some()),
        ("--mrowner", options.mrowner.is_some()),
        ("--mrownerconfig", options.mrownerconfig.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(TdxOptionError::OtherPlatform { flag }),
        None => Ok(()),
    }
}

impl TdxSpec {
    pub(super) fn of(options: &Tdx) -> Self {
        let id = |blob: Option<Blob48>| blob.map_or([0; 48], |blob| blob.0);
        let default = LaunchConfig::default();
        Self {
            config: LaunchConfig {
                attributes: options.td_attributes.map_or(default.attributes, |bits| bits.0),
                mrconfigid: id(options.mrconfigid),
                mrowner: id(options.mrowner),
                mrownerconfig: id(options.mrownerconfig),
            },
        }
    }
}
