//! The staging area: shared memory through which the shim finds kernel and initrd. The files are mapped
//! copy-on-write, so they cost no memory per VM, and go away as soon as the shim has its verified copies.

use std::fs::File;
use std::io;
use std::sync::Arc;

use arch::addr::{Gpa, PageRange};
use arch::kvm::vcpu::Vcpu;
use arch::kvm::vm::Vm;
use arch::mem::map;
use shim::descriptor::{Descriptor, Staged};
use shim::layout;
use vm_memory::GuestMemoryRegion;

/// First of the memory slots that the area uses; RAM has the ones below.
const FIRST_SLOT: u32 = 16;

/// The staging area of one VM, until it is released.
#[derive(Debug)]
pub struct Staging {
    vm: Arc<Vm>,
    slots: u32,
    ranges: Vec<PageRange>,
}

/// What goes into the area.
#[derive(Debug)]
pub struct Content {
    /// The kernel file.
    pub kernel: File,
    /// The initrd.
    pub initrd: Option<File>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM, as [`crate::ram::ranges`] gives it.
    pub ram: Vec<PageRange>,
}

impl Staging {
    /// Maps the files and the descriptor into the guest.
    ///
    /// # Errors
    /// A file is empty or cannot be mapped, or KVM refuses a slot.
    pub fn place(vm: Arc<Vm>, content: Content) -> io::Result<Self> {
        let kernel_len = content.kernel.metadata()?.len();
        let kernel = Staged {
            gpa: layout::STAGING_KERNEL,
            len: kernel_len,
        };
        let initrd = match &content.initrd {
            Some(file) => Staged {
                gpa: kernel
                    .gpa
                    .saturating_add(kernel_len)
                    .next_multiple_of(layout::UNIT),
                len: file.metadata()?.len(),
            },
            None => Staged::default(),
        };
        let top = |at: usize| content.ram.get(at).map_or(0, |r| r.end().0);
        let descriptor = Descriptor {
            vcpus: content.vcpus,
            low_ram_top: top(0),
            high_ram_top: top(1),
            kernel,
            initrd,
        };
        let head =
            PageRange::new(Gpa(layout::STAGING), layout::STAGING_HEAD_LEN).map_err(io::Error::other)?;
        let mut regions = vec![map::map_bytes(head, &descriptor.encode())?];
        regions.push(map::map_file(content.kernel, Gpa(kernel.gpa))?);
        if let Some(file) = content.initrd {
            regions.push(map::map_file(file, Gpa(initrd.gpa))?);
        }
        let mut staging = Self {
            vm,
            slots: 0,
            ranges: Vec::new(),
        };
        for region in regions {
            let range = PageRange::new(Gpa(region.start_addr().0), region.len()).map_err(io::Error::other)?;
            staging.ranges.push(range);
            staging
                .vm
                .map_slot(FIRST_SLOT.saturating_add(staging.slots), region, None)?;
            staging.slots = staging.slots.saturating_add(1);
        }
        Ok(staging)
    }

    /// Spares the guest an exit for each page that it reads: a call for each file instead of thousands of
    /// faults. A host that cannot do this (before Linux 6.11) serves the faults.
    pub fn fill(&self, vcpu: &Vcpu) {
        for range in &self.ranges {
            if let Err(e) = vcpu.pre_fault(*range) {
                log::debug!("mapping the payload ahead of the guest: {e}");
                return;
            }
        }
    }

    /// Takes the area away from the guest and gives its memory back.
    ///
    /// # Errors
    /// The kernel's.
    pub fn release(&mut self) -> io::Result<()> {
        while self.slots != 0 {
            self.slots = self.slots.saturating_sub(1);
            self.vm.remove_slot(FIRST_SLOT.saturating_add(self.slots))?;
        }
        Ok(())
    }
}
