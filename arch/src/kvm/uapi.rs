//! Numbers of the KVM interface that `kvm-bindings` 0.14 (made from Linux 6.15) lacks, and a typed ioctl.
//! Source: Linux 7.2, include/uapi/linux/kvm.h.
// UNSAFETY: raw ioctl on file descriptors.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `KVM_HC_MAP_GPA_RANGE` (include/uapi/linux/kvm_para.h).
pub(super) const HC_MAP_GPA_RANGE: u64 = 12;
/// Bit of `KVM_HC_MAP_GPA_RANGE`'s attributes that asks for the private side.
pub(super) const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
pub(super) const CAP_APIC_BUS_CYCLES_NS: u32 = 237;
pub(super) const CAP_GUEST_MEMFD_FLAGS: u32 = 244;
pub(super) const EXIT_UNKNOWN: u32 = 0;
pub(super) const EXIT_TDX: u32 = 40;
pub(super) const EXIT_SNP_REQ_CERTS: u32 = 43;

/// `struct kvm_pre_fault_memory`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct PreFaultMemory {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) padding: [u64; 5],
}
const _: () = assert!(size_of::<PreFaultMemory>() == 64);
const PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

/// One `KVM_PRE_FAULT_MEMORY` call; the kernel advances the range in `request`.
pub(super) fn pre_fault(vcpu: BorrowedFd<'_>, request: &mut PreFaultMemory) -> io::Result<()> {
    // SAFETY: `request` is a live, initialised 64-byte struct as the request number encodes; the kernel reads
    // and writes it during the call only, and the exclusive borrow keeps others away meanwhile. Populating
    // the guest's page tables changes no host mapping.
    let rc = unsafe { libc::ioctl(vcpu.as_raw_fd(), PRE_FAULT_MEMORY, &raw mut *request) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `KVM_GET_DEVICE_ATTR` on `/dev/kvm` for an attribute whose value is a u64.
pub(super) fn system_attribute(kvm: BorrowedFd<'_>, group: u32, attr: u64) -> io::Result<u64> {
    const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;
    let mut value = 0_u64;
    let request = kvm_bindings::kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: (&raw mut value) as u64,
    };
    // SAFETY: `request` is a live 24-byte struct that the kernel only reads; its `addr` points at `value`, a
    // live u64 that nothing else refers to and that the kernel writes during the call only.
    let rc = unsafe { libc::ioctl(kvm.as_raw_fd(), GET_DEVICE_ATTR, &raw const request) };
    if rc == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}
