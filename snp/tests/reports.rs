//! Reports: a real one of an AMD Milan chip, and forged ones with every way to be wrong.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod forge;

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use forge::{Cert, Key};
use proptest::prelude::*;
use snp::measure::Measurement;
use snp::policy::{Policy, PolicyBit};
use snp::report::{
    CertificateError, Chain, Expected, Failure, Link, ListFault, Report, ReportError, Roots, TcbMinimum,
    TcbParts, check,
};

const MILAN: &[u8] = include_bytes!("recorded/report/milan.bin");
const MILAN_VCEK: &[u8] = include_bytes!("recorded/report/vcek-milan.der");
const TURIN_VCEK: &[u8] = include_bytes!("recorded/report/vcek-turin.der");

/// Seconds after 1970 in 2026.
const NOW: u64 = 1_790_000_000;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[test]
fn a_real_report_of_a_milan_chip_verifies_up_to_amds_root() {
    let report = Report::parse(MILAN).unwrap();
    let chain = Chain::find(MILAN_VCEK, None, &Roots::amd()).unwrap();
    assert_eq!(check(&report, &chain, &Expected::default(), at(NOW)), []);
    assert_eq!(report.version(), 2);
    assert!(report.measurement().to_string().starts_with("7a1e5c266c0108db"));
    let parts = report.reported_tcb().parts(report.tcb_layout());
    assert_eq!(
        parts,
        TcbParts {
            fmc: None,
            boot_loader: 3,
            tee: 0,
            snp: 8,
            microcode: 115
        }
    );
}

#[test]
fn the_real_report_fails_with_another_chips_certificate_and_out_of_time() {
    let report = Report::parse(MILAN).unwrap();
    let turin = Chain::find(TURIN_VCEK, None, &Roots::amd()).unwrap();
    let failures = check(&report, &turin, &Expected::default(), at(NOW));
    assert!(
        failures.contains(&Failure::Signature) && failures.contains(&Failure::OtherChip),
        "{failures:?}"
    );
    let chain = Chain::find(MILAN_VCEK, None, &Roots::amd()).unwrap();
    let early = check(&report, &chain, &Expected::default(), at(0));
    let all = [Link::Root, Link::Intermediate, Link::Signer].map(Failure::CertificateNotYetValid);
    assert_eq!(early, all);
    let late = check(&report, &chain, &Expected::default(), at(5_000_000_000));
    assert_eq!(late.len(), 3, "{late:?}");
}

#[test]
fn every_flipped_byte_of_the_real_certificate_is_noticed() {
    let report = Report::parse(MILAN).unwrap();
    for at_byte in 0..MILAN_VCEK.len() {
        let mut vcek = MILAN_VCEK.to_vec();
        vcek[at_byte] ^= 0x40;
        if let Ok(chain) = Chain::find(&vcek, None, &Roots::amd()) {
            let failures = check(&report, &chain, &Expected::default(), at(NOW));
            assert!(!failures.is_empty(), "byte {at_byte:#x}");
        }
    }
}

struct Platform {
    ark: Key,
    ask: Key,
    vcek: Key,
    other: Key,
}

static PLATFORM: LazyLock<Platform> = LazyLock::new(|| Platform {
    ark: Key::new(),
    ask: Key::new(),
    vcek: Key::new(),
    other: Key::new(),
});

const CHIP: [u8; 64] = [0x5c; 64];
const LEVELS: [u8; 4] = [4, 0, 24, 219];
const VALID: [&str; 2] = ["200101000000Z", "450101000000Z"];

fn ark() -> Vec<u8> {
    let ark = &PLATFORM.ark;
    let extensions = forge::authority();
    Cert {
        subject: "ARK",
        issuer: "ARK",
        key: ark,
        signer: ark,
        validity: VALID,
        extensions,
    }
    .der()
}

