//! Memory of the model: slots, attributes, and pages that are added before the TD is final.

use std::ops::Range;

use arch::addr::PAGE_SIZE;

use super::{Model, RawCmd, Slot, State};

/// `KVM_TDX_MEASURE_MEMORY_REGION`.
const MEASURE: u32 = 1;

/// `struct kvm_tdx_init_mem_region`, with the memory that `source_addr` points to.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct RawRegion<'a> {
    pub source_addr: u64,
    pub gpa: u64,
    pub nr_pages: u64,
    /// What is mapped at `source_addr`; pages beyond it are not.
    pub source: &'a [u8],
}

impl RawRegion<'_> {
    fn advance(&mut self) {
        self.source_addr = self.source_addr.saturating_add(PAGE_SIZE);
        self.gpa = self.gpa.saturating_add(PAGE_SIZE);
        self.nr_pages = self.nr_pages.saturating_sub(1);
        self.source = self.source.get(4096..).unwrap_or_default();
    }
}

impl Model {
    /// Adds a memory slot.
    ///
    /// # Errors
    /// `EINVAL` for a slot that contains the shared bit, once INIT_VM has said which that is
    /// (x86.c:kvm_arch_prepare_memory_region).
    pub fn slot(&mut self, frames: Range<u64>, gmem: bool) -> Result<(), i32> {
        self.alive()?;
        let shared = self.shared_bit() / PAGE_SIZE;
        if shared != 0 && frames.end > shared {
            return Err(libc::EINVAL);
        }
        self.slots.push(Slot { frames, gmem });
        Ok(())
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`, PRIVATE.
    pub fn set_private(&mut self, frames: Range<u64>) {
        self.private.extend(frames);
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES` without PRIVATE: what was private is lost.
    pub fn set_shared(&mut self, frames: Range<u64>) {
        self.private.retain(|gfn| !frames.contains(gfn));
        self.added.retain(|gfn| !frames.contains(gfn));
    }

    /// The page at `gpa` was there when the TD was made.
    pub fn is_added(&self, gpa: u64) -> bool {
        self.added.contains(&(gpa / PAGE_SIZE))
    }

    fn slot_of(&self, gfn: u64) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.frames.contains(&gfn))
    }

    /// KVM_TDX_INIT_MEM_REGION (`tdx_vcpu_init_mem_region`); advances `region`, whether it succeeds or not.
    ///
    /// # Errors
    /// Errno.
    pub fn raw_init_mem_region(
        &mut self,
        index: usize,
        cmd: RawCmd,
        region: &mut RawRegion<'_>,
    ) -> Result<(), i32> {
        let initialised = self.vcpu_begin(index, cmd)?.rcx.is_some();
        let shared = self.shared_bit();
        let bytes = region.nr_pages.checked_mul(PAGE_SIZE);
        let end = bytes.and_then(|bytes| region.gpa.checked_add(bytes));
        let sound = initialised
            && cmd.flags & !MEASURE == 0
            && region.source_addr.is_multiple_of(PAGE_SIZE)
            && region.gpa.is_multiple_of(PAGE_SIZE)
            && region.nr_pages != 0
            && region.gpa & shared == 0
            && end.is_some_and(|end| end.saturating_sub(1) & shared == 0);
        if !sound {
            return Err(libc::EINVAL);
        }
        let (mut left, errno) = self.interruptions.pop_front().unwrap_or((u64::MAX, libc::EINTR));
        while region.nr_pages != 0 {
            left = left.checked_sub(1).ok_or(errno)?;
            self.populate(region, cmd.flags & MEASURE != 0)?;
            region.advance();
        }
        Ok(())
    }

    /// One page (gmem:kvm_gmem_populate, `tdx_gmem_post_populate`, mmu.c:kvm_tdp_mmu_map_private_pfn).
    fn populate(&mut self, region: &RawRegion<'_>, measured: bool) -> Result<(), i32> {
        let gfn = region.gpa / PAGE_SIZE;
        let backed = self.slot_of(gfn).is_some_and(|slot| slot.gmem);
        if !backed || !self.private.contains(&gfn) {
            return Err(libc::EINVAL);
        }
        if region.source_addr == 0 {
            return Err(libc::EOPNOTSUPP);
        }
        let page = region.source.get(..4096).ok_or(libc::EFAULT)?;
        if !self.added.insert(gfn) {
            return Err(libc::EIO);
        }
        if self.module.fails() {
            return Err(self.bug().0);
        }
        self.module.add(region.gpa);
        if measured {
            self.module.extend(region.gpa, page);
        }
        Ok(())
    }

    /// Backs frames ahead of the guest (mmu.c:kvm_mmu_faultin_pfn).
    pub(super) fn back(&self, frames: Range<u64>) -> Result<(), i32> {
        for gfn in frames {
            let gmem = self.slot_of(gfn).map(|slot| slot.gmem);
            match (self.private.contains(&gfn), gmem) {
                (true, Some(true)) | (false, Some(_)) => {}
                (true, _) => return Err(libc::EFAULT),
                (false, None) => return Err(libc::ENOENT),
            }
        }
        Ok(())
    }

    /// The TD touches private memory that it has not accepted (`tdx_handle_ept_violation`): the answer of `KVM_RUN`.
    ///
    /// # Errors
    /// `EIO`, and the VM is dead, unless the page was there when the TD was made.
    pub fn touch(&mut self, gpa: u64) -> Result<(), i32> {
        self.alive()?;
        if self.state == State::Runnable && self.is_added(gpa) {
            return Ok(());
        }
        Err(self.bug().0)
    }
}
