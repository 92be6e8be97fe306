//! The power button.

use devices::virtio::input::{PowerButton, VirtioPowerButton};

use super::{Chain, Host, Outside};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

struct Finger(PowerButton);

impl Outside for Finger {
    fn act(&mut self, _input: &mut Input<'_>) {
        self.0.press();
    }
}

/// A power button.
pub fn button() -> Host {
    let (device, button) = VirtioPowerButton::new().unwrap();
    Host {
        device: Some(Box::new(device)),
        outside: Box::new(Finger(button)),
        typical,
        probe,
    }
}

fn typical(input: &mut Input<'_>) -> Chain {
    match input.u8() {
        status if status & 1 == 1 => (
            1,
            vec![Buffer::Readable(vec![status; usize::from(status >> 3) + 1])],
        ),
        events => (0, vec![Buffer::Writable(u32::from(events >> 4) + 1)]),
    }
}

fn probe(run: &mut Run) {
    for _ in 0..4 {
        run.guest.send(&run.machine, 0, &[Buffer::Writable(8)], false);
    }
    run.guest.kick(&run.machine, 0);
    run.machine.settle();
    run.machine.host.outside.act(&mut Input::new(&[]));
    run.machine.settle();
    // A press is four events; one from before may be the first.
    assert!(
        run.guest.recycle(&run.machine, 0) >= 4,
        "a press does not reach a good driver"
    );
}
