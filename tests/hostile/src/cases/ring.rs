//! C01 to C17 and C30, C31: what stands in rings.

use super::Case;
use crate::machine::store;
use crate::ram_end;
use crate::stage::{ALL, BUFFER, DISK, RING, Stage, Verdict};
use crate::virtio::{
    F_EVENT_IDX, F_INDIRECT, F_VERSION_1, FEATURES_OK, INDIRECT, NEXT, PATIENCE, Reaction, Ring, SIZE,
    descriptor,
};

/// An indirect table.
const TABLE: u64 = BUFFER + 0x8000;

/// A descriptor of the queue's own direction.
fn put(s: &Stage, index: u16, address: u64, len: u32, flags: u16, next: u16) {
    s.ring
        .descriptor(index, address, len, flags | s.direction(), next);
}

fn one(s: &Stage, address: u64, len: u32) {
    put(s, 0, address, len, 0, 0);
    s.ring.offer(&[0]);
}

fn indirect(s: &Stage, len: u32, more: u16) {
    s.ring.descriptor(0, TABLE, len, INDIRECT | more, 1);
    s.ring.offer(&[0]);
}

fn table(s: &Stage, index: u16, flags: u16, next: u16) {
    descriptor(TABLE, index, BUFFER, 16, flags | s.direction(), next);
}

