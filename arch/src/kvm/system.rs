//! `/dev/kvm` itself: capabilities and CPUID.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;

use super::uapi;
use crate::x86::cpuid::{CpuidEntry, CpuidTable};

/// The open `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    pub(super) kvm: Kvm,
}

/// What this KVM offers, as numbers from `KVM_CHECK_EXTENSION` (0 = absent).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `KVM_GET_API_VERSION`; 12 since Linux 2.6.22.
    pub api_version: i32,
    /// Bit n set: `KVM_CREATE_VM` takes type n.
    pub vm_types: u32,
    /// `KVM_CREATE_GUEST_MEMFD` exists (asked of the system; VMs of private types may differ).
    pub guest_memfd: bool,
    /// Flags that `KVM_CREATE_GUEST_MEMFD` takes.
    pub guest_memfd_flags: u32,
    /// Bits of `KVM_SET_MEMORY_ATTRIBUTES`; 8 is PRIVATE.
    pub memory_attributes: u32,
    /// `KVM_EXIT_MEMORY_FAULT` is filled in.
    pub memory_fault_info: bool,
    /// Bit n set: hypercall n can be sent to user space; 12 is MAP_GPA_RANGE.
    pub exit_hypercall: u32,
    /// Local APICs in the kernel, the rest in user space.
    pub split_irqchip: bool,
    /// Most vCPUs a VM can have.
    pub max_vcpus: u32,
}

const fn cap(number: u32) -> libc::c_ulong {
    number as libc::c_ulong
}

impl Host {
    /// Opens `path`, normally `/dev/kvm`.
    ///
    /// # Errors
    /// The path contains a NUL, does not exist or may not be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        let kvm = Kvm::new_with_path(path.as_c_str())?;
        Ok(Self { kvm })
    }

    /// Asks for everything that cvmm cares about.
    pub fn capabilities(&self) -> Capabilities {
        let ask = |number| u32::try_from(self.kvm.check_extension_raw(cap(number))).unwrap_or(0);
        Capabilities {
            api_version: self.kvm.get_api_version(),
            vm_types: ask(kvm_bindings::KVM_CAP_VM_TYPES),
            guest_memfd: ask(kvm_bindings::KVM_CAP_GUEST_MEMFD) != 0,
            guest_memfd_flags: ask(uapi::CAP_GUEST_MEMFD_FLAGS),
            memory_attributes: ask(kvm_bindings::KVM_CAP_MEMORY_ATTRIBUTES),
            memory_fault_info: ask(kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO) != 0,
            exit_hypercall: ask(kvm_bindings::KVM_CAP_EXIT_HYPERCALL),
            split_irqchip: ask(kvm_bindings::KVM_CAP_SPLIT_IRQCHIP) != 0,
            max_vcpus: ask(kvm_bindings::KVM_CAP_MAX_VCPUS),
        }
    }

    /// A `KVM_X86_GRP_SEV` attribute: 0 VMSA features, 1 policy bits, 2 certificate requests.
    ///
    /// # Errors
    /// `ENXIO` where the kernel does not know the attribute.
    pub fn sev_attribute(&self, attribute: u64) -> io::Result<u64> {
        const GROUP_SEV: u32 = 1;
        uapi::system_attribute(self.as_fd(), GROUP_SEV, attribute)
    }

    /// CPUID as this KVM can give it to a guest (`KVM_GET_SUPPORTED_CPUID`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn supported_cpuid(&self) -> io::Result<CpuidTable> {
        let raw = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(CpuidTable(
            raw.as_slice()
                .iter()
                .map(|e| CpuidEntry {
                    leaf: e.function,
                    subleaf: (e.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0)
                        .then_some(e.index),
                    eax: e.eax,
                    ebx: e.ebx,
                    ecx: e.ecx,
                    edx: e.edx,
                })
                .collect(),
        ))
    }

    /// The descriptor itself, for ioctls that this module does not wrap.
    #[expect(unsafe_code, reason = "kvm-ioctls lends only the raw number")]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.kvm` owns the descriptor and keeps it open for as long as the borrow of `self` lasts.
        unsafe { BorrowedFd::borrow_raw(self.kvm.as_raw_fd()) }
    }
}
