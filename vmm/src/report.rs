//! `cvmm report`: reads an attestation report and verifies it, check by check.

mod answer;
mod input;
mod tcb;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use snp::certs::CertError;
use snp::measure::Measurement;
use snp::policy::PolicyError;
use snp::report::{CertificateError, Expected, ReportError, check};

use crate::checks::conclude;
use crate::config::{Blob32, Policy};
use crate::ending::ExitClass;
use crate::evidence::Unread;
use crate::hex::padded;
use crate::spec::file::FileError;

use answer::Answer;
use tcb::Levels;

#[derive(clap::Args, Clone, Debug)]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// The report as a guest reads it from outblob, in hexadecimal digits or in base64; `-` is standard input
    #[arg(value_name = "FILE")]
    pub report: PathBuf,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub certificates: Certificates,
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
#[command(next_help_heading = "Certificates")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Certificates {
    /// Table of certificates as the host hands it to the guest (auxblob); a root in it is not trusted
    #[arg(long, value_name = "PATH", required_unless_present = "vcek")]
    pub certs: Option<PathBuf>,
    /// Certificate of the key that signed the report, a VCEK's or a VLEK's, DER or PEM
    #[arg(long, visible_alias = "vlek", value_name = "PATH")]
    pub vcek: Option<PathBuf>,
    /// Certificate of the key that signed that one, an ASK's or an ASVK's, DER or PEM [default: the table's, or AMD's
    /// for Milan, Genoa and Turin]
    #[arg(long, value_name = "PATH")]
    pub ask: Option<PathBuf>,
    /// Trust this root instead of AMD's: for emulated hosts, DER or PEM
    #[arg(long, visible_alias = "root", value_name = "PATH")]
    pub ark: Option<PathBuf>,
    /// The root's list of revoked certificates, DER or PEM, as AMD gives it out for each family of chips; without it,
    /// only the end of Genoa's first intermediate key is known
    #[arg(long, value_name = "PATH")]
    pub crl: Option<PathBuf>,
    /// Time at which the certificates have to be valid, in seconds since 1970 [default: now]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=LAST_SECOND))]
    pub at: Option<u64>,
}

/// The end of the year 9999, the last that a certificate can state.
pub(crate) const LAST_SECOND: u64 = 253_402_300_799;

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "What the report has to state")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Wishes {
    /// Launch digest as `cvmm measure` prints it; repeat to accept several
    #[arg(long = "measurement", value_name = "HEX")]
    pub measurements: Vec<Measurement>,
    /// HOST_DATA
    #[arg(long, value_name = "HEX")]
    pub host_data: Option<Blob32>,
    /// REPORT_DATA, the nonce that the guest put in: up to 64 bytes, the rest zeros
    #[arg(long, visible_alias = "nonce", value_name = "HEX", value_parser = padded::<64>)]
    pub report_data: Option<[u8; 64]>,
    /// Digest of the key that signed the ID block, as `cvmm id-block` prints it
    #[arg(long, value_name = "HEX")]
    pub id_key_digest: Option<Measurement>,
    /// Digest of the key that signed the ID key
    #[arg(long, value_name = "HEX")]
    pub author_key_digest: Option<Measurement>,
    /// Lowest security version of the guest in its ID block; say with one of the two above whose block counts
    #[arg(long, value_name = "N", default_value = "0")]
    pub min_svn: u32,
    /// A policy; the guest's may give the host no more than this one [default: neither debugging nor migration]
    #[arg(long, value_name = "HEX")]
    pub policy: Option<Policy>,
    /// Lowest patch levels of the platform, now and when the guest was launched; absent ones are not looked at
    #[arg(long, value_name = "boot-loader=N,tee=N,snp=N,microcode=N,fmc=N")]
    pub min_tcb: Option<Levels>,
    /// Least privileged VMPL that may have asked for the report
    #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(u32).range(0..=3))]
    pub vmpl: u32,
    /// Accept a guest that the host may debug, which protects nothing
    #[arg(long)]
    pub allow_debug: bool,
}

/// A report that cannot be examined.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A file of certificates.
    #[error(transparent)]
    File(#[from] FileError),
    /// The report's file, or standard input.
    #[error(transparent)]
    Unread(#[from] Unread),
    /// Standard output.
    #[error("writing to standard output")]
    Unwritten(#[source] io::Error),
    /// No report.
    #[error("report")]
    Report(#[from] ReportError),
    /// The table of certificates.
    #[error("certs")]
    Certs(#[from] CertError),
    /// The table has no certificate for the report.
    #[error("certs: the table holds no VCEK or VLEK certificate; get the chip's from AMD and give --vcek")]
    NoSigner,
    /// Certificates that make no chain.
    #[error("certificates")]
    Chain(#[from] CertificateError),
    /// The policy expected is none.
    #[error("policy")]
    Policy(#[from] PolicyError),
    /// A security version that anybody can state.
    #[error(
        "min-svn: anybody can make an ID block with any security version; give --id-key-digest or \
         --author-key-digest, as cvmm id-block printed it, to say whose counts"
    )]
    SvnOfAnybody,
}

impl Unreadable {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        match self {
            Self::Unwritten(_) | Self::Unread(Unread::Stdin { .. }) => ExitClass::HostFailed,
            Self::Chain(CertificateError::NoIntermediate | CertificateError::NoRoot) => ExitClass::Mismatch,
            Self::File(_)
            | Self::Unread(Unread::File(_))
            | Self::Report(_)
            | Self::Certs(_)
            | Self::NoSigner
            | Self::Chain(CertificateError::Unreadable(_) | CertificateError::UnreadableList)
            | Self::SvnOfAnybody
            | Self::Policy(_) => ExitClass::Usage,
        }
    }
}

/// Verifies the report that `args` name, and prints what came of it.
///
/// # Errors
/// See [`Unreadable`]; a report that was examined and does not verify is no error.
pub fn run(args: &Args) -> Result<ExitClass, Unreadable> {
    let report = input::report(&args.report)?;
    let expected = expected(&args.wishes)?;
    let chain = input::chain(&args.certificates, &report)?;
    let since = args.certificates.at.map(Duration::from_secs);
    let given = since.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
    let now = given.unwrap_or_else(SystemTime::now);
    let failures = check(&report, &chain, &expected, now);
    let answer = Answer::new(&report, &expected, chain.has_list(), &failures);
    conclude(&answer, args.json, answer.verified()).map_err(Unreadable::Unwritten)
}

fn expected(wishes: &Wishes) -> Result<Expected, Unreadable> {
    let anybody = wishes.id_key_digest.is_none() && wishes.author_key_digest.is_none();
    if wishes.min_svn != 0 && anybody {
        return Err(Unreadable::SvnOfAnybody);
    }
    let policy = wishes
        .policy
        .map(|policy| snp::policy::Policy::from_bits(policy.0));
    Ok(Expected {
        measurements: wishes.measurements.clone(),
        policy: policy.transpose()?,
        tcb: wishes.min_tcb.unwrap_or_default().0,
        id_key_digest: wishes.id_key_digest.map(|digest| digest.0),
        author_key_digest: wishes.author_key_digest.map(|digest| digest.0),
        guest_svn: wishes.min_svn,
        host_data: wishes.host_data.map(|data| data.0),
        report_data: wishes.report_data,
        vmpl: wishes.vmpl,
        debug_allowed: wishes.allow_debug,
    })
}
