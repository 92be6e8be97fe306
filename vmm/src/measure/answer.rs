//! What is known of a launch, as text and JSON.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use shim::config::Blob;
use snp::explain::{self, Step};
use snp::measure::{self, MeasureError, PageType};

use super::launch::{Launch, Source};
use super::ovmf;
use crate::config::{self, MachineVersion, PlatformName};
use crate::hex::Hex;

/// Version of the JSON format; a field that changes its meaning makes it 2.
pub(super) const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct Answer<'a> {
    schema: u32,
    cvmm: &'static str,
    platform: Option<PlatformName>,
    digest: String,
    cpus: usize,
    /// Pages that the security processor takes, without those of the vCPUs.
    pages: u64,
    sev_features: String,
    policy: String,
    host_data: String,
    #[serde(flatten)]
    what: What<'a>,
    /// Digests with 1, 2, … vCPUs.
    digests: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<JsonStep>>,
}

#[derive(Serialize)]
#[serde(tag = "payload", rename_all = "lowercase")]
enum What<'a> {
    Shim {
        machine: MachineVersion,
        kernel: Option<File<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        initrd: Option<File<'a>>,
        cmdline: &'a str,
    },
    Ovmf(&'a ovmf::Source),
}

#[derive(Serialize)]
pub(super) struct File<'a> {
    path: &'a Path,
    bytes: u64,
    sha256: String,
}

impl<'a> File<'a> {
    pub(super) fn of(path: &'a Path, blob: &Blob) -> Self {
        Self {
            path,
            bytes: blob.len,
            sha256: Hex(&blob.sha256).to_string(),
        }
    }
}

#[derive(Serialize)]
struct JsonStep {
    name: &'static str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpa: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    contents: Option<String>,
    digest: String,
}

impl From<&Step> for JsonStep {
    fn from(step: &Step) -> Self {
        let vcpu = step.kind == PageType::Vmsa;
        Self {
            name: step.name,
            kind: step.kind.name(),
            gpa: (!vcpu).then_some(step.at),
            vcpu: vcpu.then_some(step.at),
            contents: step.contents.map(|hash| Hex(&hash).to_string()),
            digest: step.digest.to_string(),
        }
    }
}

fn what(launch: &Launch) -> What<'_> {
    let boot = &launch.config.boot;
    match &launch.source {
        Source::Shim(payload) => What::Shim {
            machine: payload.machine,
            kernel: boot.kernel.as_deref().map(|path| File::of(path, &payload.kernel)),
            initrd: boot.initrd.as_deref().map(|path| File::of(path, &payload.initrd)),
            cmdline: &payload.cmdline,
        },
        Source::Ovmf(source) => What::Ovmf(source),
    }
}

/// Everything, as JSON; every page of it with `explained`.
pub(super) fn json(launch: &Launch, explained: bool) -> Result<String, MeasureError> {
    let digests = launch.digests()?;
    let steps = explained
        .then(|| explain::steps(&launch.plan, launch.features))
        .transpose()?;
    let answer = Answer {
        schema: SCHEMA,
        cvmm: env!("CARGO_PKG_VERSION"),
        platform: launch.config.platform,
        digest: digests.last().map(ToString::to_string).unwrap_or_default(),
        cpus: digests.len(),
        pages: measure::image(&launch.plan)?.pages(),
        sev_features: format!("{:#x}", launch.features.bits()),
        policy: format!("{:#x}", launch.policy.bits()),
        host_data: launch
            .config
            .snp
            .host_data
            .unwrap_or(config::Blob([0; 32]))
            .to_string(),
        what: what(launch),
        digests: digests.iter().map(ToString::to_string).collect(),
        steps: steps.map(|steps| steps.iter().map(JsonStep::from).collect()),
    };
    Ok(serde_json::to_string_pretty(&answer).unwrap_or_default())
}

/// A line for each number of vCPUs.
pub(super) fn table(launch: &Launch) -> Result<String, MeasureError> {
    let mut text = String::new();
    for (cpus, digest) in (1_usize..).zip(launch.digests()?) {
        let _ = writeln!(text, "{cpus} {digest}");
    }
    Ok(text)
}

/// A line for each page and vCPU.
pub(super) fn explain(launch: &Launch) -> Result<String, MeasureError> {
    let mut text = String::new();
    for step in explain::steps(&launch.plan, launch.features)? {
        let _ = writeln!(text, "{step}");
    }
    Ok(text)
}
