//! The part of a VM that all types share: capabilities, guest_memfd, memory slots, attributes (Linux 7.2,
//! virt/kvm/kvm_main.c, guest_memfd.c and arch/x86/kvm/x86.c, by function).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

const PAGE: u64 = 4096;
const SEV_ES: u64 = 3;
const SNP: u64 = 4;
const TDX: u64 = 5;
const SW_PROTECTED: u64 = 1;
/// `KVM_MEM_LOG_DIRTY_PAGES`.
const LOG_DIRTY: u32 = 1;
/// `KVM_MEM_READONLY`.
const READONLY: u32 = 2;
/// `KVM_MEM_GUEST_MEMFD`.
pub const GUEST_MEMFD: u32 = 4;
/// `GUEST_MEMFD_FLAG_MMAP`.
const MMAP: u64 = 1;
/// `GUEST_MEMFD_FLAG_INIT_SHARED`.
const INIT_SHARED: u64 = 2;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
const PRIVATE: u64 = 8;
/// Slots that user space may use.
const USER_SLOTS: u32 = 32764;
/// End of what a process may map.
const USER_END: u64 = 0x7fff_ffff_f000;
/// Host's MAXPHYADDR as an exclusive end of guest-physical addresses.
const PHYSICAL_END: u64 = 1 << 52;

/// `struct kvm_userspace_memory_region2`, and whether it came by the older ioctl.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct Region {
    pub slot: u32,
    pub flags: u32,
    pub gpa: u64,
    pub size: u64,
    pub hva: u64,
    pub gmem_offset: u64,
    pub gmem_fd: u32,
    pub version1: bool,
}

impl Region {
    fn gpas(&self) -> Range<u64> {
        self.gpa..self.gpa.saturating_add(self.size)
    }

