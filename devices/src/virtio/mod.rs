//! Virtio 1.2 devices, independent of the transport that carries them.
pub mod block;
pub mod device;
#[cfg(test)]
pub mod mock;
pub mod net;
pub mod queue;
pub mod transport;
