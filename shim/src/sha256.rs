//! SHA-256 (FIPS 180-4), compact and without tables of its own beyond the standard's constants.

use core::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_set_epi32, _mm_sha256msg1_epu32,
    _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi32,
};

/// Initial hash value (FIPS 180-4, "SHA-256" under "Setting the Initial Hash Value").
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Round constants (FIPS 180-4, "SHA-224 and SHA-256 Constants").
#[rustfmt::skip]
const ROUND: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// One block of input in bytes.
const BLOCK: usize = 64;
/// Bytes of the last block that the length leaves for data and the end mark.
const LAST_DATA: usize = 56;

/// A way to compute SHA-256's compression function.
pub trait Compress {
    /// Folds `blocks` into `state`.
    fn compress(&self, state: &mut [u32; 8], blocks: &[[u8; BLOCK]]);
}

/// Compression in plain Rust, for any processor.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Compress for Plain {
    fn compress(&self, state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
        for block in blocks {
            fold(state, block);
        }
    }
}

/// A hash over input that comes in whole blocks, closed by a last part of any length.
#[derive(Clone, Debug)]
pub struct Sha256<C> {
    state: [u32; 8],
    blocks: u64,
    compress: C,
}

/// The SHA-256 digest of `input`.
#[must_use]
pub fn digest(input: &[u8]) -> [u8; 32] {
    Sha256::new(Plain).finish(input)
}

impl<C: Compress> Sha256<C> {
    /// A hash of nothing yet.
    pub fn new(compress: C) -> Self {
        Sha256 {
            state: INITIAL,
            blocks: 0,
            compress,
        }
    }

    /// Takes the whole 64-byte blocks of `input` and gives back the rest, for [`Sha256::finish`].
    #[must_use]
    pub fn update<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        let (blocks, rest) = input.as_chunks::<BLOCK>();
        self.compress.compress(&mut self.state, blocks);
        self.blocks = self.blocks.wrapping_add(blocks.len() as u64);
        rest
    }

    /// The digest of everything that [`Sha256::update`] took, followed by `last`.
    #[must_use]
    pub fn finish(mut self, last: &[u8]) -> [u8; 32] {
        let rest = self.update(last);
        let bits = self
            .blocks
            .wrapping_mul(512)
            .wrapping_add((rest.len() as u64).wrapping_mul(8));
        let mut tail = [[0; BLOCK]; 2];
        for (to, from) in tail.as_flattened_mut().iter_mut().zip(rest.iter().chain(&[0x80])) {
            *to = *from;
        }
        let blocks = if rest.len() < LAST_DATA { 1 } else { 2 };
        let tail = tail.get_mut(..blocks).unwrap_or_default();
        if let Some(len) = tail.as_flattened_mut().last_chunk_mut::<8>() {
            *len = bits.to_be_bytes();
        }
        self.compress.compress(&mut self.state, tail);
        let mut digest = [0; 32];
        for (to, word) in digest.as_chunks_mut::<4>().0.iter_mut().zip(self.state) {
            *to = word.to_be_bytes();
        }
        digest
    }
}

/// FIPS 180-4, "SHA-256 Hash Computation", with the message schedule kept in sixteen words.
#[expect(clippy::indexing_slicing, reason = "indices are masked to the array length")]
fn fold(state: &mut [u32; 8], block: &[u8; BLOCK]) {
    let mut schedule = [0u32; 16];
    for (word, bytes) in schedule.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (t, constant) in ROUND.iter().enumerate() {
        let word = |back: usize| schedule[t.wrapping_sub(back) & 15];
        if t >= 16 {
            let (w15, w2) = (word(15), word(2));
            let s0 = w15.rotate_right(7) ^ w15.rotate_right(18) ^ (w15 >> 3);
            let s1 = w2.rotate_right(17) ^ w2.rotate_right(19) ^ (w2 >> 10);
            schedule[t & 15] = word(16).wrapping_add(s0).wrapping_add(word(7)).wrapping_add(s1);
        }
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let t1 = h
            .wrapping_add(s1)
            .wrapping_add(choice)
            .wrapping_add(*constant)
            .wrapping_add(schedule[t & 15]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        h = g;
        g = f;
        f = e;
        e = d.wrapping_add(t1);
        d = c;
        c = b;
        b = a;
        a = t1.wrapping_add(s0.wrapping_add(majority));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

/// Folds `blocks` into `state` by the processor's SHA instructions (Intel SDM volume 2, "SHA256RNDS2").
///
/// # Safety
/// None but that the processor has the instructions: SHA, SSSE3 and SSE4.1.
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
pub fn compress_by_instructions(state: &mut [u32; 8], blocks: &[[u8; BLOCK]]) {
    let [a, b, c, d, e, f, g, h] = *state;
    let mut abef = quad([f, e, b, a]);
    let mut cdgh = quad([h, g, d, c]);
    for block in blocks {
        let (abef_before, cdgh_before) = (abef, cdgh);
        let mut words = [quad([0; 4]); 4];
        for (to, bytes) in words.iter_mut().zip(block.as_chunks::<16>().0) {
            let [w0, w1, w2, w3] = [0, 4, 8, 12].map(|at| word_of(bytes, at));
            *to = quad([w0, w1, w2, w3]);
        }
        for constants in ROUND.as_chunks::<4>().0 {
            let [w0, w1, w2, w3] = words;
            let sum = _mm_add_epi32(w0, quad(*constants));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32::<0b1110>(sum));
            let next = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8::<4>(w3, w2));
            words = [w1, w2, w3, _mm_sha256msg2_epu32(next, w3)];
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    let ([f, e, b, a], [h, g, d, c]) = (words_of(abef), words_of(cdgh));
    *state = [a, b, c, d, e, f, g, h];
}

fn word_of(bytes: &[u8; 16], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |word| u32::from_be_bytes(*word))
}

/// A vector of four words, the first one lowest.
#[target_feature(enable = "sse2")]
fn quad([w0, w1, w2, w3]: [u32; 4]) -> __m128i {
    let [w0, w1, w2, w3] = [w0, w1, w2, w3].map(u32::cast_signed);
    _mm_set_epi32(w3, w2, w1, w0)
}

#[target_feature(enable = "sse2,sse4.1")]
fn words_of(quad: __m128i) -> [u32; 4] {
    let words = [
        _mm_extract_epi32::<0>(quad),
        _mm_extract_epi32::<1>(quad),
        _mm_extract_epi32::<2>(quad),
        _mm_extract_epi32::<3>(quad),
    ];
    words.map(i32::cast_unsigned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::String;
    use std::vec::Vec;

    fn hex(digest: [u8; 32]) -> String {
        digest.iter().map(|byte| std::format!("{byte:02x}")).collect()
    }

    // From FIPS 180-4's example file and NIST CAVP "SHA256ShortMsg"; the million a's from RFC 6234.
    #[test]
    fn known_answers() {
        let cases: [(&[u8], &str); 3] = [
            (
                b"",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                b"abc",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(hex(digest(input)), expected);
        }
        let million = std::vec![b'a'; 1_000_000];
        assert_eq!(
            hex(digest(&million)),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
        );
    }

    #[test]
    fn input_in_pieces_of_whole_blocks_gives_the_same_digest() {
        for len in [0usize, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 1000] {
            let input: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut hash = Sha256::new(Plain);
            let split = len / 2 / 64 * 64;
            assert_eq!(hash.update(&input[..split]), b"");
            assert_eq!(hash.finish(&input[split..]), digest(&input), "length {len}");
        }
    }
}