fn ask(change: impl FnOnce(&mut Cert<'_>)) -> Vec<u8> {
    let extensions = forge::authority();
    let (key, signer) = (&PLATFORM.ask, &PLATFORM.ark);
    let mut cert = Cert {
        subject: "ASK",
        issuer: "ARK",
        key,
        signer,
        validity: VALID,
        extensions,
    };
    change(&mut cert);
    cert.der()
}

fn vcek(change: impl FnOnce(&mut Cert<'_>)) -> Vec<u8> {
    let extensions = forge::vcek(LEVELS, None, &CHIP);
    let (key, signer) = (&PLATFORM.vcek, &PLATFORM.ask);
    let mut cert = Cert {
        subject: "VCEK",
        issuer: "ASK",
        key,
        signer,
        validity: VALID,
        extensions,
    };
    change(&mut cert);
    cert.der()
}

fn chain_of(vcek: &[u8], ask: &[u8]) -> Result<Chain, CertificateError> {
    Chain::find(vcek, Some(ask), &Roots::only(&ark()).unwrap())
}

static CHAIN: LazyLock<Chain> = LazyLock::new(|| chain_of(&vcek(|_| {}), &ask(|_| {})).unwrap());

fn report(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = vec![0; 1184];
    bytes[0] = 3;
    bytes[4] = 7;
    bytes[8..16].copy_from_slice(&0x30000_u64.to_le_bytes());
    bytes[0x34] = 1;
    let [boot_loader, tee, snp, microcode] = LEVELS;
    for tcb in [0x38, 0x180, 0x1e0, 0x1f0] {
        bytes[tcb..tcb + 8].copy_from_slice(&[boot_loader, tee, 0, 0, 0, 0, snp, microcode]);
    }
    bytes[0x50..0x90].fill(0x11);
    bytes[0x90..0xc0].fill(0x22);
    bytes[0xc0..0xe0].fill(0x33);
    bytes[0xe0..0x110].fill(0x44);
    bytes[0x110..0x140].fill(0x55);
    bytes[0x188..0x18b].copy_from_slice(&[0x19, 1, 1]);
    bytes[0x1a0..0x1e0].copy_from_slice(&CHIP);
    change(&mut bytes);
    forge::sign_report(&mut bytes, &PLATFORM.vcek);
    bytes
}

fn expected() -> Expected {
    Expected {
        measurements: vec![Measurement([0x21; 48]), Measurement([0x22; 48])],
        policy: Some(Policy::default()),
        tcb: TcbMinimum {
            fmc: None,
            boot_loader: 4,
            tee: 0,
            snp: 20,
            microcode: 200,
        },
        id_key_digest: Some([0x44; 48]),
        author_key_digest: Some([0x55; 48]),
        guest_svn: 7,
        host_data: Some([0x33; 32]),
        report_data: Some([0x11; 64]),
        ..Expected::default()
    }
}

fn failures(bytes: &[u8]) -> Vec<Failure> {
    check(&Report::parse(bytes).unwrap(), &CHAIN, &expected(), at(NOW))
}

#[test]
fn a_good_report_passes_every_check_in_every_version() {
    for version in 2..=5 {
        assert_eq!(failures(&report(|b| b[0] = version)), [], "version {version}");
    }
}

#[test]
fn each_field_that_is_not_as_expected_is_named() {
    type Change = fn(&mut [u8]);
    let cases: &[(&str, Change)] = &[
        ("none of the expected ones", |b| b[0x90] ^= 1),
        ("HOST_DATA", |b| b[0xc0] ^= 1),
        ("REPORT_DATA", |b| b[0x50] ^= 1),
        ("expected ID key", |b| b[0xe0] ^= 1),
        ("expected author key", |b| b[0x110] ^= 1),
        ("security version is 6", |b| b[4] = 6),
        ("(debug)", |b| b[10] |= 8),
        ("weaker than expected in \"cxl\"", |b| b[10] |= 0x20),
        ("weaker than expected in \"migration-agent\"", |b| b[10] |= 4),
        ("bits 0x84000000, which this cvmm does not know", |b| {
            b[11] |= 0x84
        }),
        ("VMPL 2", |b| b[0x30] = 2),
        ("VMPL 4294967295", |b| b[0x30..0x34].fill(0xff)),
        ("signature algorithm 2", |b| b[0x34] = 2),
        ("masks its key", |b| b[0x48] = 7 << 2),
        ("unknown key 3", |b| b[0x48] = 3 << 2),
        ("certificate is a VCEK's", |b| b[0x48] = 1 << 2),
        ("masks the chip's id", |b| b[0x1a0..0x1e0].fill(0)),
        ("another chip's", |b| b[0x1df] ^= 1),
        ("the report for (boot loader 5", |b| b[0x180] = 5),
        ("launched on TCB (boot loader 3", |b| b[0x1f0] = 3),
    ];
    for (says, change) in cases {
        let found = failures(&report(*change));
        assert_eq!(found.len(), 1, "{says}: {found:?}");
        assert!(found[0].to_string().contains(says), "{says}: {}", found[0]);
    }
}

#[test]
fn demands_of_the_policy_count_as_well_as_permissions() {
    let policy = Policy::from_bits(0x3_0137)
        .unwrap()
        .set(PolicyBit::CiphertextHiding, true);
    let wish = Expected {
        policy: Some(policy),
        ..expected()
    };
    let found = check(&Report::parse(&report(|_| {})).unwrap(), &CHAIN, &wish, at(NOW));
    let abi = Failure::PolicyAbi {
        wanted: (1, 0x37),
        stated: (0, 0),
    };
    assert_eq!(found, [Failure::PolicyWeaker(PolicyBit::CiphertextHiding), abi]);
}

#[test]
fn debug_guests_pass_only_where_they_are_allowed() {
    let bytes = report(|b| b[10] |= 8);
    let wish = Expected {
        debug_allowed: true,
        policy: None,
        ..expected()
    };
    assert_eq!(check(&Report::parse(&bytes).unwrap(), &CHAIN, &wish, at(NOW)), []);
}

/// Whoever chooses the agent can take the guest's memory elsewhere, and the policy is the host's to choose.
#[test]
fn guests_that_may_migrate_pass_only_where_the_policy_says_so() {
    let report = Report::parse(&report(|b| b[10] |= 4)).unwrap();
    let agents = Policy::default().set(PolicyBit::MigrationAgent, true);
    let with = |policy| {
        let wish = Expected { policy, ..expected() };
        check(&report, &CHAIN, &wish, at(NOW))
    };
    assert_eq!(with(None), [Failure::MigrationAgent]);
    assert_eq!(with(Some(agents)), []);
}

#[test]
fn bits_of_a_policy_that_nobody_knows_may_be_permissions() {
    let report = Report::parse(&report(|b| b[11] |= 4)).unwrap();
    let found = check(&report, &CHAIN, &Expected::default(), at(NOW));
    assert_eq!(found, [Failure::PolicyUnknown(1 << 26)]);
}

#[test]
fn an_old_tcb_is_refused_part_by_part() {
    let base = TcbMinimum {
        fmc: None,
        boot_loader: 4,
        tee: 0,
        snp: 24,
        microcode: 219,
    };
    let newer = [
        TcbMinimum {
            boot_loader: 5,
            ..base
        },
        TcbMinimum { tee: 1, ..base },
        TcbMinimum { snp: 25, ..base },
        TcbMinimum {
            microcode: 220,
            ..base
        },
        TcbMinimum { fmc: Some(1), ..base },
    ];
    let with = |tcb| {
        let wish = Expected { tcb, ..expected() };
        check(&Report::parse(&report(|_| {})).unwrap(), &CHAIN, &wish, at(NOW)).len()
    };
    assert_eq!(with(base), 0);
    assert_eq!(newer.map(with), [2; 5], "of the report and of the launch");
}

#[test]
fn turin_reports_have_their_own_tcb_layout_and_short_chip_ids() {
    let bytes = |version| {
        report(|b| {
            b[0] = version;
            for tcb in [0x180, 0x1f0] {
                b[tcb..tcb + 8].copy_from_slice(&[1, 4, 0, 24, 0, 0, 0, 219]);
            }
            b[0x188] = 0x1a;
            b[0x1a8..0x1e0].fill(0);
        })
    };
    let with = |fmc| {
        let vcek = vcek(|cert| cert.extensions = forge::vcek(LEVELS, Some(fmc), &CHIP[..8]));
        chain_of(&vcek, &ask(|_| {})).unwrap()
    };
    for version in [2, 3, 5] {
        let report = Report::parse(&bytes(version)).unwrap();
        assert_eq!(
            check(&report, &with(1), &expected(), at(NOW)),
            [],
            "version {version}"
        );
        let other = check(&report, &with(2), &expected(), at(NOW));
        assert!(matches!(other[..], [Failure::CertificateTcb { .. }]), "{other:?}");
    }
}

#[test]
fn loaded_keys_belong_to_a_provider_and_not_to_a_chip() {
    let extensions = [forge::vcek(LEVELS, None, &CHIP), forge::provider()].concat();
    let vlek = chain_of(&vcek(|cert| cert.extensions = extensions), &ask(|_| {})).unwrap();
    let signed_by = |key: u8| Report::parse(&report(|b| (b[0x48], b[0x1a0]) = (key << 2, 1))).unwrap();
    assert_eq!(check(&signed_by(1), &vlek, &expected(), at(NOW)), []);
    let mismatch = Failure::SignerMismatch {
        vlek_certificate: true,
    };
    assert_eq!(check(&signed_by(0), &vlek, &expected(), at(NOW)), [mismatch]);
}

#[test]
fn each_broken_link_of_the_chain_is_named() {
    let (good_ask, good_vcek) = (ask(|_| {}), vcek(|_| {}));
    let expired = ["200101000000Z", "210101000000Z"];
    let future = ["300101000000Z", "450101000000Z"];
    let other = &PLATFORM.other;
    let cases: [(Vec<u8>, Vec<u8>, Failure); 8] = [
        (
            vcek(|c| c.signer = other),
            good_ask.clone(),
            Failure::CertificateSignature(Link::Signer),
        ),
        (
            good_vcek.clone(),
            ask(|c| c.signer = other),
            Failure::CertificateSignature(Link::Intermediate),
        ),
        (
            vcek(|c| c.validity = expired),
            good_ask.clone(),
            Failure::CertificateExpired(Link::Signer),
        ),
        (
            good_vcek.clone(),
            ask(|c| c.validity = future),
            Failure::CertificateNotYetValid(Link::Intermediate),
        ),
        (
            good_vcek.clone(),
            ask(|c| c.extensions = forge::provider()),
            Failure::CertificateNoAuthority(Link::Intermediate),
        ),
        (
            vcek(|c| c.extensions = forge::authority()),
            good_ask.clone(),
            Failure::CertificateWithoutChip,
        ),
        (vcek(|c| c.key = other), good_ask.clone(), Failure::Signature),
        (
            vcek(|c| c.extensions = forge::vcek(LEVELS, None, &[0x5c; 63])),
            good_ask.clone(),
            Failure::OtherChip,
        ),
    ];
    for (vcek, ask, failure) in cases {
        let chain = chain_of(&vcek, &ask).unwrap();
        let found = check(
            &Report::parse(&report(|_| {})).unwrap(),
            &chain,
            &expected(),
            at(NOW),
        );
        assert!(found.contains(&failure), "{failure:?}: {found:?}");
    }
}

/// All of the forged certificates have the serial number 1. AMD has revoked an intermediate key of Genoa.
#[test]
fn a_revoked_key_is_refused_by_a_list_that_is_the_roots_and_in_time() {
    let now = ["260101000000Z", "270101000000Z"];
    let ark = &PLATFORM.ark;
    let revoked = [Link::Root, Link::Intermediate].map(Failure::CertificateRevoked);
    let unusable = |fault| vec![Failure::RevocationList(fault)];
    let list = forge::revocation_list;
    let cases = [
        (list("ARK", ark, &now, &[]), vec![]),
        (list("ARK", ark, &now, &[2, 7]), vec![]),
        (list("ARK", ark, &now, &[7, 1]), revoked.to_vec()),
        (
            list("ARK", &PLATFORM.ask, &now, &[]),
            unusable(ListFault::Signature),
        ),
        (list("ASK", ark, &now, &[]), unusable(ListFault::Foreign)),
        (list("ARK", ark, &now[..1], &[]), unusable(ListFault::Expired)),
        (
            list("ARK", ark, &["250101000000Z", "250201000000Z"], &[]),
            unusable(ListFault::Expired),
        ),
        (
            list("ARK", ark, &["270101000000Z", "280101000000Z"], &[]),
            unusable(ListFault::NotYetValid),
        ),
    ];
    let report = Report::parse(&report(|_| {})).unwrap();
    for (list, failures) in cases {
        let chain = CHAIN.clone().with_revoked(&list).unwrap();
        assert!(chain.has_list());
        assert_eq!(check(&report, &chain, &expected(), at(NOW)), failures);
    }
    let list = list("ARK", ark, &now, &[7]);
    for at_byte in 0..list.len() {
        let mut bytes = list.clone();
        bytes[at_byte] ^= 0x40;
        if let Ok(chain) = CHAIN.clone().with_revoked(&bytes) {
            assert_ne!(
                check(&report, &chain, &expected(), at(NOW)),
                [],
                "byte {at_byte:#x}"
            );
        }
    }
    let none = CHAIN.clone().with_revoked(&ask(|_| {})).unwrap_err();
    assert_eq!(none, CertificateError::UnreadableList);
}

/// Lists as another program writes them, signed with RSA as AMD's are.
#[test]
fn lists_of_openssl_are_read() {
    let file = |name: &str| std::fs::read(format!("tests/recorded/revoked/{name}")).unwrap();
    let roots = Roots::only(&file("ark.der")).unwrap();
    let chain = Chain::find(&file("signer.der"), Some(&file("ask.der")), &roots).unwrap();
    let report = Report::parse(&report(|_| {})).unwrap();
    let failures = |list| {
        let chain = chain.clone().with_revoked(&file(list)).unwrap();
        let found = check(&report, &chain, &Expected::default(), at(1_800_000_000));
        let of_list = |f: &Failure| matches!(f, Failure::CertificateRevoked(_) | Failure::RevocationList(_));
        found.into_iter().filter(of_list).collect::<Vec<_>>()
    };
    assert_eq!(failures("nobody.crl"), []);
    assert_eq!(
        failures("ask.crl.pem"),
        [Failure::CertificateRevoked(Link::Intermediate)]
    );
}

#[test]
fn only_the_pinned_root_is_trusted() {
    let (vcek, ask) = (vcek(|_| {}), ask(|_| {}));
    let find = |ask, roots: &Roots| Chain::find(&vcek, ask, roots).map(|_| ()).unwrap_err();
    assert_eq!(find(Some(&ask), &Roots::amd()), CertificateError::NoRoot);
    assert_eq!(find(None, &Roots::amd()), CertificateError::NoIntermediate);
    assert_eq!(
        find(Some(b"junk"), &Roots::amd()),
        CertificateError::Unreadable(Link::Intermediate)
    );
    assert_eq!(
        Roots::only(&[]).unwrap_err(),
        CertificateError::Unreadable(Link::Root)
    );
    // A root with the right name and another key.
    let other = Key::new();
    let extensions = forge::authority();
    let named = Cert {
        subject: "ARK",
        issuer: "ARK",
        key: &other,
        signer: &other,
        validity: VALID,
        extensions,
    };
    let chain = Chain::find(&vcek, Some(&ask), &Roots::only(&named.der()).unwrap()).unwrap();
    let found = check(
        &Report::parse(&report(|_| {})).unwrap(),
        &chain,
        &expected(),
        at(NOW),
    );
    assert_eq!(found, [Failure::CertificateSignature(Link::Intermediate)]);
}

#[test]
fn other_files_are_no_reports() {
    let bytes = report(|_| {});
    assert_eq!(
        Report::parse(&bytes[1..]),
        Err(ReportError::Length { bytes: 1183 })
    );
    assert_eq!(Report::parse(&[]), Err(ReportError::Length { bytes: 0 }));
    for version in [0, 1, 6, 255] {
        let bytes = report(|b| b[0] = version);
        assert_eq!(
            Report::parse(&bytes),
            Err(ReportError::Version {
                version: version.into()
            })
        );
    }
}

/// Nothing is expected of the fields: the signature alone must notice.
fn noticed(bytes: &[u8]) -> bool {
    Report::parse(bytes).map_or(true, |report| {
        !check(&report, &CHAIN, &Expected::default(), at(NOW)).is_empty()
    })
}

#[test]
fn every_flipped_byte_of_a_signed_report_is_noticed() {
    let good = report(|_| {});
    assert!(!noticed(&good));
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        assert!(noticed(&bytes), "byte {at:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn changed_reports_are_noticed(changes in prop::collection::vec((0..1184usize, 1..=255u8), 1..20)) {
        let good = report(|_| {});
        let mut bytes = good.clone();
        for (at, bits) in changes {
            bytes[at] ^= bits;
        }
        prop_assert!(bytes == good || noticed(&bytes));
    }

    #[test]
    fn arbitrary_certificates_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Roots::only(&bytes);
        let _ = Chain::find(&bytes, Some(&bytes), &Roots::amd());
    }

    #[test]
    fn cut_and_changed_certificates_never_panic(len in 0..1360usize, at in 0..1360usize, bits in any::<u8>()) {
        let mut vcek = MILAN_VCEK.to_vec();
        vcek[at] ^= bits;
        let _ = Chain::find(&vcek[..len], None, &Roots::amd());
    }
}
