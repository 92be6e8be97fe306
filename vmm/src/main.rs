//! cvmm.
fn main() {}
