//! KVM, one file per kind of file descriptor: the system (`/dev/kvm`), a VM, a vCPU, guest_memfd.
pub mod gmem;
pub mod system;
mod uapi;
pub mod vcpu;
pub mod vm;
