//! The SHA instructions give what plain Rust gives.
// UNSAFETY: calls code for processor features that it has just detected.
#![expect(unsafe_code, reason = "calls code for detected processor features")]

use shim::sha256::{Compress, Plain, compress_by_instructions};

#[test]
fn both_ways_to_compress_agree() {
    if !["sha", "ssse3", "sse4.1"].iter().all(|feature| match *feature {
        "sha" => std::is_x86_feature_detected!("sha"),
        "ssse3" => std::is_x86_feature_detected!("ssse3"),
        _ => std::is_x86_feature_detected!("sse4.1"),
    }) {
        println!("SKIPPED: this processor has no SHA instructions");
        return;
    }
    let mut seed = 1u32;
    for count in [0, 1, 2, 3, 40] {
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed
        };
        let state: [u32; 8] = std::array::from_fn(|_| next());
        let blocks: Vec<[u8; 64]> = (0..count)
            .map(|_| std::array::from_fn(|_| next().to_be_bytes()[0]))
            .collect();
        let (mut plain, mut quick) = (state, state);
        Plain.compress(&mut plain, &blocks);
        // SAFETY: the processor was found above to have every feature that the function is compiled for.
        unsafe { compress_by_instructions(&mut quick, &blocks) };
        assert_eq!(quick, plain, "{count} blocks");
    }
}
