//! A firmware file is only a file: whatever is wrong with it ends in an error, never in a panic or endless work.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod images;

use proptest::prelude::*;
use snp::ovmf::{Firmware, Flavour, Guest, OvmfError};
use snp::vmsa::CpuSignature;

/// Parses, and makes a plan of what parses.
fn survive(image: &[u8]) -> bool {
    let guest = Guest {
        flavour: Flavour::Qemu,
        vcpus: 2,
        signature: CpuSignature::new(25, 1, 1),
        kernel: None,
    };
    Firmware::parse(image.to_vec()).is_ok_and(|firmware| firmware.plan(&guest).is_ok())
}

/// Where the metadata and the table of [`images::image`] lie: all that the parser looks at.
fn described() -> std::ops::Range<usize> {
    0x10000 - 0x400..0x10000
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(layout in 0..3usize, flips in prop::collection::vec((described(), 1..=255u8), 1..8)) {
        let mut image = images::image(images::LAYOUTS[layout].1);
        for (at, bits) in flips {
            image[at] ^= bits;
        }
        survive(&image);
    }

    #[test]
    fn arbitrary_words_in_the_metadata_never_panic(words in prop::collection::vec(any::<u32>(), 1..40)) {
        let mut image = images::image(images::LAYOUTS[0].1);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        image[0x10000 - 0x400 + 4..][..bytes.len()].copy_from_slice(&bytes);
        survive(&image);
    }

    #[test]
    fn tails_of_an_image_never_panic(len in 0..0x10000usize) {
        let image = images::image(images::LAYOUTS[0].1);
        survive(&image[image.len() - len..]);
    }
}

#[test]
fn every_single_flip_is_survived() {
    let mut image = images::image(images::LAYOUTS[0].1);
    assert!(survive(&image));
    for at in described() {
        for bit in 0..8 {
            image[at] ^= 1 << bit;
            survive(&image);
            image[at] ^= 1 << bit;
        }
    }
}

#[test]
fn damaged_files_say_what_is_wrong() {
    let good = images::image(images::LAYOUTS[0].1);
    let at = |offset: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[offset..][..bytes.len()].copy_from_slice(bytes);
        image
    };
    let metadata = 0x10000 - 0x400;
    let section = |n: usize| metadata + 16 + 12 * n;
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("an empty file", vec![], "0 bytes"),
        ("16 bytes", vec![0; 16], "16 bytes"),
        ("a page of nothing", vec![0; 0x1000], "no OVMF table"),
        ("a cut image", good[..0xf000].to_vec(), "no OVMF table"),
        ("other metadata", at(metadata, b"TDVF"), "ASEV"),
        ("newer metadata", at(metadata + 8, &[2]), "version 1"),
        ("too many sections", at(metadata + 12, &[65]), "64 sections"),
        (
            "more sections than bytes",
            at(metadata + 12, &[8]),
            "length is wrong",
        ),
        ("unknown type", at(section(2) + 8, &[9]), "unknown type 0x9"),
        ("half a page", at(section(0) + 5, &[0x98]), "whole pages"),
        (
            "two secrets pages",
            at(section(2) + 5, &[0x20]),
            "exactly one page",
        ),
        ("overlap", at(section(1) + 1, &[0x80]), "overlaps"),
        (
            "inside the firmware",
            at(section(0), &0xffff_0000u32.to_le_bytes()),
            "overlaps",
        ),
        (
            "4 GiB of memory",
            at(section(5) + 4, &0x6000_0000u32.to_le_bytes()),
            "256 MiB",
        ),
    ];
    for (name, image, says) in cases {
        let error = Firmware::parse(image.to_vec()).unwrap_err().to_string();
        assert!(error.contains(says), "{name}: {error}");
    }
    assert_eq!(Firmware::parse(vec![]).unwrap_err(), OvmfError::Size { bytes: 0 });
}
