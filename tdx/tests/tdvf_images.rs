//! MRTD of firmware images against digests that Python's hashlib gave (`tests/measure/mrtd.py`, and for the plain one
//! also the script that came with the emulated host), and files that are wrong: whatever it is, it ends in an error,
//! never in a panic or endless work.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "a test stops at the first surprise"
)]

mod images;

use images::{By, DESCRIPTOR, LEN, Row, TD_SHIM, TDVF, image};
use proptest::prelude::*;
use tdx::measure::{Order, cost, mrtd};
use tdx::tdvf::{SectionKind, Tdvf, TdvfError};

/// What that script computes the digest of: 64 KiB of code at the end of 4 GiB.
const PLAIN: &[Row] = &[(0, 0x10000, 0xffff_0000, 0x10000, 0, 1)];

#[test]
fn digests_equal_those_of_another_program_in_both_orders() {
    let cases: [(&[Row], By, &str, &str); 3] = [
        (
            TDVF,
            By::Table,
            "73a56e3669e2f35288a0f0f14d44416f64a4e51b7c8f1ef46da01c8003422fbee0c211a5392603aa71a4be6af800cfac",
            "d34ba6451872b449e44d1595f052b252455f8e77c719d23d0be67ae8326f20393c554ebbf85fa6daabcea9ad7458b837",
        ),
        (
            TD_SHIM,
            By::Offset,
            "efe83581f1a3cf1599f60b7d5540ab4713dffd7746dd68b2a266443b57857e6a2de309dc88fedb7823459c5b9fdcc0b4",
            "338351fc0b10f262ec7968748d7e0a471a7b4b6582bc106e7c6bd93a7fe77164a12514a993110755d5200ef3d1a10500",
        ),
        (
            PLAIN,
            By::Table,
            "85ca699e95f27719f4607948d9da024ebf4d03292af1a47c0ce730377da918fd654a2eb8e2be6609e5e229c67c2faed7",
            "25ce52d4dffa56dd56b8f65af8707f9f51053b0c3d9a4a6d051faf9012d0a740da883df1a703ceb419ab88a9ecdb32db",
        ),
    ];
    for (rows, by, single, double) in cases {
        let plan = Tdvf::parse(image(rows, by)).unwrap().plan().unwrap();
        let digest = |order| mrtd(&plan, order).unwrap().to_string();
        assert_eq!(digest(Order::SinglePass), single, "{by:?}");
        assert_eq!(digest(Order::TwoPass), double, "{by:?}");
    }
}

#[test]
fn only_what_the_launch_adds_is_launched() {
    let shim = Tdvf::parse(image(TD_SHIM, By::Offset)).unwrap();
    let kinds: Vec<SectionKind> = shim.sections().iter().map(|s| s.kind).collect();
    assert_eq!(kinds[5..], {
        use SectionKind::{Info, PayloadParameters, Permanent};
        [PayloadParameters, Info, Permanent]
    });
    let plan = shim.plan().unwrap();
    let names: Vec<&str> = plan.pages.iter().map(|page| page.name).collect();
    assert_eq!(
        names,
        [
            "firmware code",
            "variables",
            "temporary memory",
            "hand-off blocks",
            "payload",
            "payload parameters"
        ]
    );
    let cost = cost(&plan).unwrap();
    assert_eq!((cost.adds, cost.bytes), (8 + 1 + 2 + 32 + 8 + 1, 0x1_0000));
}

/// Parses, makes a plan of what parses, and goes through it.
fn survive(image: Vec<u8>) -> Result<(), TdvfError> {
    let plan = Tdvf::parse(image)?.plan().unwrap();
    assert!(cost(&plan).unwrap().adds > 0);
    Ok(())
}

/// All that the parser looks at.
fn described() -> std::ops::Range<usize> {
    DESCRIPTOR - 16..LEN
}

fn way() -> impl Strategy<Value = By> {
    prop_oneof![Just(By::Table), Just(By::Offset)]
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(by in way(), flips in prop::collection::vec((described(), 1..=255u8), 1..8)) {
        let mut image = image(TD_SHIM, by);
        for (at, bits) in flips {
            image[at] ^= bits;
        }
        let _ = survive(image);
    }

    #[test]
    fn arbitrary_sections_never_panic(
        by in way(),
        rows in prop::collection::vec(
            (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), 0..10u32, 0..8u32), 0..20
        ),
    ) {
        let _ = survive(image(&rows, by));
    }

    /// Close enough to right that most checks are passed.
    #[test]
    fn plausible_sections_never_panic(
        rows in prop::collection::vec(
            (0..0x11u32, 0..0x11u32, 0..0x110_0000u64, 0..0x20u64, 0..9u32, 0..4u32), 0..6
        ),
    ) {
        let pages = rows.into_iter().map(|(offset, file, gpa, bytes, kind, attributes)| {
            (offset << 12, file << 12, gpa << 12, bytes << 12, kind, attributes)
        });
        let rows: Vec<Row> = PLAIN.iter().copied().chain(pages).collect();
        let _ = survive(image(&rows, By::Table));
    }

    #[test]
    fn tails_of_an_image_never_panic(by in way(), pages in 0..16usize, cut in 0..4096usize) {
        let image = image(TDVF, by);
        let _ = survive(image[pages * 4096 + cut..].to_vec());
    }
}

