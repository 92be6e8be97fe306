//! Hostile chains. Names carry the case numbers of the project's list of attacks.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    reason = "a test may end in a panic, and a table may be long"
)]

mod arithmetic;
mod chains;
mod limits;
mod rings;

use std::io::{Read, Write};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use arch::mem::Visibility;

use super::*;
use crate::virtio::mock::{HIGH, HIGH_END, INDIRECT, LOW_END, MockRing, NEXT, Stop, WRITE, memory, pages};

const RING: u64 = 0x10_0000;
const SIZE: u16 = 8;
/// Where the tests put indirect tables, and a good buffer.
const TABLE: u64 = 0x30_0000;
const BUFFER: u64 = 0x40_0000;
const PRIVATE: u64 = 0x50_0000;

/// Name of the variant: what the guest did.
fn kind(error: &RingError) -> String {
    let text = format!("{error:?}");
    text.split([' ', '(']).next().unwrap().to_owned()
}

/// A chain's segments as (start, bytes, writable).
fn segments(chain: &Chain) -> Vec<(u64, u32, bool)> {
    let side =
        |list: &[Segment], write| -> Vec<_> { list.iter().map(|s| (s.start.0, s.bytes, write)).collect() };
    [side(chain.readable(), false), side(chain.writable(), true)].concat()
}

/// Descriptors: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// Pops from a queue whose table starts with `direct` and with `indirect` at [`TABLE`].
fn pop(features: u64, direct: &[Raw], indirect: &[Raw]) -> Result<Vec<(u64, u32, bool)>, String> {
    let (mem, visible) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    for (table, list) in [(RING, direct), (TABLE, indirect)] {
        for (index, raw) in (0..).zip(list) {
            ring.put(table, index, raw.0, raw.1, raw.2, raw.3);
        }
    }
    visible.set(pages(PRIVATE, 0x1000), Visibility::Private);
    let (mut queue, _) = ring.device_side(3, features);
    ring.offer(0);
    match queue.pop(&mem) {
        Ok(chain) => Ok(segments(&chain.unwrap())),
        Err(broken) => {
            assert_eq!(broken.queue, 3);
            assert!(queue.in_flight() == 0);
            Err(kind(&broken.source))
        }
    }
}
