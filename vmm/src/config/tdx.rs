//! What only an Intel TDX launch needs.

use std::fmt;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::blob::Blob48;
use super::text::{BadValue, bad, serde_as_text};

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Intel TDX")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Tdx {
    /// Attributes of the TD, a hexadecimal number [default: 0x10000000, which is SEPT_VE_DISABLE]
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub td_attributes: Option<Attributes>,
    /// 48 bytes (96 hexadecimal digits) that reports repeat as MRCONFIGID, for example a configuration's digest
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mrconfigid: Option<Blob48>,
    /// 48 bytes that reports repeat as MROWNER, for example the digest of the owner's key
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mrowner: Option<Blob48>,
    /// 48 bytes that reports repeat as MROWNERCONFIG
    #[arg(long, value_name = "HEX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mrownerconfig: Option<Blob48>,
}

impl Tdx {
    pub(super) fn overlaid(self, flags: Self) -> Self {
        Self {
            td_attributes: flags.td_attributes.or(self.td_attributes),
            mrconfigid: flags.mrconfigid.or(self.mrconfigid),
            mrowner: flags.mrowner.or(self.mrowner),
            mrownerconfig: flags.mrownerconfig.or(self.mrownerconfig),
        }
    }
}

/// ATTRIBUTES of a TD (Intel TDX Module ABI specification, "ATTRIBUTES").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes(pub u64);

impl FromStr for Attributes {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        match u64::from_str_radix(digits, 16) {
            Ok(bits) if plain => Ok(Self(bits)),
            _ => bad("no attributes; write a hexadecimal number, for example 0x10000000"),
        }
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:#x}", self.0)
    }
}
serde_as_text!(Attributes);
