//! The launch over the model of KVM and firmware.

use arch::addr::{Gpa, PageRange};
use arch::platform::{LaunchPage, LaunchPlan, PageKind};
use arch::x86::regs::{BootState, General};

use super::*;
use crate::error::FirmwareStatus;
use crate::id_block::{IdAuth, IdBlock};
use crate::measure;
use crate::model::tests::launch::{RULE, cpuid_bytes};
use crate::model::{Entry, Model};
use crate::p384::SigningKey;
use crate::policy::PolicyBit;

fn page(kind: PageKind, gfn: u64, pages: u64) -> LaunchPage {
    let range = PageRange::new(Gpa(gfn << 12), pages << 12).unwrap();
    let bytes = match kind {
        PageKind::Measured | PageKind::Unmeasured => (0..pages << 12)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect(),
        PageKind::Cpuid => cpuid_bytes(),
        PageKind::Zero | PageKind::Secrets => Vec::new(),
    };
    LaunchPage {
        name: "test",
        range,
        kind,
        bytes,
    }
}

fn plan() -> LaunchPlan {
    let pages = vec![
        page(PageKind::Measured, 1, 5),
        page(PageKind::Zero, 6, 2),
        page(PageKind::Secrets, 8, 1),
        page(PageKind::Cpuid, 9, 1),
        page(PageKind::Unmeasured, 10, 1),
    ];
    let state = |rip| {
        BootState::long_mode(
            General {
                rip,
                ..General::default()
            },
            0,
        )
    };
    LaunchPlan {
        pages,
        vcpus: vec![state(0x1000), state(0x2000)],
    }
}

fn block(measurement: Measurement) -> IdBlock {
    let policy = Policy::default();
    IdBlock {
        measurement,
        family_id: [0; 16],
        image_id: [0; 16],
        guest_svn: 0,
        policy,
    }
}

fn auth(block: &IdBlock) -> Box<IdAuth> {
    block.sign(&SigningKey::generated(), None).unwrap()
}

/// A VM with memory, not yet initialised.
fn fresh() -> Model {
    let mut model = Model::new(4);
    model.slot(0..4, true);
    model.slot(4..64, true);
    model.set_private(0..64);
    model
}

/// Launches `plan` on `model` as the platform does, vCPUs between the pages and the end.
fn launch(model: &mut Model, plan: &mut LaunchPlan, config: LaunchConfig) -> Result<Measurement, SnpError> {
    let mut launching = Launching::begin(model, config)?;
    for page in &mut plan.pages {
        launching.add(page)?;
    }
    for state in &plan.vcpus {
        launching.commands().create_vcpu().state = *state;
        launching.add_vcpu(state);
    }
    Ok(launching.finish()?.1)
}

#[test]
fn what_was_predicted_is_what_firmware_measures() {
    let features = SevFeatures::SNP.with(SevFeatures::DEBUG_SWAP);
    let mut model = fresh();
    let config = LaunchConfig {
        features,
        certificates: true,
        ..LaunchConfig::default()
    };
    let launched = launch(&mut model, &mut plan(), config).unwrap();
    assert_eq!(launched, measure::digest(&plan(), features).unwrap());
    assert_eq!(launched, model.digest());
    assert!(model.requests_certificates());
    assert_eq!(model.run(0), Entry::Runs);
}

#[test]
fn a_signal_costs_one_retry_and_a_second_one_in_a_row_the_launch() {
    for (signals, ok) in [(0, true), (1, true), (2, false)] {
        let mut model = fresh();
        model.signals = signals;
        let launched = launch(&mut model, &mut plan(), LaunchConfig::default());
        assert_eq!(launched.is_ok(), ok, "{signals} signals");
    }
}

#[test]
fn a_page_that_fails_is_named_with_firmware_status() {
    let mut model = fresh();
    model.set_shared(3..4);
    let error = launch(&mut model, &mut plan(), LaunchConfig::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("SNP_LAUNCH_UPDATE was refused: the kernel could not load a page"),
        "{error}"
    );
    let mut model = fresh();
    let mut launching = Launching::begin(&mut model, LaunchConfig::default()).unwrap();
    launching.commands().firmware.fail_next = Some(FirmwareStatus(0x1a));
    let error = launching.add(&mut page(PageKind::Zero, 1, 1)).unwrap_err();
    assert!(error.to_string().contains("0x1a INVALID_PAGE_STATE"), "{error}");
}

