//! The boot page tables: an identity map of the first 512 GiB by 1 GiB pages.

use crate::layout::{C_BIT, TABLES};

/// Length of the two table pages.
const LEN: usize = 0x2000;
/// Offset of the PDPT page.
const PDPT: usize = 0x1000;
/// Present, writable.
const TABLE_FLAGS: u64 = 0b11;
/// Present, writable, accessed, dirty, large.
const PAGE_FLAGS: u64 = 0b1110_0011;

/// The PML4 page and the PDPT page, to be placed at [`TABLES`]; every entry is private when `private`.
#[must_use]
pub fn encode(private: bool) -> [u8; LEN] {
    let mut pages = [0; LEN];
    let (pml4, pdpt) = pages.split_at_mut(PDPT);
    let (top, _) = pml4.as_chunks_mut::<8>();
    if let Some(entry) = top.first_mut() {
        *entry = (TABLES | PDPT as u64 | TABLE_FLAGS | private_bit(private)).to_le_bytes();
    }
    let (entries, _) = pdpt.as_chunks_mut::<8>();
    for (gib, entry) in (0u64..).zip(entries) {
        *entry = entry_for(gib, private).to_le_bytes();
    }
    pages
}

/// The PDPT entry that maps GiB number `gib` (below 512) to itself.
#[must_use]
pub fn entry_for(gib: u64, private: bool) -> u64 {
    (gib << 30) | PAGE_FLAGS | private_bit(private)
}

fn private_bit(private: bool) -> u64 {
    if private { C_BIT } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::get_u64;

    #[test]
    fn tables_map_each_gib_to_itself_and_carry_the_c_bit_only_when_private() {
        for (private, bit) in [(false, 0), (true, 1 << 51)] {
            let pages = encode(private);
            assert_eq!(get_u64(&pages, 0), Some(0x10_d003 | bit));
            assert!(pages[8..0x1000].iter().all(|&byte| byte == 0));
            for (gib, at) in (0..512).zip((0x1000..).step_by(8)) {
                assert_eq!(
                    get_u64(&pages, at),
                    Some((gib * 0x4000_0000) | 0xe3 | bit),
                    "gib {gib}"
                );
            }
        }
    }
}
