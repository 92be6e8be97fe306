//! The entropy device.

use devices::virtio::rng::VirtioRng;

use super::{Chain, Host, Void};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

/// An entropy device.
pub fn entropy() -> Host {
    Host {
        device: Some(Box::new(VirtioRng::new().unwrap())),
        outside: Box::new(Void),
        typical,
        probe,
    }
}

fn typical(input: &mut Input<'_>) -> Chain {
    (0, vec![Buffer::Writable(u32::from(input.u16() & 0x3fff) + 1)])
}

fn probe(run: &mut Run) {
    run.guest.send(&run.machine, 0, &[Buffer::Writable(64)], false);
    run.guest.kick(&run.machine, 0);
    run.machine.settle();
    assert_eq!(
        run.guest.recycle(&run.machine, 0),
        1,
        "no entropy for a good request"
    );
}