    fn gmem_range(&self) -> Option<(u32, Range<u64>)> {
        let range = self.gmem_offset..self.gmem_offset.saturating_add(self.size);
        (self.flags & GUEST_MEMFD != 0).then_some((self.gmem_fd, range))
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// One VM.
#[derive(Debug)]
pub struct Vm {
    /// Argument of `KVM_CREATE_VM`.
    pub vm_type: u64,
    slots: BTreeMap<u32, Region>,
    /// Sizes of this VM's guest_memfd files.
    gmems: BTreeMap<u32, u64>,
    /// Private frames.
    private: BTreeSet<u64>,
}

impl Vm {
    /// A VM of this type, which the kernel offers.
    pub fn new(vm_type: u64) -> Self {
        Self {
            vm_type,
            slots: BTreeMap::new(),
            gmems: BTreeMap::new(),
            private: BTreeSet::new(),
        }
    }

    fn has_private_memory(&self) -> bool {
        matches!(self.vm_type, SW_PROTECTED | SNP | TDX)
    }

    fn has_readonly(&self) -> bool {
        !matches!(self.vm_type, SEV_ES | SNP | TDX)
    }

    fn address_spaces(&self) -> u32 {
        if self.has_private_memory() { 1 } else { 2 }
    }

    /// `KVM_CHECK_EXTENSION` on the VM where its type decides (km:kvm_vm_ioctl_check_extension_generic,
    /// x86.c:kvm_vm_ioctl_check_extension).
    pub fn extension(&self, number: u32) -> Option<u64> {
        let protected = matches!(self.vm_type, SEV_ES | SNP | TDX);
        Some(match number {
            // SYNC_REGS
            74 => u64::from(!protected) * 7,
            // READONLY_MEM
            81 => self.has_readonly().into(),
            // MULTI_ADDRESS_SPACE
            118 => self.address_spaces().into(),
            // MEMORY_ATTRIBUTES
            233 => u64::from(self.has_private_memory()) * PRIVATE,
            // GUEST_MEMFD
            234 => 1,
            // GUEST_MEMFD_FLAGS
            244 => self.gmem_flags(),
            _ => return None,
        })
    }

    /// gmem:kvm_gmem_get_supported_flags.
    fn gmem_flags(&self) -> u64 {
        if self.has_private_memory() {
            MMAP
        } else {
            MMAP | INIT_SHARED
        }
    }

    /// `KVM_CREATE_GUEST_MEMFD` (gmem:kvm_gmem_create).
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn check_gmem(&self, size: u64, flags: u64) -> Result<(), i32> {
        let size_ok = size != 0 && size <= i64::MAX as u64 && size.is_multiple_of(PAGE);
        if flags & !self.gmem_flags() == 0 && size_ok {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    /// The file exists under this number.
    pub fn add_gmem(&mut self, fd: u32, size: u64) {
        self.gmems.insert(fd, size);
    }

    /// `KVM_SET_USER_MEMORY_REGION2` (km:check_memory_region_flags, kvm_set_memory_region, gmem:kvm_gmem_bind).
    /// `open` says whether the descriptor is open at all.
    ///
    /// # Errors
    /// Errno.
    pub fn set_region(&mut self, region: Region, open: impl Fn(u32) -> bool) -> Result<(), i32> {
        self.check_flags(&region)?;
        let (space, id) = (region.slot >> 16, region.slot & 0xffff);
        let aligned = [region.gpa, region.size, region.hva]
            .iter()
            .all(|n| n.is_multiple_of(PAGE));
        let gmem = region.flags & GUEST_MEMFD != 0;
        let offset_ok = !gmem || region.gmem_offset.is_multiple_of(PAGE);
        let end = region.gpa.checked_add(region.size);
        let user = region
            .hva
            .checked_add(region.size)
            .is_some_and(|end| end <= USER_END);
        let sound = aligned && offset_ok && user && id < USER_SLOTS && space < self.address_spaces();
        if !sound || end.is_none() || region.size / PAGE > i32::MAX as u64 {
            return Err(libc::EINVAL);
        }
        if region.size == 0 {
            return self.slots.remove(&region.slot).map(|_| ()).ok_or(libc::EINVAL);
        }
        if end.is_some_and(|end| end > PHYSICAL_END) {
            return Err(libc::EINVAL);
        }
        if let Some(old) = self.slots.get(&region.slot) {
            let touched = (old.flags | region.flags) & GUEST_MEMFD != 0;
            if touched || old.size != region.size || old.hva != region.hva {
                return Err(libc::EINVAL);
            }
        }
        let others = || self.slots.iter().filter(|(slot, _)| **slot != region.slot);
        if others().any(|(slot, other)| slot >> 16 == space && overlap(&other.gpas(), &region.gpas())) {
            return Err(libc::EEXIST);
        }
        if let Some((fd, range)) = region.gmem_range() {
            match self.gmems.get(&fd) {
                _ if !open(fd) => return Err(libc::EBADF),
                Some(size) if range.end <= *size => {}
                _ => return Err(libc::EINVAL),
            }
            let bound = |other: &Region| {
                other
                    .gmem_range()
                    .is_some_and(|(of, at)| of == fd && overlap(&at, &range))
            };
            if others().any(|(_, other)| bound(other)) {
                return Err(libc::EEXIST);
            }
        }
        self.slots.insert(region.slot, region);
        Ok(())
    }

    fn check_flags(&self, region: &Region) -> Result<(), i32> {
        let gmem = region.flags & GUEST_MEMFD != 0;
        let mut valid = LOG_DIRTY;
        if gmem && !region.version1 {
            valid = GUEST_MEMFD;
        } else if self.has_readonly() {
            valid |= READONLY;
        }
        if region.flags & !valid == 0 {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES` (km:kvm_vm_ioctl_set_mem_attributes); the frames and whether they become private.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn set_attributes(
        &mut self,
        at: u64,
        size: u64,
        attributes: u64,
        flags: u64,
    ) -> Result<(Range<u64>, bool), i32> {
        let supported = if self.has_private_memory() { PRIVATE } else { 0 };
        let end = at.checked_add(size);
        let sound = flags == 0 && attributes & !supported == 0 && size != 0;
        match end {
            Some(end) if sound && at.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) => {
                let frames = at / PAGE..end / PAGE;
                if attributes == 0 {
                    self.private.retain(|gfn| !frames.contains(gfn));
                } else {
                    self.private.extend(frames.clone());
                }
                Ok((frames, attributes != 0))
            }
            _ => Err(libc::EINVAL),
        }
    }

    /// Number of private frames.
    pub fn private_frames(&self) -> usize {
        self.private.len()
    }

    /// End of the slot that holds `gpa`.
    pub(crate) fn slot_end(&self, gpa: u64) -> Option<u64> {
        let region = self.slots.values().find(|region| region.gpas().contains(&gpa))?;
        Some(region.gpas().end)
    }

    /// Where the program has mapped what it shares with the guest at `gpa`.
    pub fn hva(&self, gpa: u64) -> Option<u64> {
        let region = self.slots.values().find(|region| region.gpas().contains(&gpa))?;
        Some(region.hva + (gpa - region.gpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EINVAL: Result<(), i32> = Err(libc::EINVAL);

    #[test]
    fn case_2_capabilities_by_type_kvm_vm_ioctl_check_extension() {
        // SYNC_REGS, READONLY_MEM, MULTI_ADDRESS_SPACE, MEMORY_ATTRIBUTES, GUEST_MEMFD_FLAGS
        for (vm_type, expected) in [
            (0, [7, 1, 2, 0, 3]),
            (1, [7, 1, 1, 8, 1]),
            (2, [7, 1, 2, 0, 3]),
            (3, [0, 0, 2, 0, 3]),
            (4, [0, 0, 1, 8, 1]),
            (5, [0, 0, 1, 8, 1]),
        ] {
            let vm = Vm::new(vm_type);
            assert_eq!(
                [74, 81, 118, 233, 244].map(|n| vm.extension(n).unwrap()),
                expected,
                "{vm_type}"
            );
        }
    }

    #[test]
    fn case_3_files_kvm_gmem_create() {
        for (vm_type, size, flags, expected) in [
            (4, 4096, 0, Ok(())),
            (4, 0, 0, EINVAL),
            (4, u64::MAX, 0, EINVAL),
            (4, 4095, 0, EINVAL),
            (4, 4096, 4, EINVAL),
            (4, 4096, INIT_SHARED, EINVAL),
            (5, 4096, INIT_SHARED, EINVAL),
            (1, 4096, INIT_SHARED, EINVAL),
            (4, 4096, MMAP, Ok(())),
            (0, 4096, MMAP | INIT_SHARED, Ok(())),
        ] {
            assert_eq!(
                Vm::new(vm_type).check_gmem(size, flags),
                expected,
                "{vm_type} {size} {flags}"
            );
        }
    }

    fn region(slot: u32, gpa: u64, pages: u64) -> Region {
        Region {
            slot,
            gpa,
            size: pages * PAGE,
            hva: 0x7000_0000_0000,
            flags: GUEST_MEMFD,
            gmem_fd: 9,
            gmem_offset: gpa,
            version1: false,
        }
    }

    #[test]
    fn case_5_slots_kvm_set_memory_region_kvm_gmem_bind() {
        let fresh = |vm_type| {
            let mut vm = Vm::new(vm_type);
            vm.add_gmem(9, 64 * PAGE);
            vm.set_region(region(1, 0x1000, 4), |_| true).unwrap();
            vm
        };
        type Change = fn(&mut Region);
        let cases: [(&str, u64, Change, Result<(), i32>); 19] = [
            ("beside it", 4, |_| {}, Ok(())),
            ("dirty log", 4, |r| r.flags |= LOG_DIRTY, EINVAL),
            ("read-only on SNP", 4, |r| r.flags = READONLY, EINVAL),
            ("read-only on an ordinary VM", 0, |r| r.flags = READONLY, Ok(())),
            ("read-only with gmem", 0, |r| r.flags |= READONLY, EINVAL),
            ("second address space on SNP", 4, |r| r.slot |= 1 << 16, EINVAL),
            (
                "second address space",
                0,
                |r| (r.slot, r.flags) = (1 << 16, 0),
                Ok(()),
            ),
            ("version 1 with gmem", 4, |r| r.version1 = true, EINVAL),
            ("another VM's file", 4, |r| r.gmem_fd = 8, EINVAL),
            ("closed file", 4, |r| r.gmem_fd = 7, Err(libc::EBADF)),
            ("beyond the file", 4, |r| r.gmem_offset = 62 * PAGE, EINVAL),
            ("same addresses", 4, |r| r.gpa = 0x4000, Err(libc::EEXIST)),
            (
                "same part of the file",
                4,
                |r| r.gmem_offset = 0x2000,
                Err(libc::EEXIST),
            ),
            ("the same slot again", 4, |r| *r = region(1, 0x1000, 4), EINVAL),
            ("move", 4, |r| r.slot = 1, EINVAL),
            (
                "delete what is not there",
                4,
                |r| (r.slot, r.size) = (7, 0),
                EINVAL,
            ),
            ("delete", 4, |r| (r.slot, r.size) = (1, 0), Ok(())),
            ("unaligned", 4, |r| r.hva += 1, EINVAL),
            ("wrap", 4, |r| r.gpa = 0u64.wrapping_sub(PAGE), EINVAL),
        ];
        for (name, vm_type, change, expected) in cases {
            let mut vm = fresh(vm_type);
            let mut raw = region(2, 0x10000, 4);
            change(&mut raw);
            assert_eq!(vm.set_region(raw, |fd| fd != 7), expected, "{name}");
        }
        let mut vm = fresh(4);
        vm.set_region(
            Region {
                size: 0,
                ..region(1, 0x1000, 4)
            },
            |_| true,
        )
        .unwrap();
        assert_eq!(
            vm.set_region(region(1, 0x1000, 4), |_| true),
            Ok(()),
            "delete and create again"
        );
    }

    #[test]
    fn case_6_attributes_kvm_vm_ioctl_set_mem_attributes() {
        for (name, vm_type, at, size, attributes, flags, expected) in [
            ("private before any slot", 4, 0, 64 * PAGE, PRIVATE, 0, Ok(())),
            ("on a VM without private memory", 0, 0, PAGE, PRIVATE, 0, EINVAL),
            ("on SEV", 2, 0, PAGE, PRIVATE, 0, EINVAL),
            ("shared on a VM without private memory", 0, 0, PAGE, 0, 0, Ok(())),
            ("flags", 4, 0, PAGE, PRIVATE, 1, EINVAL),
            ("another attribute", 4, 0, PAGE, 1, 0, EINVAL),
            ("nothing", 4, 0, 0, PRIVATE, 0, EINVAL),
            ("unaligned", 4, 1, PAGE, PRIVATE, 0, EINVAL),
            ("wrap", 4, 0u64.wrapping_sub(PAGE), 2 * PAGE, PRIVATE, 0, EINVAL),
        ] {
            let mut vm = Vm::new(vm_type);
            for round in 0..2 {
                let answer = vm.set_attributes(at, size, attributes, flags).map(|_| ());
                assert_eq!(answer, expected, "{name}, {round}");
            }
        }
        let mut vm = Vm::new(5);
        vm.set_attributes(0, 8 * PAGE, PRIVATE, 0).unwrap();
        vm.set_attributes(2 * PAGE, PAGE, 0, 0).unwrap();
        assert_eq!(vm.private_frames(), 7);
    }
}
