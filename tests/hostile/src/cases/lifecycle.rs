//! C20 to C27: status, queues, registers and interrupts in the wrong order and of the wrong size.

use super::Case;
use crate::machine::{load, mmio_read, mmio_write, store};
use crate::stage::{ALL, BUFFER, BUFFER_LEN, DISK, RING, Stage, Verdict, pause};
use crate::virtio::{DRIVER_OK, FEATURES_OK, NEXT, PATIENCE, Reaction, Ring, SIZE, WRITE, common};

pub(super) const CASES: &[Case] = &[
    Case {
        id: "C20",
        name: "started without agreeing on features",
        on: ALL,
        play: |s| {
            s.device.reset();
            s.ring.clear();
            s.device.set_queue(s.target.queue, SIZE, s.ring);
            s.device.set_status(3 | DRIVER_OK);
            s.offer_good(0, BUFFER);
            s.kick();
            quiet_is_refusal(s, s.device.wait_for(s.ring, 1, PATIENCE / 4))
        },
    },
    Case {
        id: "C20b",
        name: "every feature bit, offered or not",
        on: ALL,
        play: |s| {
            s.device.reset();
            s.device.set_status(3);
            s.device.accept(u64::MAX);
            s.device.set_status(3 | FEATURES_OK);
            if s.device.status() & FEATURES_OK == 0 {
                Verdict::Reject
            } else {
                Verdict::Pass
            }
        },
    },
    Case {
        id: "C20c",
        name: "status bits taken back one by one",
        on: ALL,
        play: |s| {
            s.device.start(0, s.target.queue, s.ring);
            for bit in 0..8 {
                s.device.set_status(s.device.status() & !(1 << bit));
                s.kick();
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C20d",
        name: "kick before the device is ready",
        on: ALL,
        play: |s| {
            s.device.reset();
            for queue in [0, 1, 2, 3, 255, 0xffff] {
                s.device.kick(queue);
                mmio_write(s.device.notify, queue);
            }
            s.device.negotiate(0);
            s.kick();
            Verdict::Pass
        },
    },
    Case {
        id: "C21",
        name: "queue changed after it was started",
        on: ALL,
        play: |s| {
            s.device.start(0, s.target.queue, s.ring);
            s.device.select(s.target.queue);
            mmio_write(s.device.common + common::QUEUE_SIZE, 0x8000_u16);
            mmio_write(s.device.common + common::QUEUE_SIZE, 0_u16);
            s.device.set_addresses(Ring::at(!0xfff));
            mmio_write(s.device.common + common::QUEUE_ENABLE, 0_u16);
            s.offer_good(0, BUFFER);
            s.kick();
            s.judge(s.device.wait(s.ring, 1))
        },
    },
    Case {
        id: "C22",
        name: "reset under requests in flight",
        on: &[DISK],
        play: reset_in_flight,
    },
    Case {
        id: "C23",
        name: "kicks against resets",
        on: ALL,
        play: |s| {
            for _ in 0..300 {
                s.device.start(0, s.target.queue, s.ring);
                s.offer_good(0, BUFFER);
                s.kick();
                if !s.device.reset() {
                    return Verdict::Wedged;
                }
                s.kick();
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C24",
        name: "started five hundred times",
        on: ALL,
        play: |s| {
            for _ in 0..500 {
                if !s.device.negotiate(0) {
                    return Verdict::Wedged;
                }
                s.device.set_queue(s.target.queue, SIZE, RING);
                s.device.go();
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C25",
        name: "registers by every size and alignment",
        on: ALL,
        play: |s| {
            s.device.reset();
            let parts = [
                s.device.common,
                s.device.isr,
                s.device.notify,
                s.device.specific,
                s.device.function.0,
            ];
            for part in parts.into_iter().filter(|part| *part != 0) {
                for at in (0..common::LEN + 16).chain(0xff0..0x1000) {
                    sizes(part + at);
                }
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C26",
        name: "queue 65535 selected",
        on: ALL,
        play: |s| {
            s.device.negotiate(0);
            s.device.set_queue(0xffff, SIZE, RING);
            s.device.go();
            s.kick();
            s.device.select(0xffff);
            let size: u16 = mmio_read(s.device.common + common::QUEUE_SIZE);
            if size == 0 { Verdict::Pass } else { Verdict::Fail }
        },
    },
    Case {
        id: "C27",
        name: "interrupt table abused",
        on: ALL,
        play: interrupts,
    },
];

/// A device that was started the wrong way may do nothing.
fn quiet_is_refusal(s: &Stage, reaction: Reaction) -> Verdict {
    match reaction {
        Reaction::Silence => Verdict::Reject,
        other => s.judge(other),
    }
}

/// One register by all sizes, read and written back.
fn sizes(at: u64) {
    let value: u8 = mmio_read(at);
    mmio_write(at, value);
    let value: u16 = mmio_read(at);
    mmio_write(at, value);
    let value: u32 = mmio_read(at);
    mmio_write(at, value);
    let value: u64 = mmio_read(at);
    mmio_write(at, value);
}

/// Large reads, each cut off by a reset; afterwards nothing may still arrive.
fn reset_in_flight(s: &Stage) -> Verdict {
    const PART: u32 = 0x8_0000;
    for _ in 0..40 {
        s.device.start(0, s.target.queue, s.ring);
        store(BUFFER, 0_u64);
        store(BUFFER + 8, 0_u64);
        s.ring.descriptor(0, BUFFER, 16, NEXT, 1);
        s.ring.descriptor(1, BUFFER + 0x1000, PART, NEXT | WRITE, 2);
        s.ring.descriptor(2, BUFFER + 0x800, 1, WRITE, 0);
        s.ring.offer(&[0]);
        s.kick();
        if !s.device.reset() {
            return Verdict::Wedged;
        }
        let places = (0x1000..u64::from(PART)).step_by(0x1000);
        for at in places.clone() {
            store(BUFFER + at, at);
        }
        pause(PATIENCE / 100);
        if !places.clone().all(|at| load::<u64>(BUFFER + at) == at) {
            return Verdict::Fail;
        }
    }
    Verdict::Pass
}

const _: () = assert!(BUFFER_LEN > 0x9_0000);

/// The MSI-X table with addresses that are no interrupt's, vectors that do not exist, odd sizes; then interrupts.
fn interrupts(s: &Stage) -> Verdict {
    const CAPABILITY: u8 = 0x11;
    let function = s.device.function;
    let Some(at) = function.capabilities(CAPABILITY).next() else {
        return Verdict::Absent;
    };
    let place: u32 = mmio_read(function.0 + at + 4);
    let table = function.bar(u64::from(place & 7)) + u64::from(place & !7);
    for entry in (0..64_u64).map(|entry| table + entry * 16) {
        for part in 0..16 {
            sizes(entry + part);
        }
    }
    for (address, data) in [
        (0_u64, 0_u32),
        (0xfee0_0000, 0xffff_ffff),
        (0x1234_5678_9000, 0x31),
        (BUFFER, 0x41),
    ] {
        s.device.negotiate(0);
        s.ring.clear();
        mmio_write(table, address as u32);
        mmio_write(table + 4, (address >> 32) as u32);
        mmio_write(table + 8, data);
        mmio_write(table + 12, 0_u32);
        mmio_write(function.0 + at + 2, 0x8000_u16);
        s.device.set_queue(s.target.queue, SIZE, s.ring);
        for vector in [64_u16, 0xfffe, 0] {
            s.device.select(s.target.queue);
            mmio_write(s.device.common + common::QUEUE_VECTOR, vector);
        }
        s.device.go();
        s.offer_good(0, BUFFER);
        s.kick();
        let reaction = s.device.wait(s.ring, 1);
        mmio_write(function.0 + at + 2, 0_u16);
        if reaction == Reaction::Silence {
            return Verdict::Wedged;
        }
    }
    Verdict::Pass
}
