//! Everything that only Intel TDX needs. Pure but for `ioctl`, and in sight of `arch` alone: `vmm` decides,
//! this crate knows what the TDX module and KVM demand and what the guest's owner can check.
#![deny(unsafe_code)]
#![cfg_attr(
    test,
    expect(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::wildcard_enum_match_arm,
        clippy::too_many_lines,
        reason = "a test stops at the first surprise; what ships is checked without tests"
    )
)]

mod answers;
pub mod attributes;
mod bytes;
pub mod commands;
pub mod cpuid;
pub mod error;
pub mod exit;
pub mod explain;
pub mod get_quote;
pub mod host;
pub mod ioctl;
pub mod launch;
pub mod measure;
pub mod model;
pub mod platform;
pub mod qgs;
pub mod quote;
pub mod rtmr;
mod seam;
pub mod tdvf;