#[test]
fn every_single_flip_is_survived() {
    for by in [By::Table, By::Offset] {
        let good = image(TDVF, by);
        assert_eq!(survive(good.clone()), Ok(()));
        for at in described() {
            for bit in 0..8 {
                let mut image = good.clone();
                image[at] ^= 1 << bit;
                let _ = survive(image);
            }
        }
    }
}

#[test]
fn damaged_files_say_what_is_wrong() {
    let good = image(TDVF, By::Table);
    let at = |offset: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[offset..][..bytes.len()].copy_from_slice(bytes);
        image
    };
    let word = |offset: usize, value: u32| at(offset, &value.to_le_bytes());
    let section = |n: usize| DESCRIPTOR + 16 + 32 * n;
    let entry = LEN - 32 - 40;
    let plain_end = image(TDVF, By::Offset);
    let no_way = [&plain_end[..LEN - 32], &[0xff; 32]].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("an empty file", vec![], "0 bytes"),
        ("16 bytes", vec![0; 16], "16 bytes"),
        ("a page of nothing", vec![0; 0x1000], "no TDX metadata"),
        ("an offset to nowhere", no_way, "no TDX metadata"),
        (
            "another name in the table",
            at(entry + 6, &[0]),
            "no TDX metadata",
        ),
        (
            "a table that is too long",
            at(LEN - 32 - 18, &[0xff, 0xff]),
            "65535 bytes does not fit",
        ),
        ("outside", word(entry, 0x10001), "starts outside the image"),
        (
            "elsewhere",
            word(entry, 0x500),
            "no descriptor is where it should be",
        ),
        (
            "SEV's metadata",
            at(DESCRIPTOR, b"ASEV"),
            "does not start with TDVF",
        ),
        ("newer metadata", word(DESCRIPTOR + 8, 2), "version 1"),
        ("too many sections", word(DESCRIPTOR + 12, 65), "64 sections"),
        (
            "more sections than bytes",
            word(DESCRIPTOR + 12, 7),
            "length is wrong",
        ),
        (
            "fewer sections than bytes",
            word(DESCRIPTOR + 12, 5),
            "length is wrong",
        ),
        ("half a section", word(DESCRIPTOR + 4, 17), "length is wrong"),
        (
            "longer than the file",
            word(DESCRIPTOR + 4, 0x2000),
            "length is wrong",
        ),
        (
            "unknown type",
            word(section(2) + 24, 9),
            "section 2 of the TDX metadata has the unknown type 9",
        ),
        (
            "unknown attribute",
            word(section(1) + 28, 4),
            "attributes that nobody has defined",
        ),
        (
            "measured, not added",
            word(section(0) + 28, 3),
            "to be measured, but not part",
        ),
        (
            "code not measured",
            word(section(0) + 28, 0),
            "is code that nothing would measure",
        ),
        (
            "permanent and added",
            word(section(2) + 24, 4),
            "is permanent, which no launch adds",
        ),
        ("half a page", word(section(3) + 16, 0x1800), "whole pages"),
        ("an odd address", word(section(3) + 8, 0x80_b010), "whole pages"),
        (
            "too high",
            at(section(3) + 8, &0xfff8_0000_0000_0000u64.to_le_bytes()),
            "ends above the addresses",
        ),
        (
            "wraps",
            at(section(3) + 8, &0xffff_ffff_ffff_f000u64.to_le_bytes()),
            "ends above the addresses",
        ),
        (
            "behind the file",
            word(section(0), 0x5000),
            "behind the end of the file",
        ),
        (
            "code without contents",
            word(section(0) + 4, 0),
            "is code without contents",
        ),
        (
            "a full hand-off block",
            word(section(4) + 4, 0x1000),
            "must be empty",
        ),
        (
            "a measured hand-off block",
            word(section(4) + 28, 1),
            "whose contents the host makes",
        ),
        (
            "more than fits",
            word(section(1) + 4, 0x5000),
            "more contents than room",
        ),
        (
            "overlap",
            word(section(3) + 8, 0x80_5000),
            "section 5 of the TDX metadata (temporary memory, 0x800000, 0x6000 bytes) overlaps an earlier one",
        ),
        (
            "two hand-off blocks",
            word(section(5) + 24, 2),
            "is the second one",
        ),
        (
            "300 MiB",
            word(section(2) + 16, 0x1300_0000),
            "larger than 256 MiB",
        ),
        (
            "code elsewhere",
            word(section(0) + 8, 0x4000),
            "no firmware code ends at 4 GiB",
        ),
    ];
    // td-shim's payload and its command line, where the image has none and the host puts its own there.
    let brought = [(5, 0x120_0000), (6, 0x110_0000)];
    for (kind, gpa) in brought {
        let image = |attributes| image(&[PLAIN[0], (0, 0, gpa, 0x8000, kind, attributes)], By::Offset);
        let error = survive(image(1)).unwrap_err().to_string();
        assert!(error.contains("whose contents the host makes"), "{error}");
        assert_eq!(survive(image(0)), Ok(()));
    }
    for (name, image, says) in cases {
        let found = survive(image.clone());
        let error = found.expect_err(name).to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
    assert_eq!(survive(vec![]), Err(TdvfError::Size { bytes: 0 }));
}
