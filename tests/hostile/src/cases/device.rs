//! C40 to C46: requests that only one kind of device has.

use super::Case;
use crate::machine::{load, store};
use crate::stage::{BUFFER, DISK, ENTROPY, READ_ONLY, SOCKET, Stage, TERMINAL, TRANSMIT, Verdict};
use crate::virtio::{NEXT, PATIENCE, Reaction, Ring, SIZE, WRITE};

const HEADER: u64 = BUFFER;
const STATUS: u64 = BUFFER + 0x800;
const DATA: u64 = BUFFER + 0x1000;
const READ: u32 = 0;
const WRITE_OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "C40",
        name: "sector times 512 wraps",
        on: &[DISK],
        play: |s| refused(s, READ, 1 << 55, 512, WRITE),
    },
    Case {
        id: "C40b",
        name: "read beyond the end",
        on: &[DISK],
        play: |s| refused(s, READ, 1 << 40, 512, WRITE),
    },
    Case {
        id: "C40c",
        name: "read of no sectors",
        on: &[DISK],
        play: |s| request(s, READ, 0, 0, WRITE).0,
    },
    Case {
        id: "C40d",
        name: "read of half a sector",
        on: &[DISK],
        play: |s| refused(s, READ, 0, 100, WRITE),
    },
    Case {
        id: "C40e",
        name: "discard of 4096 segments",
        on: &[DISK],
        play: |s| refused(s, DISCARD, 0, 0x1_0000, 0),
    },
    Case {
        id: "C40f",
        name: "write zeroes beyond the end",
        on: &[DISK],
        play: |s| {
            store(DATA, 1_u64 << 54);
            store(DATA + 8, u32::MAX as u64);
            refused(s, ZEROES, 0, 16, 0)
        },
    },
    Case {
        id: "C40g",
        name: "discard of 15 bytes",
        on: &[DISK],
        play: |s| refused(s, DISCARD, 0, 15, 0),
    },
    Case {
        id: "C41",
        name: "unknown request type",
        on: &[DISK],
        play: |s| refused(s, 0xffff_fff0, 0, 512, WRITE),
    },
    Case {
        id: "C41b",
        name: "flush with a sector",
        on: &[DISK],
        play: |s| request(s, FLUSH, 7, 0, 0).0,
    },
    Case {
        id: "C41c",
        name: "serial number into 0 to 19 bytes",
        on: &[DISK],
        play: |s| {
            (0..20)
                .map(|len| request(s, GET_ID, 0, len, WRITE).0)
                .find(|verdict| *verdict != Verdict::Pass)
                .unwrap_or(Verdict::Pass)
        },
    },
    Case {
        id: "C41d",
        name: "write to a read-only disk",
        on: &[READ_ONLY],
        play: |s| refused(s, WRITE_OUT, 0, 512, 0),
    },
    Case {
        id: "C12c",
        name: "disk request without room for a status",
        on: &[DISK],
        play: |s| {
            s.attack(0, |s| {
                s.ring.descriptor(0, HEADER, 16, NEXT, 1);
                s.ring.descriptor(1, DATA, 512, NEXT | WRITE, 2);
                s.ring.descriptor(2, STATUS, 0, WRITE, 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C42",
        name: "frames of 0, 1, 13 and 65535 bytes",
        on: &[TRANSMIT],
        play: |s| lengths(s, &[0, 1, 12, 13, 12 + 65535, 12 + 65550]),
    },
    Case {
        id: "C42b",
        name: "offloads that were not negotiated",
        on: &[TRANSMIT],
        play: |s| {
            s.attack(0, |s| {
                s.offer_good(0, BUFFER);
                store(BUFFER, u64::MAX);
                store(BUFFER + 8, u32::MAX);
            })
        },
    },
    Case {
        id: "C42c",
        name: "receive buffers of 1 byte",
        on: &[TRANSMIT],
        play: |s| {
            s.device.negotiate(0);
            s.ring.clear();
            let receive = Ring::at(BUFFER + 0x2_0000);
            receive.clear();
            s.device.set_queue(0, SIZE, receive);
            s.device.set_queue(1, SIZE, s.ring);
            s.device.go();
            for index in 0..SIZE {
                receive.descriptor(index, BUFFER + 0x3_0000 + u64::from(index), 1, WRITE, 0);
                receive.offer(&[index]);
            }
            s.device.kick(0);
            s.offer_good(0, BUFFER);
            s.kick();
            s.judge(s.device.wait(s.ring, 1))
        },
    },
    Case {
        id: "C43",
        name: "packets from another CID",
        on: &[SOCKET],
        play: |s| packet(s, 99, 2, 0, 1, 1),
    },
    Case {
        id: "C43b",
        name: "packets to another CID",
        on: &[SOCKET],
        play: |s| packet(s, 42, 7, 0, 1, 1),
    },
    Case {
        id: "C43c",
        name: "length beyond the payload",
        on: &[SOCKET],
        play: |s| packet(s, 42, 2, u32::MAX, 1, 5),
    },
    Case {
        id: "C43d",
        name: "unknown operation and type",
        on: &[SOCKET],
        play: |s| packet(s, 42, 2, 0, 0xffff, 0xffff),
    },
    Case {
        id: "C43e",
        name: "a thousand connections",
        on: &[SOCKET],
        play: |s| flood(s, 1, 1),
    },
    Case {
        id: "C43f",
        name: "a thousand resets",
        on: &[SOCKET],
        play: |s| flood(s, 1, 3),
    },
    Case {
        id: "C43g",
        name: "header of 10 bytes",
        on: &[SOCKET],
        play: |s| lengths(s, &[0, 1, 10, 43]),
    },
    Case {
        id: "C44",
        name: "entropy into 1 MiB",
        on: &[ENTROPY],
        play: |s| {
            s.device.start(0, 0, s.ring);
            s.ring.descriptor(0, BUFFER, 0x10_0000, WRITE, 0);
            s.ring.offer(&[0]);
            s.kick();
            match s.device.wait(s.ring, 1) {
                Reaction::Used(1..=0x10_0000) => Verdict::Pass,
                Reaction::Used(_) => Verdict::Fail,
                other => s.judge(other),
            }
        },
    },
    Case {
        id: "C45",
        name: "console output of 1 MiB",
        on: &[TERMINAL],
        play: |s| {
            s.device.start(0, 1, s.ring);
            for at in (0..0x1000).step_by(8) {
                store(BUFFER + at, 0_u64);
            }
            for index in 0..SIZE {
                s.ring.descriptor(
                    index,
                    BUFFER,
                    0x1000,
                    if index + 1 < SIZE { NEXT } else { 0 },
                    index + 1,
                );
            }
            s.ring.offer(&[0]);
            s.kick();
            s.judge(s.device.wait_for(s.ring, 1, 4 * PATIENCE))
        },
    },
];

/// One disk request with `len` bytes of data in direction `way`; the verdict, and the status byte it left.
fn request(s: &Stage, kind: u32, sector: u64, len: u32, way: u16) -> (Verdict, u8) {
    s.device
        .start(u64::MAX & !(1 << 34 | 1 << 28 | 1 << 29), 0, s.ring);
    store(HEADER, kind);
    store(HEADER + 4, 0_u32);
    store(HEADER + 8, sector);
    store(STATUS, 0xff_u8);
    s.ring
        .descriptor(0, HEADER, 16, NEXT, if len == 0 { 2 } else { 1 });
    s.ring.descriptor(1, DATA, len, NEXT | way, 2);
    s.ring.descriptor(2, STATUS, 1, WRITE, 0);
    s.ring.offer(&[0]);
    s.kick();
    let reaction = s.device.wait(s.ring, 1);
    (s.judge(reaction), load(STATUS))
}

/// A request that must not be reported as done.
fn refused(s: &Stage, kind: u32, sector: u64, len: u32, way: u16) -> Verdict {
    match request(s, kind, sector, len, way) {
        (Verdict::Pass, 0) => Verdict::Fail,
        (Verdict::Pass, 0xff) => Verdict::Fail,
        (Verdict::Pass, _) => Verdict::Reject,
        (verdict, _) => verdict,
    }
}

/// One readable buffer of each length.
fn lengths(s: &Stage, lens: &[u32]) -> Verdict {
    let mut verdict = Verdict::Pass;
    for len in lens {
        s.device.start(0, s.target.queue, s.ring);
        s.ring.descriptor(0, BUFFER, *len, 0, 0);
        s.ring.offer(&[0]);
        s.kick();
        match s.judge(s.device.wait(s.ring, 1)) {
            Verdict::Pass => {}
            other => verdict = other,
        }
    }
    verdict
}

fn header(from: u64, to: u64, port: u32, len: u32, kind: u16, operation: u16) {
    store(BUFFER, from);
    store(BUFFER + 8, to);
    store(BUFFER + 16, port);
    store(BUFFER + 20, 9999_u32);
    store(BUFFER + 24, len);
    store(BUFFER + 28, kind);
    store(BUFFER + 30, operation);
    store(BUFFER + 32, 0_u32);
    store(BUFFER + 36, 0_u32);
    store(BUFFER + 40, u32::MAX);
}

fn packet(s: &Stage, from: u64, to: u64, len: u32, kind: u16, operation: u16) -> Verdict {
    s.device.start(0, 1, s.ring);
    header(from, to, 1234, len, kind, operation);
    s.ring.descriptor(0, BUFFER, 44, 0, 0);
    s.ring.offer(&[0]);
    s.kick();
    s.judge(s.device.wait(s.ring, 1))
}

/// A thousand packets, without anywhere to put the answers.
fn flood(s: &Stage, kind: u16, operation: u16) -> Verdict {
    s.device.start(0, 1, s.ring);
    let own: u64 = crate::machine::mmio_read(s.device.specific);
    for round in 0..1000_u16 {
        header(own, 2, 2000 + u32::from(round), 0, kind, operation);
        s.ring.descriptor(0, BUFFER, 44, 0, 0);
        s.ring.offer(&[0]);
        s.kick();
        match s.device.wait(s.ring, round + 1) {
            Reaction::Used(_) => {}
            // A device that has no room for answers may stop reading until there is.
            Reaction::Silence => return Verdict::Pass,
            Reaction::NeedsReset => return Verdict::Reject,
        }
    }
    Verdict::Pass
}
