//! The shim's own record of validated memory, which is also the EFI table that it hands to Linux.
//!
//! One bit per 2 MiB unit, set while the unit has not been validated. Linux panics or terminates when the
//! table is wrong, and a unit that is validated twice would hide a replay; so both follow from this record
//! alone. Table format: Linux, `include/linux/efi.h`, `struct efi_unaccepted_memory`, version 1.

use crate::bytes::{get, get_u64, put};
use crate::layout::UNIT;
use crate::plan::Ram;
use crate::reason::Reason;
use core::ops::Range;

const AT_PHYS_BASE: usize = 8;
const AT_SIZE: usize = 16;
const AT_BITMAP: usize = 24;
/// Bits of a bitmap word.
const WORD: u64 = 64;

/// Writes the table for `ram` with every unit unvalidated, but for the first, which holds the table itself
/// and which the caller has validated.
///
/// # Errors
/// [`Reason::TablesFull`] when `table` is too short.
pub fn create(table: &mut [u8], ram: &Ram) -> Result<(), Reason> {
    write(table, ram).ok_or(Reason::TablesFull)
}

fn write(table: &mut [u8], ram: &Ram) -> Option<()> {
    let words = (ram.end() / UNIT).div_ceil(WORD);
    put(table, 0, &1u32.to_le_bytes())?;
    put(table, 4, &u32::try_from(UNIT).ok()?.to_le_bytes())?;
    put(table, AT_PHYS_BASE, &0u64.to_le_bytes())?;
    put(table, AT_SIZE, &words.checked_mul(8)?.to_le_bytes())?;
    let high = ram.high().start / UNIT..ram.high().end / UNIT;
    for index in 0..words {
        let first = index.checked_mul(WORD)?;
        let bits = mask(first, &(1..ram.low().end / UNIT)) | mask(first, &high);
        put(table, at_word(index)?, &bits.to_le_bytes())?;
    }
    Some(())
}

/// The bits of the word that starts at unit `first` whose units lie in `units`.
fn mask(first: u64, units: &Range<u64>) -> u64 {
    let below = |unit: u64| match unit.saturating_sub(first) {
        bits if bits >= WORD => u64::MAX,
        bits => (1u64 << bits).wrapping_sub(1),
    };
    below(units.end) & !below(units.start)
}

fn at_word(index: u64) -> Option<usize> {
    usize::try_from(index)
        .ok()?
        .checked_mul(8)?
        .checked_add(AT_BITMAP)
}

/// Records that the units of `range` are validated now.
///
/// # Errors
/// [`Reason::BadValidation`], when a unit was validated before, is no RAM, or `range` is not in units; the
/// record is then no longer of use, as the machine must stop.
pub fn take(table: &mut [u8], range: &Range<u64>) -> Result<(), Reason> {
    if !range.start.is_multiple_of(UNIT) || !range.end.is_multiple_of(UNIT) {
        return Err(Reason::BadValidation);
    }
    let units = range.start / UNIT..range.end / UNIT;
    for index in units.start / WORD..units.end.div_ceil(WORD) {
        clear(table, index, &units).ok_or(Reason::BadValidation)?;
    }
    Ok(())
}

fn clear(table: &mut [u8], index: u64, units: &Range<u64>) -> Option<()> {
    let bits = mask(index.checked_mul(WORD)?, units);
    let at = at_word(index)?;
    let word = get_u64(table, at)?;
    let in_table = index.checked_mul(8)? < get_u64(table, AT_SIZE)?;
    (in_table && word & bits == bits).then_some(())?;
    put(table, at, &(word & !bits).to_le_bytes())
}

/// The first unvalidated unit at or above the unit `from`, by number.
#[must_use]
pub fn next(table: &[u8], from: u64) -> Option<u64> {
    let words = get::<8>(table, AT_SIZE).map(u64::from_le_bytes)? / 8;
    for index in from / WORD..words {
        let first = index.checked_mul(WORD)?;
        let bits = get_u64(table, at_word(index)?)? & mask(first, &(from..u64::MAX));
        if bits != 0 {
            return first.checked_add(bits.trailing_zeros().into());
        }
    }
    None
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const TOP: u64 = 0x1_0000_0000 / UNIT;

    fn set(table: &[u8]) -> BTreeSet<u64> {
        let mut units = BTreeSet::new();
        let mut from = 0;
        while let Some(unit) = next(table, from) {
            units.insert(unit);
            from = unit + 1;
        }
        units
    }

    #[test]
    fn a_new_table_names_all_ram_but_the_first_unit() {
        let ram = Ram::new(0x400_0000, 0x1_0060_0000).unwrap();
        let mut table = [0xee; 1024];
        create(&mut table, &ram).unwrap();
        assert_eq!(table[..8], [1, 0, 0, 0, 0, 0, 0x20, 0]);
        assert_eq!(get_u64(&table, 8), Some(0));
        assert_eq!(get_u64(&table, 16), Some(33 * 8));
        assert_eq!(set(&table), (1..32).chain(TOP..TOP + 3).collect());
        assert_eq!(table[24 + 33 * 8], 0xee);
    }

    #[test]
    fn a_table_that_does_not_fit_is_refused() {
        let ram = Ram::new(0x400_0000, 0x1_0060_0000).unwrap();
        assert_eq!(create(&mut [0; 24 + 33 * 8 - 1], &ram), Err(Reason::TablesFull));
    }

    #[test]
    fn nothing_is_validated_twice_or_outside_ram() {
        let ram = Ram::new(0x400_0000, 0).unwrap();
        let mut table = [0; 64];
        create(&mut table, &ram).unwrap();
        assert_eq!(take(&mut table, &(4 * UNIT..6 * UNIT)), Ok(()));
        for bad in [
            4 * UNIT..5 * UNIT,
            3 * UNIT..7 * UNIT,
            0..UNIT,
            31 * UNIT..33 * UNIT,
            7 * UNIT..7 * UNIT + 4096,
            64 * UNIT..65 * UNIT,
            u64::MAX - UNIT + 1..u64::MAX - UNIT + 1 + UNIT / 2,
        ] {
            assert_eq!(
                take(&mut table.clone(), &bad),
                Err(Reason::BadValidation),
                "{bad:x?}"
            );
        }
        assert_eq!(take(&mut table, &(6 * UNIT..6 * UNIT)), Ok(()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_taken_once_is_exactly_what_is_missing(
            low in 16u64..1536, high in 0u64..300, cuts in proptest::collection::vec((1u64..1536, 0u64..70), 0..20),
        ) {
            let high_top = if high == 0 { 0 } else { (TOP + high) * UNIT };
            let ram = Ram::new(low * UNIT, high_top).unwrap();
            let mut table = std::vec![0; 4096];
            create(&mut table, &ram).unwrap();
            let mut expected: BTreeSet<u64> = (1..low).chain(TOP..TOP + high).collect();
            for (start, len) in cuts {
                let range = start..start + len;
                let fits = range.clone().all(|unit| expected.contains(&unit));
                let before = table.clone();
                let taken = take(&mut table, &(range.start * UNIT..range.end * UNIT));
                prop_assert_eq!(taken.is_ok(), fits);
                if fits { expected.retain(|unit| !range.contains(unit)) } else { table = before }
                prop_assert_eq!(&set(&table), &expected);
            }
        }
    }
}
