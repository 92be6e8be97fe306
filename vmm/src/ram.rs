//! Guest RAM and its two backings. The only place that can change a page's side.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arch::addr::{BadRange, Gpa, PAGE_SIZE, PageRange};
use arch::kvm::gmem::Gmem;
use arch::kvm::vm::Vm;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use shim::layout;

/// How long a conversion waits for host I/O on its pages before the guest is told to try again.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// What conversion needs from the kernel. KVM in production, a recorder in tests.
pub trait Backing: Send + Sync + std::fmt::Debug {
    /// `KVM_SET_MEMORY_ATTRIBUTES`; nothing where the VM has no private memory.
    ///
    /// # Errors
    /// The kernel's.
    fn set_attribute(&self, range: PageRange, to: Visibility) -> io::Result<()>;
    /// Frees the pages of the side that the range is leaving.
    ///
    /// # Errors
    /// The kernel's.
    fn discard(&self, range: PageRange, old: Visibility) -> io::Result<()>;
}

/// Why pages did not change sides.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Not a page range at all. The guest's fault: answer it.
    #[error(transparent)]
    BadRange(#[from] BadRange),
    /// The guest named something that is not RAM. Its fault: answer it.
    #[error("{start:#x}+{bytes:#x} is not guest RAM")]
    NotRam {
        /// First byte.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// Host I/O on the pages did not end in time; the guest may try again.
    #[error("guest pages are busy with I/O")]
    Busy,
    /// The host failed. Ours: stop, because the two backings may now disagree.
    #[error("converting guest pages")]
    Host(#[from] io::Error),
}

/// Counters for events, tests and people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RamGauges {
    /// Bytes that are shared now.
    pub shared_bytes: u64,
    /// Bytes that are private now.
    pub private_bytes: u64,
    /// Conversions done since the start.
    pub conversions: u64,
}

/// Owns guest RAM. Has no accessor for private contents, because none can exist.
#[derive(Debug)]
pub struct GuestRam {
    shared: SharedMem,
    visible: Arc<VisibilityMap>,
    backing: Box<dyn Backing>,
    /// Held for a whole conversion: two vCPUs may name the same pages.
    converting: Mutex<()>,
    conversions: AtomicU64,
}

impl GuestRam {
    /// Takes over the parts that the machine builder made.
    pub fn new(shared: SharedMem, visible: Arc<VisibilityMap>, backing: Box<dyn Backing>) -> Self {
        Self {
            shared,
            visible,
            backing,
            converting: Mutex::new(()),
            conversions: AtomicU64::new(0),
        }
    }

    /// The view handed to devices.
    pub fn shared(&self) -> &SharedMem {
        &self.shared
    }

    /// Where RAM is.
    pub fn ranges(&self) -> &[PageRange] {
        self.visible.ram()
    }

    /// Sizes of both sides now.
    pub fn gauges(&self) -> RamGauges {
        let all: u64 = self.visible.ram().iter().map(|r| r.bytes()).sum();
        let shared_bytes = self.visible.shared_frames().saturating_mul(PAGE_SIZE);
        RamGauges {
            shared_bytes,
            private_bytes: all.saturating_sub(shared_bytes),
            conversions: self.conversions.load(Ordering::Relaxed),
        }
    }

    /// Serves the guest's request to move `pages` pages at `gpa`. What is no RAM at all is shared already.
    ///
    /// # Errors
    /// See [`ConvertError`]; all but `Host` are answers to the guest.
    pub fn convert_request(&self, gpa: u64, pages: u64, to: Visibility) -> Result<(), ConvertError> {
        let bytes = pages.checked_mul(PAGE_SIZE).unwrap_or(0);
        let range = PageRange::new(Gpa(gpa), bytes)?;
        let outside = self.visible.ram().iter().all(|ram| !ram.overlaps(range));
        if outside && to == Visibility::Shared {
            return Ok(());
        }
        self.convert(range, to)
    }

    /// Moves `range` to side `to`. The visible bits are cleared first and set last, so a device never sees a
    /// page as shared while the guest can still put secrets in it, and no host access that began before is
    /// still running when the shared side is discarded.
    ///
    /// # Errors
    /// See [`ConvertError`].
    pub fn convert(&self, range: PageRange, to: Visibility) -> Result<(), ConvertError> {
        self.in_ram(range)?;
        let _whole = self.converting.lock().unwrap_or_else(PoisonError::into_inner);
        self.move_to(range, to)
    }

    /// As [`convert`](Self::convert), for a guest that touched `range` as if it were on side `to` already. Does nothing if
    /// another vCPU has converted it; waits for one that is about to.
    ///
    /// # Errors
    /// See [`ConvertError`].
    pub fn convert_touched(&self, range: PageRange, to: Visibility) -> Result<(), ConvertError> {
        self.in_ram(range)?;
        let _whole = self.converting.lock().unwrap_or_else(PoisonError::into_inner);
        let there = match to {
            Visibility::Shared => self.visible.all_shared(range.start(), range.bytes()),
            Visibility::Private => self.visible.all_private(range),
        };
        if there { Ok(()) } else { self.move_to(range, to) }
    }

    fn in_ram(&self, range: PageRange) -> Result<(), ConvertError> {
        let (start, bytes) = (range.start().0, range.bytes());
        let covered = self.visible.covers(range);
        covered.then_some(()).ok_or(ConvertError::NotRam { start, bytes })
    }

    /// Call it with `converting` held.
    fn move_to(&self, range: PageRange, to: Visibility) -> Result<(), ConvertError> {
        match to {
            Visibility::Private => {
                let hidden = self.visible.hide(range);
                if !self.visible.drain(range, DRAIN_LIMIT) {
                    self.visible.show(hidden);
                    return Err(ConvertError::Busy);
                }
                self.backing.set_attribute(range, to)?;
                self.backing.discard(range, Visibility::Shared)?;
            }
            Visibility::Shared => {
                self.backing.set_attribute(range, to)?;
                self.backing.discard(range, Visibility::Private)?;
                self.visible.set(range, to);
            }
        }
        self.conversions.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The RAM ranges of a machine with `bytes` of memory: below 3 GiB, the rest from 4 GiB.
///
/// # Errors
/// `bytes` is no multiple of the page size.
pub fn ranges(bytes: u64) -> Result<Vec<PageRange>, BadRange> {
    let low = bytes.min(layout::LOW_RAM_MAX);
    let mut ranges = vec![PageRange::new(Gpa(0), low)?];
    if let Some(high) = bytes.checked_sub(low)
        && high != 0
    {
        ranges.push(PageRange::new(Gpa(layout::HIGH_RAM), high)?);
    }
    Ok(ranges)
}

/// The backing of a VM: KVM's attribute map and both kinds of host memory.
#[derive(Debug)]
pub struct KvmBacking {
    vm: Arc<Vm>,
    host: HostRam,
    /// Private memory of all RAM ranges, packed; `None` where private pages use the shared side's memory.
    private: Option<Gmem>,
}

impl KvmBacking {
    /// Puts the VM's memory slots in place, numbered from 0 in the order of the ranges.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(vm: Arc<Vm>, host: HostRam, private: Option<Gmem>) -> io::Result<Self> {
        use vm_memory::GuestMemoryRegion;
        let mut offset = 0_u64;
        for (slot, region) in (0_u32..).zip(host.regions()) {
            vm.map_slot(
                slot,
                Arc::clone(region),
                private.as_ref().map(|gmem| (gmem, offset)),
            )?;
            offset = offset.saturating_add(region.len());
        }
        Ok(Self { vm, host, private })
    }

    /// Offset of a guest address in the packed guest_memfd file.
    fn file_offset(&self, at: Gpa) -> Option<u64> {
        use vm_memory::GuestMemoryRegion;
        let mut offset = 0_u64;
        for region in self.host.regions() {
            if let Some(inside) = at.0.checked_sub(region.start_addr().0)
                && inside < region.len()
            {
                return offset.checked_add(inside);
            }
            offset = offset.saturating_add(region.len());
        }
        None
    }
}

impl Backing for KvmBacking {
    fn set_attribute(&self, range: PageRange, to: Visibility) -> io::Result<()> {
        match self.private {
            Some(_) => self.vm.set_visibility(range, to),
            None => Ok(()),
        }
    }

    fn discard(&self, range: PageRange, old: Visibility) -> io::Result<()> {
        match (old, &self.private) {
            (Visibility::Private, Some(gmem)) => {
                let offset = self
                    .file_offset(range.start())
                    .ok_or_else(|| io::Error::other("range has no guest_memfd"))?;
                gmem.punch(offset, range.bytes())
            }
            // One memory for both sides: what the guest knew of the page is gone either way, as on hardware.
            (Visibility::Private | Visibility::Shared, _) => self.host.discard(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Clone, Debug, Default)]
    struct Recorder(Arc<Mutex<Vec<String>>>);
    impl Backing for Recorder {
        fn set_attribute(&self, _: PageRange, to: Visibility) -> io::Result<()> {
            self.0.lock().unwrap().push(format!("attribute {to:?}"));
            Ok(())
        }
        fn discard(&self, _: PageRange, old: Visibility) -> io::Result<()> {
            self.0.lock().unwrap().push(format!("discard {old:?}"));
            Ok(())
        }
    }

    fn guest_ram(bytes: u64) -> (GuestRam, Recorder) {
        let ram = ranges(bytes).unwrap();
        let host = HostRam::allocate(&ram).unwrap();
        let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Shared));
        let shared = SharedMem::new(host.map().clone(), visible.clone());
        let calls = Recorder::default();
        (GuestRam::new(shared, visible, Box::new(calls.clone())), calls)
    }

    #[test]
    fn memory_above_three_gib_moves_above_the_hole() {
        let all = ranges(5 << 30).unwrap();
        let spans: Vec<_> = all.iter().map(|r| (r.start().0, r.end().0)).collect();
        assert_eq!(spans, [(0, 0xc000_0000), (1 << 32, (1 << 32) + (2 << 30))]);
        assert_eq!(ranges(512 << 20).unwrap().len(), 1);
    }

    #[test]
    fn the_attribute_changes_before_the_old_side_is_discarded() {
        let (ram, calls) = guest_ram(1 << 20);
        ram.convert_request(0x1000, 1, Visibility::Private).unwrap();
        assert!(ram.shared().read_obj::<u8>(GuestAddress(0x1000)).is_err());
        ram.convert_request(0x1000, 1, Visibility::Shared).unwrap();
        assert!(ram.shared().read_obj::<u8>(GuestAddress(0x1000)).is_ok());
        let expected = [
            "attribute Private",
            "discard Shared",
            "attribute Shared",
            "discard Private",
        ];
        assert_eq!(*calls.0.lock().unwrap(), expected);
        assert_eq!(ram.gauges().conversions, 2);
    }

    /// C53 of the list of hostile cases.
    #[test]
    fn conversion_requests_that_a_guest_must_not_get() {
        let (ram, calls) = guest_ram(1 << 20);
        let private = Visibility::Private;
        let cases = [
            ("no pages", 0x1000, 0, private),
            ("unaligned", 0x1001, 1, private),
            ("wraps", u64::MAX - 0xfff, 2, private),
            ("page count times 4096 wraps", 0x1000, u64::MAX, private),
            (
                "page count times 4096 wraps to something small",
                0x1000,
                (1 << 52) + 1,
                private,
            ),
            ("past the end of RAM", 0xf_f000, 2, private),
            ("past the end of RAM, to shared", 0xf_f000, 2, Visibility::Shared),
            ("hole", 0x40_0000, 1, private),
            ("local APIC", 0xfee0_0000, 1, private),
        ];
        for (name, gpa, pages, to) in cases {
            let answer = ram.convert_request(gpa, pages, to);
            assert!(
                matches!(
                    answer,
                    Err(ConvertError::BadRange(_) | ConvertError::NotRam { .. })
                ),
                "{name}: {answer:?}"
            );
        }
        assert!(calls.0.lock().unwrap().is_empty(), "nothing was touched");
        ram.convert_request(0xfee0_0000, 1, Visibility::Shared).unwrap();
        assert_eq!(ram.gauges().private_bytes, 0);
    }

    /// C51: the conversion does not discard under I/O, and the page stays shared.
    #[test]
    fn pages_with_io_in_flight_do_not_convert() {
        let (ram, calls) = guest_ram(1 << 20);
        let pin = ram.shared().pin(Gpa(0x1000), 0x1000).unwrap();
        let busy = ram.convert_request(0x1000, 1, Visibility::Private);
        assert!(matches!(busy, Err(ConvertError::Busy)));
        assert!(calls.0.lock().unwrap().is_empty());
        drop(pin);
        ram.convert_request(0x1000, 1, Visibility::Private).unwrap();
    }

    #[test]
    fn a_touch_converts_what_is_on_the_wrong_side_only_in_part() {
        let (ram, calls) = guest_ram(1 << 20);
        let pages = PageRange::new(Gpa(0x1000), 0x3000).unwrap();
        ram.convert_request(0x2000, 1, Visibility::Private).unwrap();
        for to in [Visibility::Private, Visibility::Shared, Visibility::Private] {
            for times in [2, 0] {
                calls.0.lock().unwrap().clear();
                ram.convert_touched(pages, to).unwrap();
                assert_eq!(calls.0.lock().unwrap().len(), times, "{to:?}");
            }
        }
        assert_eq!(ram.gauges().shared_bytes, (1 << 20) - 0x3000);
    }

    /// Or it would be repeated again and again while the other vCPU waits for I/O, and count as one that never ends.
    #[test]
    fn a_touch_waits_for_a_conversion_that_has_begun() {
        let (ram, calls) = guest_ram(1 << 20);
        let page = PageRange::new(Gpa(0x1000), 0x1000).unwrap();
        let pin = ram.shared().pin(Gpa(0x1000), 0x1000).unwrap();
        std::thread::scope(|threads| {
            threads.spawn(|| ram.convert(page, Visibility::Private).unwrap());
            while ram.shared().all_shared(Gpa(0x1000), 1) {
                std::thread::yield_now();
            }
            threads.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                drop(pin);
            });
            ram.convert_touched(page, Visibility::Private).unwrap();
            assert_eq!(*calls.0.lock().unwrap(), ["attribute Private", "discard Shared"]);
        });
    }

    /// A refused conversion must not hand a page that was private before to the devices.
    #[test]
    fn a_busy_conversion_leaves_private_pages_private() {
        let (ram, _) = guest_ram(1 << 20);
        ram.convert_request(0x2000, 1, Visibility::Private).unwrap();
        let _pin = ram.shared().pin(Gpa(0x1000), 0x1000).unwrap();
        let busy = ram.convert_request(0x1000, 3, Visibility::Private);
        assert!(matches!(busy, Err(ConvertError::Busy)));
        let sides = [0x1000, 0x2000, 0x3000].map(|page| ram.shared().all_shared(Gpa(page), 0x1000));
        assert_eq!(sides, [true, false, true]);
    }
}
