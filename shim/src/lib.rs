//! The measured boot shim of machine v2: its contract with the VMM and everything it decides.
//!
//! The shim's own binary (`shim/boot`, frozen as `shim/v2.bin`) is a thin layer of instructions around
//! this library; the VMM and the digest calculator use the same library for addresses and pages. Nothing
//! here touches hardware: every function works on byte slices and numbers.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod boot;
pub mod bytes;
pub mod bzimage;
pub mod config;
pub mod descriptor;
pub mod efi;
pub mod events;
pub mod layout;
pub mod plan;
pub mod reason;
pub mod sha256;
pub mod sha384;
pub mod snp;
pub mod tables;
pub mod tdx;
pub mod unaccepted;
pub mod zero_page;
