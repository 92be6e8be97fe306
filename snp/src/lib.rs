//! Everything that only AMD SEV-SNP needs. Pure but for `ioctl`, and in sight of `arch` alone:
//! `vmm` decides, this crate knows what the firmware and KVM demand and what the guest's owner can check.
#![deny(unsafe_code)]

mod bytes;
pub mod measure;
pub mod ovmf;
pub mod vmsa;
