//! Machine contract.
pub mod addr;
