//! Where a case is played: one device with one queue, and how its outcome is judged.

use crate::machine::{ARENA, Mode, PRIVATE, load, load_private, mode, store, store_private, ticks};
use crate::virtio::{BLOCK, CONSOLE, Device, NET, NEXT, PATIENCE, RNG, Reaction, Ring, VSOCK, WRITE};

/// The ring under attack.
pub(crate) const RING: Ring = Ring::at(ARENA + 0x1_0000);
/// The ring of requests that must work.
const CONTROL: Ring = Ring::at(ARENA + 0x2_0000);
/// Header, data and status of requests that must work.
const CONTROL_BUFFER: u64 = ARENA + 0x3_0000;
/// What attacks use as buffers: 1 MiB.
pub(crate) const BUFFER: u64 = ARENA + 0x4_0000;
/// Length of [`BUFFER`].
pub(crate) const BUFFER_LEN: u64 = 0x10_0000;
/// Shared memory that no request names.
const CANARY: u64 = ARENA + 0x18_0000;
const CANARY_LEN: u64 = 0x1000;
const PATTERN: u64 = 0x5ca1_ab1e_0ddb_a115;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Served or ignored; the device goes on.
    Pass,
    /// The device says that it needs a reset, or refuses in another way that the guest can see.
    Reject,
    /// The device neither serves nor complains, or does not come back after a reset.
    Wedged,
    /// Memory changed that was not to be touched, or something wrong was reported as done.
    Fail,
    /// The machine has nothing that the case needs.
    Absent,
}

/// A device and one of its queues, of those that the driver fills.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) kind: u16,
    pub(crate) nth: usize,
    pub(crate) queue: u16,
    pub(crate) name: &'static str,
}

const fn target(kind: u16, queue: u16, name: &'static str) -> Target {
    Target {
        kind,
        nth: 0,
        queue,
        name,
    }
}

/// The disk.
pub(crate) const DISK: Target = target(BLOCK, 0, "blk");
/// A second disk, which is read-only.
pub(crate) const READ_ONLY: Target = Target {
    kind: BLOCK,
    nth: 1,
    queue: 0,
    name: "blk-ro",
};
/// The entropy source.
pub(crate) const ENTROPY: Target = target(RNG, 0, "rng");
/// The network card's transmit queue.
pub(crate) const TRANSMIT: Target = target(NET, 1, "net");
/// The socket device's transmit queue.
pub(crate) const SOCKET: Target = target(VSOCK, 1, "vsock");
/// The console's transmit queue.
pub(crate) const TERMINAL: Target = target(CONSOLE, 1, "console");
/// All of them.
pub(crate) const ALL: &[Target] = &[DISK, ENTROPY, TRANSMIT, SOCKET, TERMINAL];

/// A case being played.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage {
    pub(crate) device: Device,
    pub(crate) target: Target,
    pub(crate) ring: Ring,
}

impl Stage {
    /// Finds the target's device.
    pub(crate) fn set(target: Target) -> Option<Self> {
        Some(Self {
            device: Device::find(target.kind, target.nth)?,
            target,
            ring: RING,
        })
    }

    /// A device with a ring that the case writes, and one kick.
    pub(crate) fn attack(&self, features: u64, write: fn(&Self)) -> Verdict {
        self.device.start(features, self.target.queue, self.ring);
        write(self);
        self.kick();
        match self.device.wait(self.ring, self.ring.available()) {
            Reaction::Silence => self.goes_on(),
            other => self.judge(other),
        }
    }

    /// What silence means: nothing bad if the same queue serves the next request.
    pub(crate) fn goes_on(&self) -> Verdict {
        let served = self.ring.used_index().wrapping_add(1);
        self.offer_good(8, BUFFER + 0x4000);
        self.kick();
        self.judge(self.device.wait(self.ring, served))
    }

    /// Kicks the queue under attack.
    pub(crate) fn kick(&self) {
        self.device.kick(self.target.queue);
    }

