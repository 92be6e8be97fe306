//! Machine assembly.
#![forbid(unsafe_code)]