pub(super) const CASES: &[Case] = &[
    Case {
        id: "C01",
        name: "descriptor loop",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                put(s, 0, BUFFER, 16, NEXT, 1);
                put(s, 1, BUFFER, 16, NEXT, 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C02",
        name: "next beyond the table",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                put(s, 0, BUFFER, 16, NEXT, SIZE + 5);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C03",
        name: "indirect chain longer than the queue",
        on: ALL,
        play: |s| {
            s.attack(F_INDIRECT, |s| {
                for index in 0..40 {
                    table(s, index, if index < 39 { NEXT } else { 0 }, index + 1);
                }
                indirect(s, 40 * 16, 0);
            })
        },
    },
    Case {
        id: "C04",
        name: "head equal to the queue size",
        on: ALL,
        play: |s| s.attack(0, |s| s.ring.offer(&[SIZE])),
    },
    Case {
        id: "C04b",
        name: "head 65535",
        on: ALL,
        play: |s| s.attack(0, |s| s.ring.offer(&[0xffff])),
    },
    Case {
        id: "C05",
        name: "address and length wrap",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, u64::MAX - 8, 64)),
    },
    Case {
        id: "C06",
        name: "length 0",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, BUFFER, 0)),
    },
    Case {
        id: "C07",
        name: "lengths add up to more than 32 bits",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                for index in 0..3 {
                    put(
                        s,
                        index,
                        BUFFER,
                        u32::MAX,
                        if index < 2 { NEXT } else { 0 },
                        index + 1,
                    );
                }
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C08",
        name: "length 4 GiB - 1",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, BUFFER, u32::MAX)),
    },
    Case {
        id: "C09",
        name: "indirect table inside one",
        on: ALL,
        play: |s| {
            s.attack(F_INDIRECT, |s| {
                descriptor(TABLE, 0, TABLE + 0x100, 16, INDIRECT, 0);
                descriptor(TABLE + 0x100, 0, BUFFER, 16, s.direction(), 0);
                indirect(s, 16, 0);
            })
        },
    },
    Case {
        id: "C09b",
        name: "indirect and next together",
        on: ALL,
        play: |s| {
            s.attack(F_INDIRECT, |s| {
                table(s, 0, 0, 0);
                put(s, 1, BUFFER, 16, 0, 0);
                indirect(s, 16, NEXT);
            })
        },
    },
    Case {
        id: "C09c",
        name: "indirect table of 24 bytes",
        on: ALL,
        play: |s| {
            s.attack(F_INDIRECT, |s| {
                table(s, 0, 0, 0);
                indirect(s, 24, 0);
            })
        },
    },
    Case {
        id: "C09d",
        name: "indirect table of 0 bytes",
        on: ALL,
        play: |s| s.attack(F_INDIRECT, |s| indirect(s, 0, 0)),
    },
    Case {
        id: "C09e",
        name: "loop in an indirect table",
        on: ALL,
        play: |s| {
            s.attack(F_INDIRECT, |s| {
                table(s, 0, NEXT, 1);
                table(s, 1, NEXT, 0);
                indirect(s, 32, 0);
            })
        },
    },
    Case {
        id: "C09f",
        name: "indirect table not negotiated",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                table(s, 0, 0, 0);
                indirect(s, 16, 0);
            })
        },
    },
    Case {
        id: "C10",
        name: "the same head twice",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                s.offer_good(0, BUFFER);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C11",
        name: "available index jumps by more than the size",
        on: ALL,
        play: |s| s.attack(0, |s| store(s.ring.avail + 2, SIZE + 1)),
    },
    Case {
        id: "C11b",
        name: "available index goes backward",
        on: ALL,
        play: |s| s.attack(0, |s| store(s.ring.avail + 2, u16::MAX)),
    },
    Case {
        id: "C12",
        name: "writable before readable",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                s.ring.descriptor(0, BUFFER, 16, NEXT | 2, 1);
                s.ring.descriptor(1, BUFFER + 0x100, 16, 0, 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C12b",
        name: "all in the wrong direction",
        on: ALL,
        play: |s| {
            s.attack(0, |s| {
                s.ring.descriptor(0, BUFFER, 16, NEXT | (s.direction() ^ 2), 1);
                s.ring.descriptor(1, BUFFER + 0x100, 16, s.direction() ^ 2, 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C13",
        name: "queue of 0 entries",
        on: ALL,
        play: |s| odd_queue(s, 0, RING),
    },
    Case {
        id: "C13b",
        name: "queue of 3 entries",
        on: ALL,
        play: |s| odd_queue(s, 3, RING),
    },
    Case {
        id: "C13c",
        name: "queue of 65535 entries",
        on: ALL,
        play: |s| odd_queue(s, 65535, RING),
    },
    Case {
        id: "C13d",
        name: "queue of 32768 entries",
        on: ALL,
        play: |s| odd_queue(s, 32768, RING),
    },
    Case {
        id: "C13e",
        name: "rings not aligned",
        on: ALL,
        play: |s| {
            odd_queue(
                s,
                SIZE,
                Ring {
                    desc: RING.desc + 1,
                    avail: RING.avail + 1,
                    used: RING.used + 1,
                },
            )
        },
    },
    Case {
        id: "C13f",
        name: "rings across the end of memory",
        on: ALL,
        play: |s| odd_queue(s, SIZE, Ring::at(ram_end() - 0x40)),
    },
    Case {
        id: "C13g",
        name: "rings in the configuration space",
        on: ALL,
        play: |s| odd_queue(s, SIZE, Ring::at(s.device.function.0)),
    },
    Case {
        id: "C13h",
        name: "rings in the device's own registers",
        on: ALL,
        play: |s| odd_queue(s, SIZE, Ring::at(s.device.common)),
    },
    Case {
        id: "C13i",
        name: "rings at the end of the address space",
        on: ALL,
        play: |s| odd_queue(s, SIZE, Ring::at(!0xfff)),
    },
    Case {
        id: "C14",
        name: "buffer in the device's own registers",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, s.device.common, 64)),
    },
    Case {
        id: "C14b",
        name: "buffer in the configuration space",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, s.device.function.0, 64)),
    },
    Case {
        id: "C14c",
        name: "buffer is the ring itself",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, s.ring.desc, 64)),
    },
    Case {
        id: "C15",
        name: "buffer across the end of memory",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, ram_end() - 0x100, 0x1000)),
    },
    Case {
        id: "C15b",
        name: "buffer above all memory",
        on: ALL,
        play: |s| s.attack(0, |s| one(s, 1 << 46, 0x1000)),
    },
    Case {
        id: "C16",
        name: "event index of extreme values",
        on: ALL,
        play: event_index,
    },
    Case {
        id: "C17",
        name: "packed rings, not offered",
        on: ALL,
        play: packed,
    },
    Case {
        id: "C30",
        name: "descriptor rewritten while in flight",
        on: ALL,
        play: |s| {
            rewrite(s, |s, round| {
                let lies = [
                    (0_u64, 0xffff_ffff_ffff_f000),
                    (8, u64::from(u32::MAX)),
                    (12, 0xffff_ffff),
                    (14, 9),
                ];
                let (at, value) = lies[round % 4];
                store(s.ring.desc + at, value as u32);
                store(s.ring.desc + 16 + at, value as u32);
            })
        },
    },
    Case {
        id: "C31",
        name: "header and available entry rewritten",
        on: ALL,
        play: |s| {
            rewrite(s, |s, round| {
                store(s.ring.avail + 4 + (round as u64 % 16) * 2, 0xfff0_u16);
                for at in (0..48).step_by(8) {
                    store(BUFFER + at, u64::MAX);
                }
            })
        },
    },
    Case {
        id: "C32",
        name: "length rewritten under a disk's request",
        on: &[DISK],
        play: |s| {
            rewrite(s, |s, _| {
                store(s.ring.desc + 24, 0x7fff_ffff_u32);
            })
        },
    },
];

