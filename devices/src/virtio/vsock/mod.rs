//! virtio-vsock (virtio 1.2, "Socket Device") over Unix sockets, as Firecracker and Kata use it.
//!
//! A host process that connects to the socket at PATH and writes `CONNECT <port>\n` gets `OK <port>\n` and is
//! then connected to that port of the guest. A guest that connects to port P of the host (CID 2) reaches the
//! process that listens on the socket at `PATH_P`.

mod conn;
mod flow;
mod host;
#[cfg(test)]
mod lies;
mod mux;
mod packet;
mod run;
#[cfg(test)]
mod served;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use super::device::{Activation, Running, VirtioDevice};
use super::serve::copy_fields;
use host::Host;
pub use host::VsockError;
pub use mux::{CONNECTIONS, NARROW_WINDOW, PENDING_LINES, RESETS, TIME_LIMIT, WIDE_CONNECTIONS, WINDOW};
use run::VsockRunning;

const DEVICE_ID: u32 = 19;
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;
/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const FIRST_CID: u64 = 3;
const LAST_CID: u64 = u32::MAX as u64 - 1;

/// A vsock device before its driver is up. A clone is the same device on the same socket, for the next life of the
/// machine: only one of them may have a driver at a time.
#[derive(Clone, Debug)]
pub struct Vsock {
    cid: u64,
    host: Arc<Host>,
}

impl Vsock {
    /// Listens on the Unix socket at `path` for a guest with context ID `cid`. Dropping the last
    /// clone removes the socket.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn open(cid: u64, path: &Path) -> Result<Self, VsockError> {
        if !(FIRST_CID..=LAST_CID).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        Ok(Self {
            cid,
            host: Arc::new(Host::open(path)?),
        })
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_fields(&self.cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.poll.as_fd())
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        let running = VsockRunning::start(with, self.cid, Arc::clone(&self.host))?;
        Ok(Box::new(running))
    }
}