#[test]
fn refused_cpuid_values_are_told_and_their_corrections_accepted() {
    let mut model = fresh();
    model.firmware.cpuid.push(RULE);
    let mut launching = Launching::begin(&mut model, LaunchConfig::default()).unwrap();
    let mut cpuid = page(PageKind::Cpuid, 9, 1);
    let error = launching.add(&mut cpuid).unwrap_err();
    let expected = "leaf 0x1.0 ECX must be 0x1 (clear 0x1000000)";
    assert!(error.to_string().contains(expected), "{error}");
    launching.add(&mut cpuid).unwrap();
    let mut plan = LaunchPlan {
        pages: vec![page(PageKind::Cpuid, 9, 1)],
        vcpus: vec![],
    };
    assert_eq!(
        launching.digest(),
        measure::digest(&plan, SevFeatures::SNP).unwrap()
    );
    let error = launch(
        &mut {
            let mut m = fresh();
            m.firmware.cpuid.push(RULE);
            m
        },
        &mut plan,
        LaunchConfig::default(),
    );
    assert!(matches!(
        error,
        Err(SnpError::CpuidRejected { gpa: Gpa(0x9000), .. })
    ));
}

#[test]
fn an_id_block_for_another_launch_is_noticed_before_firmware_sees_it() {
    let digest = measure::digest(&plan(), SevFeatures::SNP).unwrap();
    let with = |block: IdBlock| {
        let identity = Identity {
            id_block: Some((block, auth(&block))),
            ..Identity::default()
        };
        let config = LaunchConfig {
            identity,
            ..LaunchConfig::default()
        };
        let mut model = fresh();
        let launched = launch(&mut model, &mut plan(), config).map_err(|e| e.to_string());
        (launched, model.vcpus.iter().any(|v| v.protected))
    };
    assert_eq!(with(block(digest)), (Ok(digest), true));
    let (other, sealed) = with(block(Measurement([9; 48])));
    assert!(
        other
            .unwrap_err()
            .contains("the ID block is for launch digest 0909")
            && !sealed
    );
    let policy = Policy::default().set(PolicyBit::SingleSocket, true);
    let (other, sealed) = with(IdBlock {
        policy,
        ..block(digest)
    });
    assert!(other.unwrap_err().contains("0x130000") && !sealed);
}

#[test]
fn tampered_identities_are_refused_by_firmware() {
    let digest = measure::digest(&plan(), SevFeatures::SNP).unwrap();
    let mut other = *auth(&block(digest)).bytes();
    other[0x50] ^= 1;
    let auth = IdAuth::parse(&other).unwrap();
    let identity = Identity {
        id_block: Some((block(digest), auth)),
        ..Identity::default()
    };
    let config = LaunchConfig {
        identity,
        ..LaunchConfig::default()
    };
    let error = launch(&mut fresh(), &mut plan(), config).unwrap_err();
    assert!(error.to_string().contains("BAD_SIGNATURE"), "{error}");
}

#[test]
fn contents_that_do_not_fill_a_range_never_reach_the_kernel() {
    let mut model = fresh();
    let mut launching = Launching::begin(&mut model, LaunchConfig::default()).unwrap();
    let mut short = page(PageKind::Measured, 1, 2);
    short.bytes.truncate(5000);
    assert!(matches!(launching.add(&mut short), Err(SnpError::Contents(_))));
    assert_eq!(launching.digest(), Measurement([0; 48]));
}

/// A kernel that says yes and does nothing.
struct Idle;

impl SevCommands for Idle {
    fn init2(&mut self, _: u64) -> Result<(), Refusal> {
        Ok(())
    }
    fn enable_req_certs(&mut self) -> Result<(), Refusal> {
        Ok(())
    }
    fn launch_start(&mut self, _: Policy) -> Result<(), Refusal> {
        Ok(())
    }
    fn launch_update(&mut self, _: PageType, _: u64, _: u64, _: &mut [u8]) -> Result<u64, Refusal> {
        Ok(0)
    }
    fn launch_finish(&mut self, _: &Identity) -> Result<(), Refusal> {
        Ok(())
    }
}

#[test]
fn a_kernel_that_does_not_get_on_does_not_hang_the_launch() {
    let mut launching = Launching::begin(Idle, LaunchConfig::default()).unwrap();
    let error = launching.add(&mut page(PageKind::Zero, 1, 1)).unwrap_err();
    assert!(matches!(error, SnpError::NoProgress { gpa: Gpa(0x1000) }));
}
