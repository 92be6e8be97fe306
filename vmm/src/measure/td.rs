//! A launch as a trust domain: MRTD, and the registers that cvmm's shim extends at boot.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use arch::addr::Gpa;
use arch::measurement::{MeasureError, Measurement};
use arch::platform::LaunchPlan;
use serde::Serialize;
use shim::config::CONFIG_LEN;
use shim::events::{self, TAG_CMDLINE, TAG_INITRD, TAG_KERNEL};
use shim::layout;
use tdx::explain::{self, Step};
use tdx::launch::LaunchConfig;
use tdx::measure::{Cost, Order, cost, mrtd, sha384};
use tdx::rtmr::{Event, Rtmrs};
use tdx::tdvf::Tdvf;

use super::answer::{File, SCHEMA};
use super::compare::{Shown, differ};
use super::ovmf::IMAGE_MAX;
use super::{Subject, Unpredictable, size};
use crate::config::{Boot, Config, MachineVersion, PlatformName, Size};
use crate::hex::Hex;
use crate::plan::{self, Mode, Payload};
use crate::spec::file::InputFile;
use crate::spec::payload;
use crate::spec::snp::check_absent;
use crate::spec::tdx::launch_config;

/// A launch, and what it was made of.
#[derive(Debug)]
pub(super) struct Td {
    plan: LaunchPlan,
    order: Order,
    source: Source,
    boot: Boot,
    /// As in the report; not part of MRTD.
    stated: LaunchConfig,
}

/// What boots.
#[derive(Debug)]
enum Source {
    /// A kernel, through cvmm's shim, which measures these events.
    Shim(Payload, Vec<Event>),
    /// A firmware image, whose measurements at run time nobody but itself decides about.
    Tdvf(PathBuf),
}

impl Td {
    /// Plans the launch of `subject` as `cvmm run` does; `given` is its configuration.
    ///
    /// # Errors
    /// See [`Unpredictable`].
    pub(super) fn plan(subject: &Subject, given: Config) -> Result<Self, Unpredictable> {
        subject.ovmf.check_td()?;
        let config = given.clone().with_defaults();
        check_absent(&config.snp)?;
        let stated = launch_config(&config.tdx);
        let cpus = size::check_cpus(config.cpus.unwrap_or(0), u32::MAX)?;
        let order = if subject.two_pass {
            Order::TwoPass
        } else {
            Order::SinglePass
        };
        if let Some(firmware) = subject.ovmf.firmware()? {
            return Ok(Self {
                plan: tdvf(firmware, &given.boot)?,
                order,
                source: Source::Tdvf(firmware.into()),
                boot: given.boot,
                stated,
            });
        }
        let files = payload::Payload::check(&config.boot, Size(u64::MAX))?;
        let payload = Payload::of(config.machine.unwrap_or_default(), &files)?;
        let plan = plan::launch_plan(Mode::Tdx, &payload, cpus)?;
        let events = boot_events(&plan)?;
        Ok(Self {
            plan,
            order,
            source: Source::Shim(payload, events),
            boot: config.boot,
            stated,
        })
    }

    fn mrtd(&self) -> Result<Measurement, MeasureError> {
        mrtd(&self.plan, self.order)
    }

    fn rtmrs(&self) -> Option<Rtmrs> {
        match &self.source {
            Source::Shim(_, events) => Some(Rtmrs::after(events)),
            Source::Tdvf(_) => None,
        }
    }
}

/// The launch of a firmware image, whose MRTD no kernel is part of.
fn tdvf(firmware: &Path, boot: &Boot) -> Result<LaunchPlan, Unpredictable> {
    if boot.kernel.is_some() || boot.initrd.is_some() || boot.cmdline.is_some() {
        return Err(Unpredictable::TdvfKernel);
    }
    let bytes = InputFile::open("firmware", firmware)?.read_start("firmware", IMAGE_MAX)?;
    let image = Tdvf::parse(bytes).map_err(|cause| Unpredictable::Tdvf {
        path: firmware.into(),
        cause,
    })?;
    Ok(image.plan().map_err(plan::PlanError::from)?)
}

/// What the shim measures when it boots from `plan`.
fn boot_events(plan: &LaunchPlan) -> Result<Vec<Event>, plan::PlanError> {
    let config = plan
        .pages
        .iter()
        .find(|page| page.range.start() == Gpa(layout::CONFIG));
    let page: &[u8; CONFIG_LEN] = config
        .and_then(|page| page.bytes.first_chunk())
        .ok_or(shim::config::ConfigError::Unknown)?;
    let named = |tag| match tag {
        TAG_KERNEL => "kernel",
        TAG_INITRD => "initrd",
        TAG_CMDLINE => "command line",
        _ => "event",
    };
    let events = events::of(page)?.map(|event| Event {
        register: event.register,
        name: named(event.tag),
        digest: sha384(&[event.data]),
    });
    Ok(events.to_vec())
}

/// A line for each register.
pub(super) fn text(td: &Td) -> Result<String, MeasureError> {
    let mut text = format!("MRTD  {}\n", td.mrtd()?);
    let remarks = [
        "  (zero: the shim measures nothing into it)",
        "",
        "",
        "  (zero: the guest's own)",
    ];
    let registers = td.rtmrs().map(|rtmrs| rtmrs.0);
    for ((index, value), remark) in registers.iter().flatten().enumerate().zip(remarks) {
        let _ = writeln!(text, "RTMR{index} {value}{remark}");
    }
    Ok(text)
}

