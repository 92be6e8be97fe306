//! What only an SEV-SNP launch needs.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::blob::Blob32;
use super::text::{BadValue, bad, serde_as_text};

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "SEV-SNP")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Snp {
    /// Guest policy, a hexadecimal number [default: 0x30000, which is SMT allowed, no debugging]
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// 32 bytes (64 hexadecimal digits) that the attestation report repeats as HOST_DATA
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_data: Option<Blob32>,
    /// ID block (96 bytes): firmware refuses every other launch digest
    #[arg(long, value_name = "PATH", requires = "id_auth")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id_block: Option<PathBuf>,
    /// Signatures and keys that belong to the ID block (4096 bytes)
    #[arg(long, value_name = "PATH", requires = "id_block")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id_auth: Option<PathBuf>,
    /// Certificates handed to the guest with an extended report; read anew at each request
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certs: Option<PathBuf>,
    /// Let firmware swap the debug registers of the guest
    #[arg(long)]
    #[serde(skip_serializing_if = "super::is_false")]
    pub debug_swap: bool,
    /// Give the guest a time-stamp counter that the host cannot change
    #[arg(long)]
    #[serde(skip_serializing_if = "super::is_false")]
    pub secure_tsc: bool,
}

impl Snp {
    pub(super) fn overlaid(self, flags: Self) -> Self {
        Self {
            policy: flags.policy.or(self.policy),
            host_data: flags.host_data.or(self.host_data),
            id_block: flags.id_block.or(self.id_block),
            id_auth: flags.id_auth.or(self.id_auth),
            certs: flags.certs.or(self.certs),
            debug_swap: flags.debug_swap || self.debug_swap,
            secure_tsc: flags.secure_tsc || self.secure_tsc,
        }
    }
}

/// Guest policy bits (SEV-SNP firmware ABI, "Guest Policy").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy(pub u64);

impl FromStr for Policy {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(digits, 16) {
            Ok(bits) if plain => Ok(Self(bits)),
            _ => bad("not a hexadecimal number of 64 bits; write for example 0x30000"),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:#x}", self.0)
    }
}
serde_as_text!(Policy);
