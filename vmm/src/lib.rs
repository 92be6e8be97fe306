//! Configuration to machine to threads; the only crate that knows all others.
#![forbid(unsafe_code)]
mod checks;
pub mod cli;
pub mod config;
pub mod cpuid;
pub mod doctor;
pub mod ending;
pub mod event_loop;
pub mod events;
mod evidence;
mod hex;
pub mod id_block;
pub mod machine;
pub mod measure;
pub mod plan;
pub mod platform;
pub mod quote;
pub mod ram;
pub mod report;
pub mod sandbox;
pub mod signals;
pub mod sink;
pub mod spec;
pub mod staging;
pub mod vcpu;