/// A line for each page and event: what enters which register in which order.
pub(super) fn explain(td: &Td) -> Result<String, MeasureError> {
    let mut text = String::new();
    for step in explain::steps(&td.plan, td.order)? {
        let _ = write!(text, "{:#014x} {:<10} ", step.gpa.0, step.action);
        let _ = match step.contents {
            Some(hash) => write!(text, "{hash}"),
            None => write!(text, "{:<96}", "-"),
        };
        let _ = writeln!(text, " {} {}", step.digest, step.name);
    }
    let mut rtmrs = Rtmrs::default();
    if let Source::Shim(_, events) = &td.source {
        for event in events {
            let after = rtmrs.extend(event).unwrap_or(Measurement::ZERO);
            let register = format!("RTMR{}", event.register);
            let _ = writeln!(
                text,
                "{register:<14} {:<10} {} {after} {}",
                "EVENT", event.digest, event.name
            );
        }
    }
    Ok(text)
}

#[derive(Serialize)]
struct Answer<'a> {
    schema: u32,
    cvmm: &'static str,
    platform: PlatformName,
    /// MRTD: the digest by which a launch is known, as on every platform.
    digest: String,
    mrtd: String,
    /// RTMR0 to RTMR3 when the kernel starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    rtmrs: Option<[String; 4]>,
    order: &'static str,
    /// Pages that the TDX module takes.
    pages: u64,
    /// TDH.MR.EXTEND commands, 256 bytes each.
    extends: u64,
    measured_bytes: u64,
    attributes: String,
    mrconfigid: String,
    mrowner: String,
    mrownerconfig: String,
    #[serde(flatten)]
    what: What<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<JsonStep>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<Vec<JsonEvent>>,
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
    Tdvf {
        firmware: &'a Path,
    },
}

#[derive(Serialize)]
struct JsonStep {
    name: &'static str,
    action: String,
    gpa: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    contents: Option<String>,
    digest: String,
}

impl From<&Step> for JsonStep {
    fn from(step: &Step) -> Self {
        Self {
            name: step.name,
            action: step.action.to_string(),
            gpa: step.gpa.0,
            contents: step.contents.map(|hash| hash.to_string()),
            digest: step.digest.to_string(),
        }
    }
}

#[derive(Serialize)]
struct JsonEvent {
    name: &'static str,
    rtmr: u8,
    digest: String,
}

impl From<&Event> for JsonEvent {
    fn from(event: &Event) -> Self {
        Self {
            name: event.name,
            rtmr: event.register,
            digest: event.digest.to_string(),
        }
    }
}

/// Everything, as JSON; every step of it with `explained`.
pub(super) fn json(td: &Td, explained: bool) -> Result<String, MeasureError> {
    let mrtd = td.mrtd()?.to_string();
    let steps = explained
        .then(|| explain::steps(&td.plan, td.order))
        .transpose()?;
    let Cost { adds, extends, bytes } = cost(&td.plan)?;
    let (what, events) = match &td.source {
        Source::Shim(payload, events) => {
            let kernel = td.boot.kernel.as_deref();
            let initrd = td.boot.initrd.as_deref();
            let what = What::Shim {
                machine: payload.machine,
                kernel: kernel.map(|path| File::of(path, &payload.kernel)),
                initrd: initrd.map(|path| File::of(path, &payload.initrd)),
                cmdline: &payload.cmdline,
            };
            (what, Some(events))
        }
        Source::Tdvf(firmware) => (What::Tdvf { firmware }, None),
    };
    let answer = Answer {
        schema: SCHEMA,
        cvmm: env!("CARGO_PKG_VERSION"),
        platform: PlatformName::Tdx,
        digest: mrtd.clone(),
        mrtd,
        rtmrs: td.rtmrs().map(|rtmrs| rtmrs.0.map(|value| value.to_string())),
        order: match td.order {
            Order::SinglePass => "single-pass",
            Order::TwoPass => "two-pass",
        },
        pages: adds,
        extends,
        measured_bytes: bytes,
        attributes: format!("{:#x}", td.stated.attributes),
        mrconfigid: Hex(&td.stated.mrconfigid).to_string(),
        mrowner: Hex(&td.stated.mrowner).to_string(),
        mrownerconfig: Hex(&td.stated.mrownerconfig).to_string(),
        what,
        steps: steps.map(|steps| steps.iter().map(JsonStep::from).collect()),
        events: events.map(|events| events.iter().map(JsonEvent::from).collect()),
    };
    Ok(serde_json::to_string_pretty(&answer).unwrap_or_default())
}

/// The comparison in words, and whether the digests are the same. Each launch comes with the file that describes it.
pub(super) fn compare(left: (&Td, &Path), right: (&Td, &Path)) -> Result<(String, bool), MeasureError> {
    let (l, r) = (left.0, right.0);
    let mut text = String::new();
    for (td, file) in [left, right] {
        let _ = writeln!(text, "{} {}", td.mrtd()?, file.display());
    }
    let Some(difference) = explain::difference(&l.plan, &r.plan, l.order)? else {
        text.push_str("the launches are the same\n");
        return Ok((text, true));
    };
    let _ = writeln!(text, "{difference}");
    if let (Source::Shim(l, _), Source::Shim(r, _)) = (&l.source, &r.source) {
        differ(&mut text, "machine", l.machine, r.machine);
        differ(&mut text, "kernel", Shown(&l.kernel), Shown(&r.kernel));
        differ(&mut text, "initrd", Shown(&l.initrd), Shown(&r.initrd));
        differ(&mut text, "cmdline", &l.cmdline, &r.cmdline);
    }
    Ok((text, false))
}
