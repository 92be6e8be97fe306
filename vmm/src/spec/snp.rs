//! What an SEV-SNP launch is given, read and checked.

use std::path::PathBuf;

use super::file::{FileError, InputFile};
use crate::config::{Policy, Snp};

/// Options of an SEV-SNP launch.
#[derive(Debug)]
pub struct SnpSpec {
    /// Guest policy bits.
    pub policy: u64,
    /// Repeated by the attestation report.
    pub host_data: [u8; 32],
    /// ID block and ID authentication information.
    pub identity: Option<Identity>,
    /// File that holds the certificates; opened anew at each request because it may be replaced.
    pub certs: Option<PathBuf>,
    /// Debug registers are swapped by firmware.
    pub debug_swap: bool,
    /// The guest's time-stamp counter is out of the host's reach.
    pub secure_tsc: bool,
}

/// The tenant's identity: firmware refuses a launch with another digest.
#[derive(Debug)]
pub struct Identity {
    /// ID block (SEV-SNP firmware ABI, "ID Block Structure").
    pub block: Box<[u8; 96]>,
    /// ID authentication information (the same, "ID Authentication Information Structure").
    pub auth: Box<[u8; 4096]>,
}

/// SMT allowed, and the bit that must be one (SEV-SNP firmware ABI, "Guest Policy").
const DEFAULT_POLICY: u64 = 0x3_0000;
const MUST_BE_ONE: u64 = 1 << 17;

/// An option that no SEV-SNP launch can have.
#[derive(Debug, thiserror::Error)]
pub enum SnpOptionError {
    /// Options of SNP for another platform.
    #[error("{flag}: only an SNP guest has it; add --platform snp or remove it")]
    OtherPlatform {
        /// The first such flag.
        flag: &'static str,
    },
    /// The reserved policy bit is clear.
    #[error("snp-policy: {policy} lacks bit 17, which must be one; give {}", Policy(policy.0 | MUST_BE_ONE))]
    Policy {
        /// Policy asked for.
        policy: Policy,
    },
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
    /// A file has the wrong length.
    #[error("{role} {}: {bytes} bytes instead of {expected}; give what `cvmm id-block` wrote", path.display())]
    Length {
        /// "id-block" or "id-auth".
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The length that it must have.
        expected: usize,
    },
}

/// Refuses options of SNP for a guest that is none.
pub(super) fn check_absent(options: &Snp) -> Result<(), SnpOptionError> {
    let given = [
        ("--snp-policy", options.policy.is_some()),
        ("--host-data", options.host_data.is_some()),
        ("--id-block", options.id_block.is_some()),
        ("--id-auth", options.id_auth.is_some()),
        ("--snp-certs", options.certs.is_some()),
        ("--debug-swap", options.debug_swap),
        ("--secure-tsc", options.secure_tsc),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(SnpOptionError::OtherPlatform { flag }),
        None => Ok(()),
    }
}

impl SnpSpec {
    pub(super) fn check(options: &Snp) -> Result<Self, SnpOptionError> {
        let policy = options.policy.unwrap_or(Policy(DEFAULT_POLICY));
        if policy.0 & MUST_BE_ONE == 0 {
            return Err(SnpOptionError::Policy { policy });
        }
        let identity = match (&options.id_block, &options.id_auth) {
            (None, None) => None,
            (Some(block), Some(auth)) => Some(Identity {
                block: read("id-block", block)?,
                auth: read("id-auth", auth)?,
            }),
            (block, _) => {
                let (given, missing) = match block {
                    Some(_) => ("--id-block", "--id-auth"),
                    None => ("--id-auth", "--id-block"),
                };
                return Err(SnpOptionError::HalfIdentity { given, missing });
            }
        };
        if let Some(path) = &options.certs {
            InputFile::open("snp-certs", path)?;
        }
        Ok(Self {
            policy: policy.0,
            host_data: options.host_data.map_or([0; 32], |blob| blob.0),
            identity,
            certs: options.certs.clone(),
            debug_swap: options.debug_swap,
            secure_tsc: options.secure_tsc,
        })
    }
}

fn read<const N: usize>(role: &'static str, path: &std::path::Path) -> Result<Box<[u8; N]>, SnpOptionError> {
    let file = InputFile::open(role, path)?;
    let content = file.read_exactly().map_err(|cause| FileError::Unusable {
        role,
        path: path.into(),
        cause,
    })?;
    content.ok_or(SnpOptionError::Length {
        role,
        path: file.path,
        bytes: file.bytes,
        expected: N,
    })
}
