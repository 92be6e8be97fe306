//! Host memory behind guest RAM, and files that the guest reads in place.
// UNSAFETY: madvise and mincore on our own mappings.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap,
    MmapRegion,
};

use crate::addr::{Gpa, PAGE_SIZE, PageRange};

/// Host memory of the shared side of guest RAM. Anonymous and not reserved: a page costs nothing before it is
/// touched and nothing after it is discarded.
#[derive(Clone, Debug)]
pub struct HostRam {
    regions: Vec<Arc<GuestRegionMmap>>,
    map: Arc<GuestMemoryMmap>,
}

impl HostRam {
    /// Maps memory for each of `ranges`, which are ascending and disjoint.
    ///
    /// # Errors
    /// The host has no address space or memory for it.
    pub fn allocate(ranges: &[PageRange]) -> io::Result<Self> {
        let regions: Vec<_> = ranges
            .iter()
            .map(|r| allocate_region(*r))
            .collect::<io::Result<_>>()?;
        let map = GuestRegionCollection::from_arc_regions(regions.clone()).map_err(io::Error::other)?;
        Ok(Self {
            regions,
            map: Arc::new(map),
        })
    }

    /// One region for each range.
    pub fn regions(&self) -> &[Arc<GuestRegionMmap>] {
        &self.regions
    }

    /// All regions as one address space.
    pub fn map(&self) -> &Arc<GuestMemoryMmap> {
        &self.map
    }

    /// Backs each page by itself, so that one page costs one page: no huge page around it, and none that the host makes
    /// later out of pages that are in use and those that were discarded.
    ///
    /// # Errors
    /// The kernel's; one without transparent huge pages has none to avoid.
    pub fn keep_pages_small(&self) -> io::Result<()> {
        for region in &self.regions {
            // SAFETY: the mapping of `region`, which `self` keeps alive, from its start to its end; only how the kernel
            // backs it changes, not what it holds.
            let rc = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_NOHUGEPAGE) };
            if rc != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Gives the pages of `range` back to the host; they read as zeros afterwards.
    ///
    /// # Errors
    /// The kernel's.
    pub fn discard(&self, range: PageRange) -> io::Result<()> {
        self.each_part(range, |address, bytes| {
            // SAFETY: `[address, address + bytes)` lies in a mapping that `self.regions` keeps alive. The
            // content of guest memory may change at any time anyway, and all access to it is volatile.
            let rc = unsafe { libc::madvise(address.cast(), bytes, libc::MADV_DONTNEED) };
            if rc == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        })
    }

    /// Bytes of `range` that host memory backs now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resident_bytes(&self, range: PageRange) -> io::Result<u64> {
        let mut pages = 0_u64;
        self.each_part(range, |address, bytes| {
            let mut present = vec![0_u8; bytes.div_ceil(4096)];
            // SAFETY: as in `discard` for the range; `present` has a byte for each page of it, which the
            // kernel writes during the call only.
            let rc = unsafe { libc::mincore(address.cast(), bytes, present.as_mut_ptr()) };
            if rc != 0 {
                return Err(io::Error::last_os_error());
            }
            let count = present.iter().filter(|p| **p & 1 != 0).count() as u64;
            pages = pages.saturating_add(count);
            Ok(())
        })?;
        Ok(pages.saturating_mul(PAGE_SIZE))
    }

    /// Calls `f` with host address and length of each part of `range` that a region backs.
    fn each_part(
        &self,
        range: PageRange,
        mut f: impl FnMut(*mut u8, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        for region in &self.regions {
            let base = region.start_addr().0;
            let from = range.start().0.max(base);
            let to = range.end().0.min(base.saturating_add(region.len()));
            if let Some(bytes) = to.checked_sub(from)
                && bytes != 0
            {
                let offset = usize::try_from(from.saturating_sub(base)).map_err(io::Error::other)?;
                let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
                f(region.as_ptr().wrapping_add(offset), bytes)?;
            }
        }
        Ok(())
    }
}

