//! SHA-384 (FIPS 180-4) of short inputs: what a TDX run-time measurement register is made of.

/// Length of a digest in bytes.
pub const LEN: usize = 48;
/// A digest.
pub type Digest = [u8; LEN];

/// Initial hash value (FIPS 180-4, "SHA-384" under "Setting the Initial Hash Value").
const INITIAL: [u64; 8] = [
    0xcbbb_9d5d_c105_9ed8,
    0x629a_292a_367c_d507,
    0x9159_015a_3070_dd17,
    0x152f_ecd8_f70e_5939,
    0x6733_2667_ffc0_0b31,
    0x8eb4_4a87_6858_1511,
    0xdb0c_2e0d_64f9_8fa7,
    0x47b5_481d_befa_4fa4,
];

/// Round constants (FIPS 180-4, "SHA-384, SHA-512, SHA-512/224 and SHA-512/256 Constants").
#[rustfmt::skip]
const ROUND: [u64; 80] = [
    0x428a_2f98_d728_ae22, 0x7137_4491_23ef_65cd, 0xb5c0_fbcf_ec4d_3b2f, 0xe9b5_dba5_8189_dbbc,
    0x3956_c25b_f348_b538, 0x59f1_11f1_b605_d019, 0x923f_82a4_af19_4f9b, 0xab1c_5ed5_da6d_8118,
    0xd807_aa98_a303_0242, 0x1283_5b01_4570_6fbe, 0x2431_85be_4ee4_b28c, 0x550c_7dc3_d5ff_b4e2,
    0x72be_5d74_f27b_896f, 0x80de_b1fe_3b16_96b1, 0x9bdc_06a7_25c7_1235, 0xc19b_f174_cf69_2694,
    0xe49b_69c1_9ef1_4ad2, 0xefbe_4786_384f_25e3, 0x0fc1_9dc6_8b8c_d5b5, 0x240c_a1cc_77ac_9c65,
    0x2de9_2c6f_592b_0275, 0x4a74_84aa_6ea6_e483, 0x5cb0_a9dc_bd41_fbd4, 0x76f9_88da_8311_53b5,
    0x983e_5152_ee66_dfab, 0xa831_c66d_2db4_3210, 0xb003_27c8_98fb_213f, 0xbf59_7fc7_beef_0ee4,
    0xc6e0_0bf3_3da8_8fc2, 0xd5a7_9147_930a_a725, 0x06ca_6351_e003_826f, 0x1429_2967_0a0e_6e70,
    0x27b7_0a85_46d2_2ffc, 0x2e1b_2138_5c26_c926, 0x4d2c_6dfc_5ac4_2aed, 0x5338_0d13_9d95_b3df,
    0x650a_7354_8baf_63de, 0x766a_0abb_3c77_b2a8, 0x81c2_c92e_47ed_aee6, 0x9272_2c85_1482_353b,
    0xa2bf_e8a1_4cf1_0364, 0xa81a_664b_bc42_3001, 0xc24b_8b70_d0f8_9791, 0xc76c_51a3_0654_be30,
    0xd192_e819_d6ef_5218, 0xd699_0624_5565_a910, 0xf40e_3585_5771_202a, 0x106a_a070_32bb_d1b8,
    0x19a4_c116_b8d2_d0c8, 0x1e37_6c08_5141_ab53, 0x2748_774c_df8e_eb99, 0x34b0_bcb5_e19b_48a8,
    0x391c_0cb3_c5c9_5a63, 0x4ed8_aa4a_e341_8acb, 0x5b9c_ca4f_7763_e373, 0x682e_6ff3_d6b2_b8a3,
    0x748f_82ee_5def_b2fc, 0x78a5_636f_4317_2f60, 0x84c8_7814_a1f0_ab72, 0x8cc7_0208_1a64_39ec,
    0x90be_fffa_2363_1e28, 0xa450_6ceb_de82_bde9, 0xbef9_a3f7_b2c6_7915, 0xc671_78f2_e372_532b,
    0xca27_3ece_ea26_619c, 0xd186_b8c7_21c0_c207, 0xeada_7dd6_cde0_eb1e, 0xf57d_4f7f_ee6e_d178,
    0x06f0_67aa_7217_6fba, 0x0a63_7dc5_a2c8_98a6, 0x113f_9804_bef9_0dae, 0x1b71_0b35_131c_471b,
    0x28db_77f5_2304_7d84, 0x32ca_ab7b_40c7_2493, 0x3c9e_be0a_15c9_bebc, 0x431d_67c4_9c10_0d4c,
    0x4cc5_d4be_cb3e_42b6, 0x597f_299c_fc65_7e2a, 0x5fcb_6fab_3ad6_faec, 0x6c44_198c_4a47_5817,
];

