//! The machine contract: guest addresses, the host's view of guest memory, KVM wrappers, x86 state and the
//! seam to the confidential platforms. The bottom of the workspace; all `unsafe` that is not a
//! platform's own ioctl lives in here.
#![cfg_attr(
    test,
    expect(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::type_complexity,
        clippy::wildcard_enum_match_arm,
        reason = "a test stops at the first surprise; what ships is checked without tests"
    )
)]
pub mod addr;
pub mod blockio;
pub mod exit;
pub mod firmware;
pub mod host;
pub mod iov;
pub mod kvm;
pub mod measurement;
pub mod mem;
pub mod platform;
pub mod poll;
pub mod tap;
pub mod vsock;
pub mod x86;
