//! Devices, each with its other end, requests as its drivers make them, and a proof that it still works.

mod block;
mod button;
mod console;
mod entropy;
mod net;
mod vsock;

use std::os::fd::RawFd;

use devices::virtio::device::VirtioDevice;

use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

pub use block::{disk_in_memory, disk_on_ring};
pub use button::button;
pub use console::console;
pub use entropy::entropy;
pub use net::passt;
pub use vsock::vsock;

/// A queue, and a chain for it.
pub type Chain = (u16, Vec<Buffer>);

/// A device and what surrounds it.
pub struct Host {
    /// The device, until a machine takes it.
    pub device: Option<Box<dyn VirtioDevice>>,
    /// Its other end.
    pub outside: Box<dyn Outside>,
    /// Makes a request as drivers make them, more or less.
    pub typical: fn(&mut Input<'_>) -> Chain,
    /// Panics unless the device serves a driver that has just set it up.
    pub probe: fn(&mut Run),
}

/// The other end of a device.
pub trait Outside {
    /// Does something.
    fn act(&mut self, input: &mut Input<'_>) {
        let _ = input;
    }
    /// A descriptor that is readable when [`service`](Self::service) is wanted.
    fn descriptor(&self) -> Option<RawFd> {
        None
    }
    /// The event thread's part outside the device.
    fn service(&mut self) {}
}

/// Nothing at all.
struct Void;

impl Outside for Void {}

/// The name of a socket that no other process uses.
fn socket(name: &str) -> std::path::PathBuf {
    let dir = std::env::var_os("CVMM_FUZZ_DIR").map_or_else(std::env::temp_dir, Into::into);
    dir.join(format!("{name}-{}", std::process::id()))
}
