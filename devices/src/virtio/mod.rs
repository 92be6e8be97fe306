//! Virtio 1.2 devices, independent of the transport that carries them.
pub mod device;
pub mod queue;
