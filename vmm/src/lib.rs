//! Configuration to machine to threads; the only crate that knows all others.
#![forbid(unsafe_code)]
pub mod cpuid;
pub mod event_loop;
pub mod machine;
pub mod plan;
pub mod platform;
pub mod ram;
pub mod staging;
pub mod vcpu;
