//! What an Intel TDX launch is given. Attributes are checked when the launch begins, against what the module offers.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use ::tdx::launch::LaunchConfig;
use ::tdx::qgs::Address;

use super::file::describe;
use super::socket::{SocketError, check_path};
use crate::config::{Blob48, QuoteService, Tdx};

/// A checked Intel TDX launch.
#[derive(Clone, Debug)]
pub struct TdxSpec {
    /// Attributes and identity.
    pub config: LaunchConfig,
    /// Where quotes come from.
    pub quotes: Option<Address>,
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
    /// The path of the quote service is too long.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The path of the quote service is no socket's.
    #[error("quote-service {}: is a {found}; give the socket of the QGS", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
}

/// Refuses options of TDX for a guest that is none.
pub(crate) fn check_absent(options: &Tdx) -> Result<(), TdxOptionError> {
    let given = [
        ("--td-attributes", options.td_attributes.is_some()),
        ("--mrconfigid", options.mrconfigid.is_some()),
        ("--mrowner", options.mrowner.is_some()),
        ("--mrownerconfig", options.mrownerconfig.is_some()),
        ("--quote-service", options.quote_service.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(TdxOptionError::OtherPlatform { flag }),
        None => Ok(()),
    }
}

/// A service that is not there may come later; something else in its place will not go.
fn check_socket(path: &Path) -> Result<(), TdxOptionError> {
    check_path("quote-service", path)?;
    match fs::metadata(path).map(|metadata| metadata.file_type()) {
        Ok(kind) if !kind.is_socket() => Err(TdxOptionError::NoSocket {
            path: path.into(),
            found: describe(kind),
        }),
        Ok(_) => Ok(()),
        Err(e) => {
            log::warn!(
                "quote-service {}: {e}; the guest gets no quote until the QGS runs",
                path.display()
            );
            Ok(())
        }
    }
}

fn quotes(service: &QuoteService) -> Result<Address, TdxOptionError> {
    Ok(match service {
        QuoteService::Unix(path) => {
            check_socket(path)?;
            Address::Unix(path.clone())
        }
        QuoteService::Vsock { cid, port } => Address::Vsock {
            cid: *cid,
            port: *port,
        },
    })
}

impl TdxSpec {
    pub(super) fn check(options: &Tdx) -> Result<Self, TdxOptionError> {
        Ok(Self {
            config: launch_config(options),
            quotes: options.quote_service.as_ref().map(quotes).transpose()?,
        })
    }
}

/// Attributes and identity, as `cvmm run` and `cvmm measure` understand them.
pub(crate) fn launch_config(options: &Tdx) -> LaunchConfig {
    let id = |blob: Option<Blob48>| blob.map_or([0; 48], |blob| blob.0);
    let default = LaunchConfig::default();
    LaunchConfig {
        attributes: options.td_attributes.map_or(default.attributes, |bits| bits.0),
        mrconfigid: id(options.mrconfigid),
        mrowner: id(options.mrowner),
        mrownerconfig: id(options.mrownerconfig),
    }
}
