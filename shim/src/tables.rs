//! The boot page tables: an identity map of the first 512 GiB by 1 GiB pages.
//!
//! On SNP all of it is private but the staging area at its end, so the shim never changes a mapping.

use crate::layout::{C_BIT, STAGING, TABLES};

/// Length of the two table pages.
const LEN: usize = 0x2000;
/// Offset of the PDPT page.
const PDPT: usize = 0x1000;
/// Present, writable.
const TABLE_FLAGS: u64 = 0b11;
/// Present, writable, accessed, dirty, large.
const PAGE_FLAGS: u64 = 0b1110_0011;

/// The PML4 page and the PDPT page, to be placed at [`TABLES`]; on SNP, `private` is true.
#[must_use]
pub fn encode(private: bool) -> [u8; LEN] {
    let bit = if private { C_BIT } else { 0 };
    let mut pages = [0; LEN];
    let (pml4, pdpt) = pages.split_at_mut(PDPT);
    if let Some(entry) = pml4.first_chunk_mut::<8>() {
        *entry = (TABLES | PDPT as u64 | TABLE_FLAGS | bit).to_le_bytes();
    }
    for (gib, entry) in (0u64..).zip(pdpt.as_chunks_mut::<8>().0) {
        let gpa = gib << 30;
        let bit = if gpa < STAGING { bit } else { 0 };
        *entry = (gpa | PAGE_FLAGS | bit).to_le_bytes();
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::get_u64;

    #[test]
    fn tables_map_each_gib_to_itself_and_only_staging_is_shared_on_snp() {
        for (private, bit) in [(false, 0), (true, 1 << 51)] {
            let pages = encode(private);
            assert_eq!(get_u64(&pages, 0), Some(0x10_d003 | bit));
            assert!(pages[8..0x1000].iter().all(|&byte| byte == 0));
            for (gib, at) in (0..512).zip((0x1000..).step_by(8)) {
                let bit = if gib < 448 { bit } else { 0 };
                assert_eq!(
                    get_u64(&pages, at),
                    Some((gib * 0x4000_0000) | 0xe3 | bit),
                    "gib {gib}"
                );
            }
        }
    }
}
