//! What came of each check, as text and JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use tdx::quote::verify::{ChainFault, TcbLevel};
use tdx::quote::{Quote, Register};

use super::expected::Expected;
use crate::checks::{Check, Status};
use crate::hex::Hex;

/// Version of the JSON format; a field that changes its meaning makes it 2.
const SCHEMA: u32 = 1;
/// Room for the longest name of a check.
const NAMES: usize = 13;
const CHAIN: &str = "chain";

/// What came of the certificates behind a quote.
pub(super) enum Chain {
    /// There was no collateral.
    NotVerified,
    Verified(Result<TcbLevel, ChainFault>),
}

/// All checks of one quote.
#[derive(Serialize, Debug)]
pub(super) struct Answer {
    schema: u32,
    cvmm: &'static str,
    verified: bool,
    checks: Vec<Check>,
    quote: Fields,
}

/// What the quote states; true only if it verifies.
#[derive(Serialize, Debug)]
struct Fields {
    version: u16,
    body: &'static str,
    #[serde(flatten)]
    registers: BTreeMap<&'static str, String>,
    report_data: String,
    attributes: String,
    xfam: String,
    tee_tcb_svn: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tee_tcb_svn_2: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mrservicetd: Option<String>,
}

fn hex(bytes: &[u8]) -> String {
    Hex(bytes).to_string()
}

fn fields(quote: &Quote) -> Fields {
    let registers = Register::ALL.map(|register| (register.name(), quote.register(register).to_string()));
    let td15 = quote.td15();
    Fields {
        version: quote.version(),
        body: quote.kind().name(),
        registers: registers.into(),
        report_data: hex(&quote.report_data()),
        attributes: format!("{:#x}", quote.attributes().0),
        xfam: format!("{:#x}", quote.xfam()),
        tee_tcb_svn: hex(&quote.tee_tcb_svn()),
        tee_tcb_svn_2: td15.map(|(svn, _)| hex(&svn)),
        mrservicetd: td15.map(|(_, service)| hex(&service)),
    }
}

/// The checks of who signed: of the quote by itself, of its chain, and of the host's patches.
fn signer(quote: &Quote, chain: &Chain, accepted: &[String]) -> Vec<Check> {
    let fault = quote.check_signature().err().map(|fault| fault.to_string());
    let reasons: Vec<String> = fault.into_iter().collect();
    let by = "ECDSA P-256 by the key that the quoting enclave vouches for".to_owned();
    let mut checks = vec![Check::of("signature", &reasons, true, by)];
    match chain {
        Chain::NotVerified => checks.push(Check {
            name: CHAIN,
            status: Status::NotVerified,
            found: "signature chain not verified: whose enclave it is takes --collateral".into(),
        }),
        Chain::Verified(Err(fault)) => {
            checks.push(Check::of(CHAIN, &[fault.to_string()], true, String::new()));
        }
        Chain::Verified(Ok(level)) => {
            let up = "signed up to Intel's root, all valid".to_owned();
            checks.push(Check::of(CHAIN, &[], true, up));
            checks.push(tcb(level, accepted));
        }
    }
    checks
}

fn tcb(level: &TcbLevel, accepted: &[String]) -> Check {
    let mut words = level.status.clone();
    if !level.advisories.is_empty() {
        words = format!("{words}, lacks {}", level.advisories.join(" "));
    }
    let good = level.status == "UpToDate" || accepted.contains(&level.status);
    let reason = format!("{words}; update the host, or give --accept-tcb {}", level.status);
    let reasons = if good { vec![] } else { vec![reason] };
    Check::of("tcb", &reasons, true, words)
}

/// The checks of what is stated.
fn statements(quote: &Quote, expected: &Expected) -> Vec<Check> {
    let attributes = quote.attributes();
    let debug = (attributes.debug() && !expected.debug_allowed).then(|| {
        format!("{attributes}; nothing protects it, launch it without, or give --allow-debug for a trial")
    });
    let reasons: Vec<String> = debug.into_iter().collect();
    let mut checks = vec![Check::of("attributes", &reasons, true, attributes.to_string())];
    for register in Register::ALL {
        let (found, wanted) = (quote.register(register), expected.register(register));
        let reasons = if wanted.is_empty() || wanted.contains(&found) {
            vec![]
        } else {
            vec![format!("{found} is not the expected one")]
        };
        let compared = !wanted.is_empty();
        checks.push(Check::of(register.name(), &reasons, compared, found.to_string()));
    }
    let found = quote.report_data();
    let reasons = match expected.report_data {
        Some(wanted) if wanted != found => vec!["REPORTDATA is not the expected nonce".to_owned()],
        _ => vec![],
    };
    let compared = expected.report_data.is_some();
    checks.push(Check::of("report-data", &reasons, compared, hex(&found)));
    checks
}

impl Answer {
    pub(super) fn new(quote: &Quote, chain: &Chain, accepted: &[String], expected: &Expected) -> Self {
        let mut checks = signer(quote, chain, accepted);
        checks.extend(statements(quote, expected));
        let bad = |check: &Check| matches!(check.status, Status::Failed | Status::NotVerified);
        Self {
            schema: SCHEMA,
            cvmm: env!("CARGO_PKG_VERSION"),
            verified: !checks.iter().any(bad),
            checks,
            quote: fields(quote),
        }
    }

    /// True if every check passed that has to.
    pub(super) fn verified(&self) -> bool {
        self.verified
    }

    fn has(&self, name: &str, status: Status) -> bool {
        self.checks
            .iter()
            .any(|check| check.name == name && check.status == status)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            writeln!(f, "{check:NAMES$}")?;
        }
        let failed = self.checks.iter().any(|check| check.status == Status::Failed);
        f.write_str(if failed {
            "THE QUOTE DOES NOT VERIFY"
        } else if self.has(CHAIN, Status::NotVerified) {
            "THE QUOTE IS NOT VERIFIED: anybody can have made it; --collateral takes what tells"
        } else if self.has(Register::Mrtd.name(), Status::NotCompared) {
            "the quote verifies, but it may be of any guest; --mrtd says which one is meant"
        } else {
            "the quote verifies"
        })
    }
}
