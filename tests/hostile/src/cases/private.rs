//! C50 to C53: the border between private and shared memory.

use super::Case;
use crate::machine::{
    Mode, PRIVATE, load_private, map_gpa, mode, page_state, store, store_private, to_private, to_shared,
};
use crate::ram_end;
use crate::stage::{ALL, BUFFER, DISK, ENTROPY, RING, Stage, Verdict, pause};
use crate::virtio::{F_INDIRECT, INDIRECT, NEXT, PATIENCE, Reaction, Ring, SIZE, WRITE, descriptor};

/// A page that is private in every mode that has such.
const HIDDEN: u64 = PRIVATE + 0x1000;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "C50",
        name: "descriptor table in private memory",
        on: ALL,
        play: |s| hidden_ring(s, Ring { desc: HIDDEN, ..RING }),
    },
    Case {
        id: "C50b",
        name: "available ring in private memory",
        on: ALL,
        play: |s| {
            hidden_ring(
                s,
                Ring {
                    avail: HIDDEN,
                    ..RING
                },
            )
        },
    },
    Case {
        id: "C50c",
        name: "used ring in private memory",
        on: ALL,
        play: |s| hidden_ring(s, Ring { used: HIDDEN, ..RING }),
    },
    Case {
        id: "C50d",
        name: "buffer in private memory",
        on: ALL,
        play: |s| {
            hidden(s, |s| {
                s.ring.descriptor(0, HIDDEN, 64, s.direction(), 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C50e",
        name: "buffer half in private memory",
        on: ALL,
        play: |s| {
            if mode() == Mode::Plain {
                return Verdict::Absent;
            }
            let before = HIDDEN - 0x1000;
            if !to_shared(before) {
                return Verdict::Fail;
            }
            let verdict = hidden(s, |s| {
                s.ring.descriptor(0, HIDDEN - 32, 64, s.direction(), 0);
                s.ring.offer(&[0]);
            });
            if to_private(before) {
                verdict
            } else {
                Verdict::Fail
            }
        },
    },
    Case {
        id: "C50f",
        name: "indirect table in private memory",
        on: ALL,
        play: |s| {
            hidden(s, |s| {
                s.ring.descriptor(0, HIDDEN, 16, INDIRECT, 0);
                s.ring.offer(&[0]);
            })
        },
    },
    Case {
        id: "C50g",
        name: "disk data into private memory",
        on: &[DISK],
        play: |s| {
            hidden(s, |s| {
                s.offer_good(0, BUFFER);
                descriptor(s.ring.desc, 1, HIDDEN, 512, NEXT | WRITE, 2);
            })
        },
    },
    Case {
        id: "C50h",
        name: "disk status into private memory",
        on: &[DISK],
        play: |s| {
            hidden(s, |s| {
                s.offer_good(0, BUFFER);
                descriptor(s.ring.desc, 2, HIDDEN, 1, WRITE, 0);
            })
        },
    },
    Case {
        id: "C51",
        name: "made private under a request in flight",
        on: &[DISK],
        play: convert_in_flight,
    },
    Case {
        id: "C52",
        name: "two thousand conversions",
        on: &[ENTROPY],
        play: |_| {
            if mode() == Mode::Plain {
                return Verdict::Absent;
            }
            for round in 0..1000_u64 {
                let page = PRIVATE + 0x10_0000 + (round % 7) * 0x2000;
                if !to_shared(page) || !to_private(page) {
                    return Verdict::Wedged;
                }
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C53",
        name: "conversions of what is no memory",
        on: &[ENTROPY],
        play: |_| nonsense(),
    },
];

/// A ring of which one part is private: the device must refuse it and write nothing there.
fn hidden_ring(s: &Stage, ring: Ring) -> Verdict {
    if !hide() {
        return Verdict::Absent;
    }
    s.device.negotiate(0);
    RING.clear();
    let before = load_private(HIDDEN);
    s.device.set_queue(s.target.queue, SIZE, ring);
    s.device.go();
    s.offer_good(0, BUFFER);
    s.kick();
    let reaction = s.device.wait_for(RING, 1, PATIENCE / 2);
    refused(s, reaction, before)
}

/// A request that leads into a private page.
fn hidden(s: &Stage, write: fn(&Stage)) -> Verdict {
    if !hide() {
        return Verdict::Absent;
    }
    let before = load_private(HIDDEN);
    s.device.start(F_INDIRECT, s.target.queue, s.ring);
    write(s);
    s.kick();
    let reaction = s.device.wait_for(s.ring, 1, PATIENCE / 2);
    refused(s, reaction, before)
}

fn refused(s: &Stage, reaction: Reaction, before: u64) -> Verdict {
    if load_private(HIDDEN) != before {
        return Verdict::Fail;
    }
    match reaction {
        // A length above zero says that the device wrote there.
        Reaction::Used(len) if len > 1 => Verdict::Fail,
        other => s.judge(other),
    }
}

/// Makes sure that the page is private; false where there is no such thing.
fn hide() -> bool {
    match mode() {
        Mode::Plain => false,
        Mode::Snp => true,
        Mode::Soft => {
            let content = load_private(HIDDEN);
            let done = to_private(HIDDEN);
            // On this platform the page stays visible to the guest, empty.
            store_private(HIDDEN, content);
            done
        }
    }
}

/// Reads from disk into pages that turn private meanwhile. Either the conversion waits, or the request fails; what
/// the guest then keeps in the page stays.
fn convert_in_flight(s: &Stage) -> Verdict {
    if mode() == Mode::Plain {
        return Verdict::Absent;
    }
    let page = BUFFER + 0x8_0000;
    for _ in 0..30 {
        s.device.start(0, 0, s.ring);
        store(BUFFER, 0_u64);
        store(BUFFER + 8, 0_u64);
        s.ring.descriptor(0, BUFFER, 16, NEXT, 1);
        s.ring.descriptor(1, page, 0x8000, NEXT | WRITE, 2);
        s.ring.descriptor(2, BUFFER + 0x800, 1, WRITE, 0);
        s.ring.offer(&[0]);
        s.kick();
        let began = crate::machine::ticks();
        while !to_private(page + 0x4000) {
            if crate::machine::ticks() - began > 4 * PATIENCE {
                return Verdict::Wedged;
            }
        }
        store_private(page + 0x4000, 0xdead_beef);
        pause(PATIENCE / 200);
        let kept = load_private(page + 0x4000) == 0xdead_beef;
        s.device.reset();
        if !to_shared(page + 0x4000) {
            return Verdict::Wedged;
        }
        if !kept {
            return Verdict::Fail;
        }
    }
    Verdict::Pass
}

/// Conversions of nothing, of everything, of devices, and with arguments that do not exist.
fn nonsense() -> Verdict {
    match mode() {
        Mode::Plain => Verdict::Absent,
        Mode::Soft => {
            let wrong = [
                (PRIVATE, 0, 16),
                (PRIVATE, u64::MAX, 16),
                (PRIVATE + 1, 1, 16),
                (!0xfff, 2, 16),
                (ram_end() - 0x1000, 2, 16),
                (0xe000_0000, 1, 16),
                (1 << 51, 1, 16),
                (PRIVATE, 1 << 52, 0),
            ];
            let accepted = wrong
                .iter()
                .any(|(gpa, pages, attributes)| map_gpa(*gpa, *pages, *attributes) == 0);
            if accepted { Verdict::Fail } else { Verdict::Reject }
        }
        Mode::Snp => {
            let wrong = [0xe000_0000, 0xfee0_0000, 1 << 46, ram_end() + 0x1000];
            let accepted = wrong.iter().any(|gpa| page_state(*gpa, 1));
            if accepted { Verdict::Fail } else { Verdict::Reject }
        }
    }
}