    /// What a reaction means, when nothing may be served for certain.
    pub(crate) fn judge(&self, reaction: Reaction) -> Verdict {
        match reaction {
            Reaction::Used(_) => Verdict::Pass,
            Reaction::NeedsReset => Verdict::Reject,
            Reaction::Silence => Verdict::Wedged,
        }
    }

    /// Direction of the queue's first descriptor: what the device reads or what it fills.
    pub(crate) fn direction(&self) -> u16 {
        if self.target.kind == RNG { WRITE } else { 0 }
    }

    /// Offers one right request in the ring at `slot` descriptors from the start; the heads it needs are `slot`.
    pub(crate) fn offer_good(&self, slot: u16, buffer: u64) {
        good(self.target.kind, self.ring, slot, buffer);
    }
}

/// Writes a right request and offers it.
fn good(kind: u16, ring: Ring, slot: u16, buffer: u64) {
    for at in (0..128).step_by(8) {
        store(buffer + at, 0_u64);
    }
    match kind {
        BLOCK => {
            store(buffer + 0x200 + 512, 0xff_u8);
            ring.descriptor(slot, buffer, 16, NEXT, slot + 1);
            ring.descriptor(slot + 1, buffer + 0x200, 512, NEXT | WRITE, slot + 2);
            ring.descriptor(slot + 2, buffer + 0x200 + 512, 1, WRITE, 0);
        }
        RNG => ring.descriptor(slot, buffer, 64, WRITE, 0),
        NET => ring.descriptor(slot, buffer, 12 + 60, 0, 0),
        VSOCK => {
            // A reset of a connection that does not exist: taken and ignored.
            store(buffer + 8, 2_u64);
            store(buffer + 28, 1_u16);
            store(buffer + 30, 3_u16);
            ring.descriptor(slot, buffer, 44, 0, 0);
        }
        _ => {
            store(buffer, b'\n');
            ring.descriptor(slot, buffer, 1, 0, 0);
        }
    }
    ring.offer(&[slot]);
}

/// True if the target, after a reset, does what it is for.
pub(crate) fn serves(target: Target) -> bool {
    let Some(device) = Device::find(target.kind, target.nth) else {
        return true;
    };
    if !device.start(0, target.queue, CONTROL) {
        return false;
    }
    good(target.kind, CONTROL, 0, CONTROL_BUFFER);
    device.kick(target.queue);
    let reaction = device.wait_for(CONTROL, 1, 3 * PATIENCE);
    let fine = match target.kind {
        BLOCK => load::<u8>(CONTROL_BUFFER + 0x200 + 512) == 0,
        RNG => matches!(reaction, Reaction::Used(1..=64)),
        _ => true,
    };
    device.reset() && matches!(reaction, Reaction::Used(_)) && fine
}

/// A device that a case does not attack.
pub(crate) fn bystander(target: Target) -> Target {
    if target.kind == RNG { DISK } else { ENTROPY }
}

/// Pages of the private area that no case converts.
const GUARDED: [u64; 4] = [0x2000, 0x3000, 0xf_0000, 0x1f_f000];

/// Fills what nothing may change.
pub(crate) fn arm() {
    for at in (0..CANARY_LEN).step_by(8) {
        store(CANARY + at, PATTERN ^ at);
    }
    if mode() != Mode::Plain {
        for at in GUARDED {
            store_private(PRIVATE + at, PATTERN ^ at);
        }
    }
}

/// True if nothing of it changed.
pub(crate) fn intact() -> bool {
    let shared = (0..CANARY_LEN)
        .step_by(8)
        .all(|at| load::<u64>(CANARY + at) == PATTERN ^ at);
    shared && (mode() == Mode::Plain || private_intact())
}

fn private_intact() -> bool {
    GUARDED
        .into_iter()
        .all(|at| load_private(PRIVATE + at) == PATTERN ^ at)
}

/// Lets time pass.
pub(crate) fn pause(time: u64) {
    let began = ticks();
    while ticks() - began < time {}
}
