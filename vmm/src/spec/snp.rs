//! What an SEV-SNP launch is given, read and checked against what the host offers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snp::certs::{CertError, CertFile};
use snp::commands::Identity;
use snp::host::NotOffered;
use snp::id_block::{IdAuth, IdBlock, IdBlockError};
use snp::launch::LaunchConfig;
use snp::policy::{Policy, PolicyBit, PolicyError};
use snp::vmsa::SevFeatures;

use super::file::{FileError, InputFile};
use super::host::SnpHost;
use crate::config::Snp;

/// A checked SEV-SNP launch.
#[derive(Debug)]
pub struct SnpSpec {
    /// The open `/dev/sev`.
    pub sev: Arc<File>,
    /// Policy, features and identity; the host offers all of it.
    pub config: LaunchConfig,
    /// Certificates for extended reports.
    pub certs: Option<CertFile>,
}

/// An option that no SEV-SNP launch can have, or none here.
#[derive(Debug, thiserror::Error)]
pub enum SnpOptionError {
    /// Options of SNP for another platform.
    #[error("{flag}: only an SNP guest has it; add --platform snp or remove it")]
    OtherPlatform {
        /// The first such flag.
        flag: &'static str,
    },
    /// The policy is none.
    #[error("policy: {0}")]
    Policy(PolicyError),
    /// The host does not offer it.
    #[error(transparent)]
    NotOffered(#[from] NotOffered),
    /// One of the two files is missing.
    #[error("{given}: needs {missing} too; `cvmm id-block` makes both")]
    HalfIdentity {
        /// The flag given.
        given: &'static str,
        /// The one that is missing.
        missing: &'static str,
    },
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The ID block would be refused by firmware.
    #[error("id-block {}: {cause}", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: Box<IdBlockError>,
    },
    /// The certificates cannot be served.
    #[error("certs {}: {cause}", path.display())]
    Certs {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: CertError,
    },
}

/// Refuses options of SNP for a guest that is none.
pub(crate) fn check_absent(options: &Snp) -> Result<(), SnpOptionError> {
    let given = [
        ("--policy", options.policy.is_some()),
        ("--host-data", options.host_data.is_some()),
        ("--id-block", options.id_block.is_some()),
        ("--id-auth", options.id_auth.is_some()),
        ("--certs", options.certs.is_some()),
        ("--debug-swap", options.debug_swap),
        ("--secure-tsc", options.secure_tsc),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(SnpOptionError::OtherPlatform { flag }),
        None => Ok(()),
    }
}

/// The guest policy.
pub(crate) fn policy(options: &Snp) -> Result<Policy, SnpOptionError> {
    match options.policy {
        Some(policy) => Policy::from_bits(policy.0).map_err(SnpOptionError::Policy),
        None => Ok(Policy::default()),
    }
}

/// The features that every register set names.
pub(crate) fn features(options: &Snp) -> SevFeatures {
    let wishes = [
        (options.debug_swap, SevFeatures::DEBUG_SWAP),
        (options.secure_tsc, SevFeatures::SECURE_TSC),
    ];
    wishes
        .iter()
        .filter(|(wanted, _)| *wanted)
        .fold(SevFeatures::SNP, |all, (_, feature)| all.with(*feature))
}

impl SnpSpec {
    pub(super) fn check(options: &Snp, host: &SnpHost) -> Result<Self, SnpOptionError> {
        let (policy, features) = (policy(options)?, features(options));
        let certs = options.certs.as_deref().map(open_certs).transpose()?;
        host.offered.check(features, policy, certs.is_some())?;
        if policy.has(PolicyBit::Debug) {
            log::warn!("--policy {policy}; take a guest with such a policy for unprotected");
        }
        let config = LaunchConfig {
            features,
            policy,
            identity: Identity {
                id_block: identity(options)?,
                host_data: options.host_data.map_or([0; 32], |blob| blob.0),
                ..Identity::default()
            },
            certificates: certs.is_some(),
        };
        Ok(Self {
            sev: Arc::clone(&host.sev),
            config,
            certs,
        })
    }
}

fn open_certs(path: &Path) -> Result<CertFile, SnpOptionError> {
    CertFile::new(path).map_err(|cause| SnpOptionError::Certs {
        path: path.into(),
        cause,
    })
}

type Signed = (IdBlock, Box<IdAuth>);

/// ID block and ID auth, as firmware would check them but for the digest, which is not known yet.
fn identity(options: &Snp) -> Result<Option<Signed>, SnpOptionError> {
    let (path, auth_path) = match (&options.id_block, &options.id_auth) {
        (None, None) => return Ok(None),
        (Some(block), Some(auth)) => (block, auth),
        (Some(_), None) => {
            return Err(SnpOptionError::HalfIdentity {
                given: "--id-block",
                missing: "--id-auth",
            });
        }
        (None, Some(_)) => {
            return Err(SnpOptionError::HalfIdentity {
                given: "--id-auth",
                missing: "--id-block",
            });
        }
    };
    let wrong = |cause| SnpOptionError::Identity {
        path: path.clone(),
        cause: Box::new(cause),
    };
    let block = IdBlock::parse(&read("id-block", path)?).map_err(wrong)?;
    let auth = IdAuth::parse(&read("id-auth", auth_path)?).map_err(wrong)?;
    auth.check(&block).map_err(wrong)?;
    Ok(Some((block, auth)))
}

/// More than either file may have, so that a longer one is seen to be too long.
const MOST_BYTES: usize = 4097;

fn read(role: &'static str, path: &Path) -> Result<Vec<u8>, SnpOptionError> {
    let file = InputFile::open(role, path)?;
    Ok(file.read_start(role, MOST_BYTES)?)
}
