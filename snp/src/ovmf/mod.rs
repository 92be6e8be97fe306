//! Launch plans for OVMF images as QEMU, EC2 and GCE launch them, so that `cvmm measure --payload ovmf` predicts
//! their digests: pages in the order of QEMU's `sev_snp_launch_finish`, vCPUs at the reset vector.

mod hashes;
mod parse;

use arch::addr::{BadRange, PageRange};
use arch::platform::{LaunchPage, LaunchPlan, PageKind};
use arch::x86::regs::{BootState, Control, General, Segment, Segments, Table};

pub use hashes::KernelHashes;
pub use parse::{Firmware, OvmfError, Section, SectionKind};

use crate::vmsa::CpuSignature;

/// Where every x86 CPU starts, 16 bytes below 4 GiB.
const RESET_VECTOR: u32 = 0xffff_fff0;

/// Whose launch to predict; they differ in page types, page order and initial registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// QEMU 9.1 and later on KVM.
    Qemu,
    /// Amazon EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

/// What to launch beside the firmware.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Whose launch.
    pub flavour: Flavour,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Type of the vCPUs; EC2 and GCE do not show it to the guest and ignore it.
    pub signature: CpuSignature,
    /// Kernel, initrd and command line, if the firmware is to boot them directly.
    pub kernel: Option<&'a KernelHashes>,
}

/// An image and a guest that do not go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A kernel needs a place for its hashes.
    #[error(
        "this firmware cannot measure a kernel: it has no SNP_KERNEL_HASHES section; \
         take an image that has one (Debian's OVMF.amdsev.fd), or leave out --kernel"
    )]
    NoKernelHashes,
    /// More than one vCPU needs the address at which the others start.
    #[error(
        "this firmware names no start address for further vCPUs; take an SEV-ES capable image or one vCPU"
    )]
    NoApStart,
    /// A section at an address that is no page.
    #[error(transparent)]
    Range(#[from] BadRange),
}

impl Firmware {
    /// The launch of this image.
    ///
    /// # Errors
    /// A kernel or a second vCPU that the image has no place for.
    pub fn plan(self, guest: &Guest<'_>) -> Result<LaunchPlan, PlanError> {
        let hashed = self
            .sections()
            .iter()
            .any(|s| s.kind == SectionKind::KernelHashes);
        if guest.kernel.is_some() && !(hashed && self.hash_table().is_some()) {
            return Err(PlanError::NoKernelHashes);
        }
        let image = PageRange::new(self.base(), self.bytes().len() as u64)?;
        let mut pages = vec![page("firmware", image, PageKind::Measured, Vec::new())];
        let late = |s: &&Section| guest.flavour == Flavour::Ec2 && s.kind == SectionKind::Cpuid;
        let used = || self.sections().iter().filter(|s| s.bytes != 0);
        for section in used().filter(|s| !late(s)).chain(used().filter(late)) {
            pages.push(self.section_page(section, guest)?);
        }
        let ap_start = match self.ap_start() {
            Some(start) => start,
            None if guest.vcpus > 1 => return Err(PlanError::NoApStart),
            None => RESET_VECTOR,
        };
        let starts = (0..guest.vcpus).map(|index| if index == 0 { RESET_VECTOR } else { ap_start });
        let vcpus = starts
            .map(|start| boot_state(start, guest.flavour, guest.signature))
            .collect();
        if let Some(firmware) = pages.first_mut() {
            firmware.bytes = self.into_bytes();
        }
        Ok(LaunchPlan { pages, vcpus })
    }

    fn section_page(&self, section: &Section, guest: &Guest<'_>) -> Result<LaunchPage, BadRange> {
        let range = PageRange::new(section.gpa, section.bytes)?;
        let zero = |name| page(name, range, PageKind::Zero, Vec::new());
        Ok(match section.kind {
            SectionKind::Memory if guest.flavour == Flavour::Gce => {
                page("firmware memory", range, PageKind::Unmeasured, Vec::new())
            }
            SectionKind::Memory => zero("firmware memory"),
            SectionKind::Secrets => page("secrets", range, PageKind::Secrets, Vec::new()),
            SectionKind::Cpuid => page("CPUID", range, PageKind::Cpuid, Vec::new()),
            SectionKind::SvsmCallingArea => zero("SVSM calling area"),
            SectionKind::KernelHashes => match (guest.kernel, self.hash_table()) {
                (Some(hashes), Some(table)) => page(
                    "kernel hashes",
                    range,
                    PageKind::Measured,
                    hashes.page(table).to_vec(),
                ),
                _ => zero("kernel hashes"),
            },
        })
    }
}

fn page(name: &'static str, range: PageRange, kind: PageKind, bytes: Vec<u8>) -> LaunchPage {
    LaunchPage {
        name,
        range,
        kind,
        bytes,
    }
}

/// The registers that hypervisor `flavour` gives a vCPU starting at `start` in real mode, before KVM's own
/// changes (which [`crate::vmsa::Vmsa::new`] knows). Power-up values of AMD64 APM volume 2, "Processor
/// Initialization State", except where a hypervisor is known to differ.
pub fn boot_state(start: u32, flavour: Flavour, signature: CpuSignature) -> BootState {
    let qemu = flavour == Flavour::Qemu;
    let (code, stack, task) = match flavour {
        Flavour::Qemu | Flavour::Gce => (0x9b, 0x93, 0x8b),
        Flavour::Ec2 if start == RESET_VECTOR => (0x9a, 0x92, 0x83),
        Flavour::Ec2 => (0x9b, 0x92, 0x83),
    };
    let segment = |attributes| Segment {
        selector: 0,
        attributes,
        limit: 0xffff,
        base: 0,
    };
    let table = Table {
        limit: 0xffff,
        base: 0,
    };
    let data = segment(0x93);
    let cs = Segment {
        selector: 0xf000,
        base: u64::from(start & 0xffff_0000),
        ..segment(code)
    };
    BootState {
        general: General {
            rip: u64::from(start & 0xffff),
            rflags: 2,
            rdx: if qemu { signature.0.into() } else { 0x600 },
            ..General::default()
        },
        segments: Segments {
            cs,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: segment(stack),
            tr: segment(task),
            ldtr: segment(0x82),
            gdtr: table,
            idtr: table,
        },
        control: Control {
            cr0: 0x6000_0010,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            pat: if flavour == Flavour::Gce {
                0x0007_0106
            } else {
                0x0007_0406_0007_0406
            },
            mxcsr: if qemu { 0x1f80 } else { 0 },
            fcw: if qemu { 0x37f } else { 0 },
        },
    }
}
