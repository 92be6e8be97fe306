//! `cvmm quote`: reads an attestation quote of a TDX guest and verifies it, check by check.

mod answer;
mod expected;

use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use tdx::measure::Measurement;
use tdx::quote::verify::{Collateral, CollateralError, TCB_STATUSES, verify};
use tdx::quote::{self, QuoteError};

use crate::checks::conclude;
use crate::ending::ExitClass;
use crate::evidence::{self, Unread};
use crate::hex::padded;
use crate::report::LAST_SECOND;
use crate::spec::file::FileError;

use answer::{Answer, Chain};
use expected::{Expected, NoPrediction};

#[derive(clap::Args, Clone, Debug)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// The quote as a guest reads it from outblob, in hexadecimal digits or in base64; `-` is standard input
    #[arg(value_name = "FILE")]
    pub quote: PathBuf,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub signer: Signer,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub wishes: Wishes,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Who signed it")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Signer {
    /// What Intel publishes about the host: JSON as the tool dcap-qvl writes it. Without it no quote verifies
    #[arg(long, value_name = "PATH")]
    pub collateral: Option<PathBuf>,
    /// Time at which certificates and collateral have to be valid, in seconds since 1970 [default: now]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=LAST_SECOND))]
    pub at: Option<u64>,
    /// State of the host's TCB to accept beside UpToDate; repeat for more
    #[arg(long = "accept-tcb", value_name = "STATUS", value_parser = TCB_STATUSES)]
    pub tcb: Vec<String>,
}

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "What the quote has to state")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Wishes {
    /// What `cvmm measure --platform tdx --json` printed: MRTD, those RTMRs that it predicts, and the owner's fields that
    /// it was given
    #[arg(long, value_name = "PATH")]
    pub measure_json: Option<PathBuf>,
    /// MRTD, the digest of the initial image; repeat to accept several
    #[arg(long, value_name = "HEX")]
    pub mrtd: Vec<Measurement>,
    /// RTMR0, which cvmm's shim leaves at zero
    #[arg(long, value_name = "HEX")]
    pub rtmr0: Option<Measurement>,
    /// RTMR1, the kernel
    #[arg(long, value_name = "HEX")]
    pub rtmr1: Option<Measurement>,
    /// RTMR2, command line and initial RAM disk
    #[arg(long, value_name = "HEX")]
    pub rtmr2: Option<Measurement>,
    /// RTMR3, which is the guest's own
    #[arg(long, value_name = "HEX")]
    pub rtmr3: Option<Measurement>,
    /// MRCONFIGID
    #[arg(long, value_name = "HEX")]
    pub mrconfigid: Option<Measurement>,
    /// MROWNER
    #[arg(long, value_name = "HEX")]
    pub mrowner: Option<Measurement>,
    /// MROWNERCONFIG
    #[arg(long, value_name = "HEX")]
    pub mrownerconfig: Option<Measurement>,
    /// MRSEAM, the TDX module; repeat to accept several
    #[arg(long, value_name = "HEX")]
    pub mrseam: Vec<Measurement>,
    /// REPORTDATA, the nonce that the guest put in: up to 64 bytes, the rest zeros
    #[arg(long, visible_alias = "nonce", value_name = "HEX", value_parser = padded::<64>)]
    pub report_data: Option<[u8; 64]>,
    /// Accept a guest that the host may debug, which protects nothing
    #[arg(long)]
    pub allow_debug: bool,
}

/// A quote that cannot be examined.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// The quote's file, or standard input.
    #[error(transparent)]
    Unread(#[from] Unread),
    /// Another file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Standard output.
    #[error("writing to standard output")]
    Unwritten(#[source] io::Error),
    /// No quote.
    #[error("quote")]
    Quote(#[from] QuoteError),
    /// No collateral.
    #[error("collateral")]
    Collateral(#[from] CollateralError),
    /// No prediction.
    #[error("measure-json")]
    Prediction(#[from] NoPrediction),
}

impl Unreadable {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        match self {
            Self::Unwritten(_) | Self::Unread(Unread::Stdin { .. }) => ExitClass::HostFailed,
            Self::Unread(Unread::File(_))
            | Self::File(_)
            | Self::Quote(_)
            | Self::Collateral(_)
            | Self::Prediction(_) => ExitClass::Usage,
        }
    }
}

/// Longest collateral that is read; it has some 20 to 200 KiB, most of it revocation lists.
const MOST_COLLATERAL_BYTES: usize = 4 << 20;

/// Verifies the quote that `args` name, and prints what came of it.
///
/// # Errors
/// See [`Unreadable`]; a quote that was examined and does not verify is no error.
pub fn run(args: &Args) -> Result<ExitClass, Unreadable> {
    // No text begins with the bytes of a version.
    let bytes = evidence::read("quote", &args.quote, |bytes| bytes.get(1) == Some(&0))?;
    let quote = quote::parse(&bytes)?;
    let expected = Expected::of(&args.wishes)?;
    let chain = match &args.signer.collateral {
        None => Chain::NotVerified,
        Some(path) => {
            let json = evidence::file("collateral", path, MOST_COLLATERAL_BYTES)?;
            let verified = verify(
                &quote,
                &Collateral::parse(&json)?,
                args.signer.at.unwrap_or_else(now),
            );
            Chain::Verified(verified)
        }
    };
    let answer = Answer::new(&quote, &chain, &args.signer.tcb, &expected);
    conclude(&answer, args.json, answer.verified()).map_err(Unreadable::Unwritten)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