fn allocate_region(range: PageRange) -> io::Result<Arc<GuestRegionMmap>> {
    let bytes = usize::try_from(range.bytes()).map_err(io::Error::other)?;
    let region = MmapRegion::new(bytes).map_err(io::Error::other)?;
    place(region, range.start())
}

/// Maps a copy-on-write view of `file` for the guest to read at `at`; the host's page cache is the memory, so
/// it costs nothing per VM, and guest writes never reach the file. The view ends at a page boundary; bytes
/// past the end of the file are zero.
///
/// # Errors
/// The file is empty or cannot be mapped.
pub fn map_file(file: File, at: Gpa) -> io::Result<Arc<GuestRegionMmap>> {
    let bytes = file.metadata()?.len().next_multiple_of(PAGE_SIZE);
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    let region = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, 0));
    let region = region.build().map_err(io::Error::other)?;
    place(region, at)
}

/// Anonymous memory for the guest to read at `range`, filled with `bytes`.
///
/// # Errors
/// The host has no memory for it, or `bytes` is longer than `range`.
pub fn map_bytes(range: PageRange, bytes: &[u8]) -> io::Result<Arc<GuestRegionMmap>> {
    use vm_memory::{Bytes, MemoryRegionAddress};
    let region = allocate_region(range)?;
    region
        .write_slice(bytes, MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    Ok(region)
}

fn place(region: MmapRegion, at: Gpa) -> io::Result<Arc<GuestRegionMmap>> {
    GuestRegionMmap::new(region, GuestAddress(at.0))
        .map(Arc::new)
        .ok_or_else(|| io::Error::other("guest range wraps"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, MemoryRegionAddress};

    #[test]
    fn discarded_pages_read_as_zeros_and_cost_nothing() {
        let range = PageRange::new(Gpa(0x10_0000), 0x40_0000).unwrap();
        let ram = HostRam::allocate(&[range]).unwrap();
        let page = PageRange::new(Gpa(0x20_0000), 0x1000).unwrap();
        ram.map().write_obj(7_u8, GuestAddress(0x20_0000)).unwrap();
        assert!(ram.resident_bytes(range).unwrap() >= 0x1000);
        ram.discard(range).unwrap();
        assert_eq!(ram.resident_bytes(range).unwrap(), 0);
        assert_eq!(ram.map().read_obj::<u8>(GuestAddress(0x20_0000)).unwrap(), 0);
        ram.discard(page).unwrap();
    }

    /// The flags of the mapping at `address`, from proc_pid_smaps(5).
    fn flags_at(address: *const u8) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", address as usize);
        let mapping = smaps.split_once(&format!("\n{start}")).unwrap().1;
        mapping
            .split_once("VmFlags:")
            .unwrap()
            .1
            .lines()
            .next()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn a_page_among_discarded_ones_costs_no_huge_page() {
        let range = PageRange::new(Gpa(0), 0x80_0000).unwrap();
        let ram = HostRam::allocate(&[range]).unwrap();
        ram.keep_pages_small().unwrap();
        // Else the kernel of this machine has no huge pages.
        if std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            assert!(flags_at(ram.regions()[0].as_ptr()).contains(" nh"));
        }
        ram.map().write_obj(7_u8, GuestAddress(0x40_0000)).unwrap();
        assert_eq!(ram.resident_bytes(range).unwrap(), 0x1000);
    }

    #[test]
    fn a_file_view_is_padded_with_zeros_and_private() {
        let path = std::env::temp_dir().join(format!("cvmm-map-{}", std::process::id()));
        File::create(&path).unwrap().write_all(&[9; 5000]).unwrap();
        let region = map_file(File::open(&path).unwrap(), Gpa(0x1000)).unwrap();
        assert_eq!(region.len(), 0x2000);
        let byte = |at| region.read_obj::<u8>(MemoryRegionAddress(at)).unwrap();
        assert_eq!((byte(4999), byte(5000)), (9, 0));
        region.write_obj(1_u8, MemoryRegionAddress(0)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[0], 9);
        std::fs::remove_file(path).unwrap();
    }
}
