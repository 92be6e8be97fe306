//! Everything that only Intel TDX needs. Pure but for `ioctl`, and in sight of `arch` alone: `vmm` decides,
//! this crate knows what the TDX module and KVM demand and what the guest's owner can check.
#![deny(unsafe_code)]

mod bytes;
pub mod commands;
pub mod error;
pub mod explain;
pub mod get_quote;
pub mod ioctl;
pub mod measure;
pub mod model;
pub mod qgs;
pub mod quote;
pub mod rtmr;
pub mod tdvf;
