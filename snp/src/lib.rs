//! Everything that only AMD SEV-SNP needs. Pure but for `ioctl`, and in sight of `arch` alone:
//! `vmm` decides, this crate knows what the firmware and KVM demand and what the guest's owner can check.
#![deny(unsafe_code)]

mod bytes;
pub mod certs;
pub mod commands;
pub mod cpuid_page;
pub mod error;
pub mod exit;
pub mod explain;
pub mod host;
pub mod id_block;
pub mod ioctl;
pub mod launch;
pub mod measure;
pub mod model;
pub mod ovmf;
pub mod p384;
pub mod platform;
pub mod policy;
pub mod report;
pub mod vmsa;
