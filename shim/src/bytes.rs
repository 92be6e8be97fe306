//! Little-endian fields in byte slices, without panics.

/// The bytes of `page` at `at`, or `None` when they reach beyond it.
#[must_use]
pub fn get<const N: usize>(page: &[u8], at: usize) -> Option<[u8; N]> {
    page.get(at..)?.first_chunk::<N>().copied()
}

/// A little-endian `u32` at `at`.
#[must_use]
pub fn get_u32(page: &[u8], at: usize) -> Option<u32> {
    get(page, at).map(u32::from_le_bytes)
}

/// A little-endian `u64` at `at`.
#[must_use]
pub fn get_u64(page: &[u8], at: usize) -> Option<u64> {
    get(page, at).map(u64::from_le_bytes)
}

/// Writes `bytes` at `at`; `None`, and nothing written, when they do not fit.
#[must_use]
pub fn put(page: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    let end = at.checked_add(bytes.len())?;
    page.get_mut(at..end)?.copy_from_slice(bytes);
    Some(())
}

/// Whether every byte of `page` from `from` to `to` is zero; false when the range reaches beyond it.
#[must_use]
pub fn zero_between(page: &[u8], from: usize, to: usize) -> bool {
    page.get(from..to)
        .is_some_and(|span| span.iter().all(|&byte| byte == 0))
}
