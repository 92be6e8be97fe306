//! The boot page tables: an identity map of the first 512 GiB by 1 GiB pages.
//!
//! Under protection all of it is private but the staging area at its end, so the shim never changes a mapping.

use crate::boot::Mode;
use crate::layout::{C_BIT, SHARED_BIT, STAGING, TABLES};

/// Length of the two table pages.
const LEN: usize = 0x2000;
/// Offset of the PDPT page.
const PDPT: usize = 0x1000;
/// Present, writable.
const TABLE_FLAGS: u64 = 0b11;
/// Present, writable, accessed, dirty, large.
const PAGE_FLAGS: u64 = 0b1110_0011;

/// The PML4 page and the PDPT page, to be placed at [`TABLES`].
#[must_use]
pub fn encode(mode: Mode) -> [u8; LEN] {
    let (private, shared) = match mode {
        Mode::Soft => (0, 0),
        Mode::Snp => (C_BIT, 0),
        Mode::Tdx => (0, SHARED_BIT),
    };
    let mut pages = [0; LEN];
    let (pml4, pdpt) = pages.split_at_mut(PDPT);
    if let Some(entry) = pml4.first_chunk_mut::<8>() {
        *entry = (TABLES | PDPT as u64 | TABLE_FLAGS | private).to_le_bytes();
    }
    for (gib, entry) in (0u64..).zip(pdpt.as_chunks_mut::<8>().0) {
        let gpa = gib << 30;
        let bit = if gpa < STAGING { private } else { shared };
        *entry = (gpa | PAGE_FLAGS | bit).to_le_bytes();
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::get_u64;

    #[test]
    fn tables_map_each_gib_to_itself_and_only_staging_is_shared() {
        for (mode, private, shared) in [
            (Mode::Soft, 0, 0),
            (Mode::Snp, 1 << 51, 0),
            (Mode::Tdx, 0, 1 << 47),
        ] {
            let pages = encode(mode);
            assert_eq!(get_u64(&pages, 0), Some(0x10_d003 | private));
            assert!(pages[8..0x1000].iter().all(|&byte| byte == 0));
            for (gib, at) in (0..512).zip((0x1000..).step_by(8)) {
                let bit = if gib < 448 { private } else { shared };
                assert_eq!(
                    get_u64(&pages, at),
                    Some((gib * 0x4000_0000) | 0xe3 | bit),
                    "gib {gib}"
                );
            }
        }
    }
}
