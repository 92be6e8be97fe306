//! The host's view of guest RAM. Private pages have no host mapping and no type here.

pub mod map;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryResult,
    Permissions,
};

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
            std::thread::sleep(Duration::from_micros(50));
        }
        true
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
pub struct Hidden(Vec<(usize, u64)>);

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

/// Guest memory as a device may see it: shared pages, nothing else.
///
/// Implements [`GuestMemory`], so `virtio-queue` works on it unchanged, and a descriptor that points at a
/// private page fails like one that points at a hole.
#[derive(Clone, Debug)]
pub struct SharedMem {
    map: Arc<GuestMemoryMmap>,
    visible: Arc<VisibilityMap>,
    watch: Option<Arc<dyn Watch>>,
}

/// Is told of each access to shared memory before it is checked. Tests put one between a device and its memory, so
/// that memory changes exactly there; a machine has none.
pub trait Watch: Send + Sync + std::fmt::Debug {
    /// `bytes` at `at` are about to be accessed.
    fn before(&self, at: Gpa, bytes: u64, access: Permissions);
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

impl SharedMem {
    /// `map` must hold only the shared backing of each slot, never `guest_memfd`.
    pub fn new(map: Arc<GuestMemoryMmap>, visible: Arc<VisibilityMap>) -> Self {
        Self {
            map,
            visible,
            watch: None,
        }
    }

    /// The same memory, every access to which `watch` sees first.
    #[must_use]
    pub fn watched(self, watch: Arc<dyn Watch>) -> Self {
        Self {
            watch: Some(watch),
            ..self
        }
    }

    fn tell(&self, at: Gpa, bytes: u64, access: Permissions) {
        if let Some(watch) = &self.watch {
            watch.before(at, bytes, access);
        }
    }

    /// Marks a batch of synchronous accesses. A conversion to private waits for the guard to go before it
    /// discards anything, so keep the work under it bounded. Do not nest.
    pub fn batch(&self) -> RwLockReadGuard<'_, ()> {
        self.visible.busy.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if every byte of `[addr, addr + len)` is shared RAM now.
    pub fn all_shared(&self, addr: Gpa, len: u64) -> bool {
        self.visible.all_shared(addr, len)
    }

    /// Pins `[addr, addr + len)` for I/O that outlives a batch; `None` if a byte of it is not shared RAM.
    pub fn pin(&self, addr: Gpa, len: u64) -> Option<Pin> {
        self.tell(addr, len, Permissions::ReadWrite);
        for block in self.visible.blocks(addr, len) {
            block.fetch_add(1, Ordering::SeqCst);
        }
        let pin = Pin {
            visible: Arc::clone(&self.visible),
            start: addr,
            bytes: len,
        };
        self.visible.all_shared(addr, len).then_some(pin)
    }

    /// The mapping behind the view, to be kept alive while a pinned range is used by the kernel.
    pub fn mapping(&self) -> &Arc<GuestMemoryMmap> {
        &self.map
    }
}

impl GuestMemory for SharedMem {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.visible.all_shared(Gpa(addr.0), count as u64)
            && GuestMemoryBackend::check_range(&*self.map, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        self.tell(Gpa(addr.0), count as u64, access);
        if !self.check_range(addr, count, access) {
            return Err(GuestMemoryError::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(&*self.map, addr, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn range(start: u64, bytes: u64) -> PageRange {
        PageRange::new(Gpa(start), bytes).unwrap()
    }

    fn memory(bytes: u64) -> (SharedMem, Arc<VisibilityMap>) {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
        let visible = Arc::new(VisibilityMap::new(&[range(0, bytes)], Visibility::Shared));
        (SharedMem::new(Arc::new(map), visible.clone()), visible)
    }

    #[test]
    fn reads_of_private_pages_fail() {
        let (mem, visible) = memory(0x4000);
        visible.set(range(0x1000, 0x1000), Visibility::Private);
        let cases = [
            (0x0fff, 1, true),
            (0x0fff, 2, false),
            (0x1000, 1, false),
            (0x2000, 0x2000, true),
            (0x3fff, 2, false),
        ];
        for (addr, len, ok) in cases {
            let mut buf = vec![0; len];
            assert_eq!(
                mem.read_slice(&mut buf, GuestAddress(addr)).is_ok(),
                ok,
                "{addr:#x}+{len:#x}"
            );
        }
    }

    #[test]
    fn holes_are_never_shared() {
        let ram = [range(0, 0x3000), range(0x10_0000, 0x5000)];
        let visible = VisibilityMap::new(&ram, Visibility::Private);
        assert_eq!(visible.set(range(0, 0x20_0000), Visibility::Shared), 8);
        assert_eq!(visible.shared_frames(), 8);
        assert!(!visible.all_shared(Gpa(0x3000), 1));
        assert!(visible.all_shared(Gpa(0x10_4fff), 1));
        assert!(visible.covers(range(0x10_0000, 0x5000)));
        assert!(!visible.covers(range(0x2000, 0x2000)));
    }

    #[test]
    fn a_conversion_waits_for_pins_and_a_late_pin_is_refused() {
        let (mem, visible) = memory(0x4000);
        let page = range(0x1000, 0x1000);
        let pin = mem.pin(Gpa(0x1800), 0x10).unwrap();
        visible.set(page, Visibility::Private);
        assert!(!visible.drain(page, Duration::from_millis(1)));
        assert!(mem.pin(Gpa(0x1800), 0x10).is_none());
        drop(pin);
        assert!(visible.drain(page, Duration::from_millis(1)));
    }

    proptest::proptest! {
        #[test]
        fn the_map_agrees_with_a_list_of_frames(ops in proptest::collection::vec((0_u64..200, 1_u64..90, proptest::bool::ANY), 1..20)) {
            let visible = VisibilityMap::new(&[range(0, 256 * PAGE_SIZE)], Visibility::Private);
            let mut frames = [false; 320];
            for (first, count, shared) in ops {
                let to = if shared { Visibility::Shared } else { Visibility::Private };
                let span = first as usize..(first + count) as usize;
                let expected = frames[span.clone()].iter().enumerate()
                    .filter(|(i, f)| first as usize + i < 256 && **f != shared).count() as u64;
                assert_eq!(visible.set(range(first * PAGE_SIZE, count * PAGE_SIZE), to), expected);
                for frame in span.filter(|f| *f < 256) {
                    frames[frame] = shared;
                }
            }
            for (frame, shared) in frames.iter().enumerate() {
                assert_eq!(visible.all_shared(Gpa(frame as u64 * PAGE_SIZE), 4096), *shared);
            }
        }
    }
}
