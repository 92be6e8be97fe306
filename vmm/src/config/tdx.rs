//! What only an Intel TDX launch needs.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::blob::Blob48;
use super::text::{BadValue, bad, number, serde_as_text};

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
    /// Where the guest's quotes come from: the Unix socket of the host's quote generation service (QGS), or its vsock
    /// address. Without it, and while nobody listens there, a request for a quote fails at once; while nobody answers,
    /// after 25 seconds
    #[arg(long, value_name = "PATH|vsock=CID:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quote_service: Option<QuoteService>,
}

impl Tdx {
    pub(super) fn overlaid(self, flags: Self) -> Self {
        Self {
            td_attributes: flags.td_attributes.or(self.td_attributes),
            mrconfigid: flags.mrconfigid.or(self.mrconfigid),
            mrowner: flags.mrowner.or(self.mrowner),
            mrownerconfig: flags.mrownerconfig.or(self.mrownerconfig),
            quote_service: flags.quote_service.or(self.quote_service),
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

/// Where a quote generation service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuoteService {
    /// A Unix socket.
    Unix(PathBuf),
    /// A vsock port; context id 1 is this machine, 2 the host below it.
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl FromStr for QuoteService {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let form = "write the path of a Unix socket, or vsock=CID:PORT, for example vsock=2:4050";
        match text.strip_prefix("vsock=") {
            None if text.is_empty() => bad(form),
            None => Ok(Self::Unix(text.into())),
            Some(address) => match address.split_once(':') {
                Some((cid, port)) => Ok(Self::Vsock {
                    cid: number("cid", cid)?,
                    port: number("port", port)?,
                }),
                None => bad(form),
            },
        }
    }
}

impl fmt::Display for QuoteService {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(to),
            Self::Vsock { cid, port } => write!(to, "vsock={cid}:{port}"),
        }
    }
}
serde_as_text!(QuoteService);