/// A queue as it must not be: the device refuses it at once, stops, or ignores it.
fn odd_queue(s: &Stage, size: u16, ring: Ring) -> Verdict {
    s.device.negotiate(0);
    RING.clear();
    s.device.set_queue(s.target.queue, size, ring);
    s.device.go();
    let index = RING.available().wrapping_add(1);
    s.offer_good(0, BUFFER);
    s.kick();
    match s.device.wait_for(RING, index, PATIENCE / 4) {
        Reaction::Used(_) => Verdict::Pass,
        Reaction::NeedsReset => Verdict::Reject,
        // A device that looks elsewhere finds nothing there; it has to come back after a reset, no more.
        Reaction::Silence => Verdict::Pass,
    }
}

fn event_index(s: &Stage) -> Verdict {
    for event in [0_u16, 1, 0x7fff, 0x8000, 0xffff] {
        s.device.start(F_EVENT_IDX, s.target.queue, s.ring);
        store(s.ring.avail + 4 + u64::from(SIZE) * 2, event);
        for round in 1..=3 {
            s.offer_good(0, BUFFER);
            s.kick();
            if s.device.wait(s.ring, round) == Reaction::Silence {
                return Verdict::Wedged;
            }
        }
    }
    Verdict::Pass
}

/// A device that does not offer packed rings refuses them, or goes on with split ones; one that does is left alone.
fn packed(s: &Stage) -> Verdict {
    const PACKED: u64 = 1 << 34;
    s.device.negotiate(0);
    if s.device.offered() & PACKED != 0 {
        return Verdict::Absent;
    }
    s.device.reset();
    s.device.set_status(3);
    s.device.accept(PACKED | F_VERSION_1 | s.device.offered());
    s.device.set_status(3 | FEATURES_OK);
    if s.device.status() & FEATURES_OK == 0 {
        return Verdict::Reject;
    }
    s.ring.clear();
    s.device.set_queue(s.target.queue, SIZE, s.ring);
    s.device.go();
    s.offer_good(0, BUFFER);
    s.kick();
    s.judge(s.device.wait(s.ring, 1))
}

/// Requests that change under the device's hands, two hundred times. They may be refused or served, whichever
/// copy the device took; the device must never go beyond them.
fn rewrite(s: &Stage, lie: fn(&Stage, usize)) -> Verdict {
    let mut verdict = Verdict::Pass;
    for round in 0..200 {
        s.device.start(0, s.target.queue, s.ring);
        s.offer_good(0, BUFFER);
        s.kick();
        lie(s, round);
        if s.device.wait_for(s.ring, 1, PATIENCE) == Reaction::Silence {
            verdict = Verdict::Wedged;
            break;
        }
    }
    verdict
}
