//! Which pages devices may touch, and what keeps a page from leaving while one does.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

// Not from `std`: tests/model runs this file with a scheduler that tries every interleaving.
use super::sync::{AtomicU32, AtomicU64, Instant, Ordering, RwLock, RwLockReadGuard, sleep};
use crate::addr::{Gpa, PAGE_SIZE, PageRange};

/// Which side of the trust boundary a page is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Host and guest see the same plaintext.
    Shared,
    /// Only the guest sees plaintext.
    Private,
}

/// In-flight I/O is counted in blocks of this many bytes; a conversion waits for whole blocks.
const PIN_BLOCK: u64 = 2 << 20;

/// One bit per guest frame of RAM, set while the frame is shared, and a count of in-flight host accesses per
/// 2 MiB block.
///
/// Order matters: an access counts itself before it looks at the bits, a conversion to private clears the
/// bits before it looks at the counts. So either the access sees a private page and gives up, or the
/// conversion sees the access and waits.
#[derive(Debug)]
pub struct VisibilityMap {
    ram: Box<[PageRange]>,
    shared: Box<[AtomicU64]>,
    pins: Box<[AtomicU32]>,
    /// Readers are batches of synchronous device work; a conversion takes it once to let them drain.
    busy: RwLock<()>,
}

impl VisibilityMap {
    /// All frames of `ram` (ascending, disjoint) start on side `initial`.
    pub fn new(ram: &[PageRange], initial: Visibility) -> Self {
        let end = ram.last().map_or(0, |last| last.end().0);
        let frames = end.div_ceil(PAGE_SIZE);
        let map = Self {
            ram: ram.into(),
            shared: (0..frames.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pins: (0..end.div_ceil(PIN_BLOCK)).map(|_| AtomicU32::new(0)).collect(),
            busy: RwLock::new(()),
        };
        if initial == Visibility::Shared {
            for range in ram {
                map.set(*range, initial);
            }
        }
        map
    }

    /// The RAM ranges that the map was made for.
    pub fn ram(&self) -> &[PageRange] {
        &self.ram
    }

    /// True if every frame of `range` is RAM.
    pub fn covers(&self, range: PageRange) -> bool {
        self.ram.iter().any(|ram| ram.contains(range))
    }

    /// Makes `range` private and says which of its frames were shared before, for [`show`](Self::show).
    pub fn hide(&self, range: PageRange) -> Hidden {
        let words = word_masks(range).filter_map(|(index, mask)| {
            let mask = mask & self.ram_mask(index);
            let old = self.shared.get(index)?.fetch_and(!mask, Ordering::SeqCst) & mask;
            (old != 0).then_some((index, old))
        });
        Hidden(words.collect())
    }

    /// Undoes one [`hide`](Self::hide): what was private before it stays private.
    pub fn show(&self, hidden: Hidden) {
        for (index, mask) in hidden.0 {
            if let Some(word) = self.shared.get(index) {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        }
    }

    /// Moves `range` to side `to` and returns how many frames changed. Frames outside RAM are ignored.
    pub fn set(&self, range: PageRange, to: Visibility) -> u64 {
        let mut changed = 0_u64;
        for (index, mask) in word_masks(range) {
            let Some(word) = self.shared.get(index) else {
                continue;
            };
            let mask = mask & self.ram_mask(index);
            let old = match to {
                Visibility::Shared => !word.fetch_or(mask, Ordering::SeqCst),
                Visibility::Private => word.fetch_and(!mask, Ordering::SeqCst),
            };
            changed = changed.saturating_add(u64::from((old & mask).count_ones()));
        }
        changed
    }

    /// True if every byte of `[addr, addr + len)` lies in shared frames of RAM.
    pub fn all_shared(&self, addr: Gpa, len: u64) -> bool {
        let Some(end) = addr.0.checked_add(len) else {
            return false;
        };
        let first = addr.0 & !(PAGE_SIZE.wrapping_sub(1));
        let Some(bytes) = end
            .checked_next_multiple_of(PAGE_SIZE)
            .and_then(|end| end.checked_sub(first))
        else {
            return false;
        };
        if bytes == 0 {
            return true;
        }
        PageRange::new(Gpa(first), bytes).is_ok_and(|range| {
            word_masks(range).all(|(index, mask)| {
                self.shared
                    .get(index)
                    .is_some_and(|word| word.load(Ordering::SeqCst) & mask == mask)
            })
        })
    }

    /// True if no frame of `range` is shared.
    pub fn all_private(&self, range: PageRange) -> bool {
        word_masks(range).all(|(index, mask)| {
            let word = self.shared.get(index);
            word.is_none_or(|word| word.load(Ordering::SeqCst) & mask == 0)
        })
    }

    /// Frames that are shared now.
    pub fn shared_frames(&self) -> u64 {
        self.shared
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    /// Waits until no host access that began before this call can still touch `range`; false if that takes
    /// longer than `limit`. Call it after the bits were cleared.
    pub fn drain(&self, range: PageRange, limit: Duration) -> bool {
        drop(self.busy.write().unwrap_or_else(PoisonError::into_inner));
        let until = Instant::now().checked_add(limit);
        let blocks = self.blocks(range.start(), range.bytes());
        while blocks.iter().any(|pin| pin.load(Ordering::SeqCst) != 0) {
            if until.is_none_or(|until| Instant::now() >= until) {
                return false;
            }
            sleep(Duration::from_micros(50));
        }
        true
    }

    /// Marks a batch of synchronous accesses; see [`drain`](Self::drain).
    pub fn batch(&self) -> RwLockReadGuard<'_, ()> {
        self.busy.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins `[addr, addr + len)` for I/O that outlives a batch; `None` if a byte of it is not shared RAM.
    pub fn pin(self: &Arc<Self>, addr: Gpa, len: u64) -> Option<Pin> {
        for block in self.blocks(addr, len) {
            block.fetch_add(1, Ordering::SeqCst);
        }
        let pin = Pin {
            visible: Arc::clone(self),
            start: addr,
            bytes: len,
        };
        self.all_shared(addr, len).then_some(pin)
    }

    fn blocks(&self, start: Gpa, bytes: u64) -> &[AtomicU32] {
        let first = usize::try_from(start.0 / PIN_BLOCK).unwrap_or(usize::MAX);
        let last = start.0.saturating_add(bytes).div_ceil(PIN_BLOCK);
        let last = usize::try_from(last).unwrap_or(usize::MAX).min(self.pins.len());
        self.pins.get(first..last).unwrap_or_default()
    }

    /// Bits of word `index` that are RAM; only words at the edge of a range have both kinds.
    fn ram_mask(&self, index: usize) -> u64 {
        let word_bytes = PAGE_SIZE.saturating_mul(64);
        let start = (index as u64).saturating_mul(word_bytes);
        let mut mask = 0;
        for ram in &self.ram {
            let from = ram.start().0.max(start);
            let to = ram.end().0.min(start.saturating_add(word_bytes));
            if let Some(bytes) = to.checked_sub(from)
                && let Ok(part) = PageRange::new(Gpa(from), bytes)
            {
                mask |= word_masks(part).next().map_or(0, |(_, mask)| mask);
            }
        }
        mask
    }
}

/// The frames that one [`VisibilityMap::hide`] took from the shared side.
#[derive(Debug)]
#[must_use]
pub struct Hidden(pub(super) Vec<(usize, u64)>);

/// The bitmap words that `range` touches, each with the mask of the range's bits in it.
fn word_masks(range: PageRange) -> impl Iterator<Item = (usize, u64)> {
    let first = range.start().0 / PAGE_SIZE;
    let end = range.end().0 / PAGE_SIZE;
    (first / 64..end.div_ceil(64)).filter_map(move |word| {
        let base = word.saturating_mul(64);
        let low = u32::try_from(first.saturating_sub(base)).ok()?;
        let high = u32::try_from(end.saturating_sub(base).min(64)).ok()?;
        let below_high = u64::MAX.checked_shr(64_u32.saturating_sub(high)).unwrap_or(0);
        let from_low = u64::MAX.checked_shl(low).unwrap_or(0);
        Some((usize::try_from(word).ok()?, below_high & from_low))
    })
}

/// Keeps a range of shared memory from turning private while host I/O is in flight on it.
#[derive(Debug)]
pub struct Pin {
    visible: Arc<VisibilityMap>,
    start: Gpa,
    bytes: u64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        for block in self.visible.blocks(self.start, self.bytes) {
            block.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