/// One block of input in bytes.
const BLOCK: usize = 128;
/// Bytes of the last block that the length leaves for data and the end mark.
const LAST_DATA: usize = 112;

/// The SHA-384 digest of `input`.
#[must_use]
pub fn digest(input: &[u8]) -> Digest {
    let mut state = INITIAL;
    let (blocks, rest) = input.as_chunks::<BLOCK>();
    for block in blocks {
        fold(&mut state, block);
    }
    let mut tail = [[0; BLOCK]; 2];
    for (to, from) in tail.as_flattened_mut().iter_mut().zip(rest.iter().chain(&[0x80])) {
        *to = *from;
    }
    let blocks = if rest.len() < LAST_DATA { 1 } else { 2 };
    let tail = tail.get_mut(..blocks).unwrap_or_default();
    if let Some(len) = tail.as_flattened_mut().last_chunk_mut::<8>() {
        *len = (input.len() as u64).wrapping_mul(8).to_be_bytes();
    }
    for block in tail {
        fold(&mut state, block);
    }
    let mut digest = [0; LEN];
    for (to, word) in digest.as_chunks_mut::<8>().0.iter_mut().zip(state) {
        *to = word.to_be_bytes();
    }
    digest
}

/// FIPS 180-4, "SHA-512 Hash Computation", with the message schedule kept in sixteen words.
#[expect(clippy::indexing_slicing, reason = "indices are masked to the array length")]
fn fold(state: &mut [u64; 8], block: &[u8; BLOCK]) {
    let mut schedule = [0u64; 16];
    for (word, bytes) in schedule.iter_mut().zip(block.as_chunks::<8>().0) {
        *word = u64::from_be_bytes(*bytes);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (t, constant) in ROUND.iter().enumerate() {
        let word = |back: usize| schedule[t.wrapping_sub(back) & 15];
        if t >= 16 {
            let (w15, w2) = (word(15), word(2));
            let s0 = w15.rotate_right(1) ^ w15.rotate_right(8) ^ (w15 >> 7);
            let s1 = w2.rotate_right(19) ^ w2.rotate_right(61) ^ (w2 >> 6);
            schedule[t & 15] = word(16).wrapping_add(s0).wrapping_add(word(7)).wrapping_add(s1);
        }
        let s1 = e.rotate_right(14) ^ e.rotate_right(18) ^ e.rotate_right(41);
        let choice = (e & f) ^ (!e & g);
        let t1 = h
            .wrapping_add(s1)
            .wrapping_add(choice)
            .wrapping_add(*constant)
            .wrapping_add(schedule[t & 15]);
        let s0 = a.rotate_right(28) ^ a.rotate_right(34) ^ a.rotate_right(39);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::String;

    fn hex(digest: Digest) -> String {
        digest.iter().map(|byte| std::format!("{byte:02x}")).collect()
    }

    // From FIPS 180-4's example files and RFC 6234; the others, around the borders of a block, computed by
    // another implementation (Python's hashlib).
    #[test]
    fn known_answers() {
        let long = [b'a'; 240];
        let cases: [(&[u8], &str); 7] = [
            (
                b"",
                "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b",
            ),
            (
                b"abc",
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
                "09330c33f71147e83d192fc782cd1b4753111b173b3b05d22fa08086e3b0f712fcc7c71a557e2db966c3e9fa91746039",
            ),
            (
                &long[..111],
                "3c37955051cb5c3026f94d551d5b5e2ac38d572ae4e07172085fed81f8466b8f90dc23a8ffcdea0b8d8e58e8fdacc80a",
            ),
            (
                &long[..127],
                "9bd06b1763c2cf7aef40e795dc65bc96d59c41b537f3ad72ebdefd485476b5717c1aeb37c327fe9c1831b12b9efd08ae",
            ),
            (
                &long[..128],
                "edb12730a366098b3b2beac75a3bef1b0969b15c48e2163c23d96994f8d1bef760c7e27f3c464d3829f56c0d53808b0b",
            ),
            (
                &long[..240],
                "4d86957beab348a29180f02d02564ac1d32f5b4c217ece2b038f7c184f0cafc8c8e438eb82aa03796170e0a7ce8c0675",
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(hex(digest(input)), expected, "{} bytes", input.len());
        }
        let million = std::vec![b'a'; 1_000_000];
        assert_eq!(
            hex(digest(&million)),
            "9d0e1809716474cb086e834e310a4a1ced149e9c00f248527972cec5704c2a5b07b8b3dc38ecc4ebae97ddd87f3d8985"
        );
    }
}
