//! Devices.
#![forbid(unsafe_code)]
