//! Virtio 1.2 devices, independent of the transport that carries them.
pub mod block;
pub mod console;
pub mod device;
pub mod input;
#[cfg(test)]
mod lies;
#[cfg(test)]
pub mod mock;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod serve;
#[cfg(test)]
mod served;
pub mod transport;
pub mod vsock;
