//! Ring indices are 16-bit numbers that wrap; every one that matters is tried.

use super::*;
use crate::virtio::mock::IrqCount;

/// A queue of `size` whose device and driver are both at index `next`.
fn at(mem: &SharedMem, size: u16, next: u16, features: u64) -> (MockRing, VirtQueue, IrqCount) {
    let ring = MockRing::new(mem, 0x10_0000, size);
    let (queue, irq) = ring.device_side(0, features);
    let mut inner = queue.queue;
    inner.set_next_avail(next);
    inner.set_next_used(next);
    let queue = VirtQueue::new(0, inner, features, Box::new(irq.clone()));
    (ring, queue, irq)
}

const STARTS: [u16; 6] = [0, 1, 5, 0x7fff, 0xfffe, 0xffff];

/// Every index that a driver can publish is work for a queue of that size, none, or an error.
#[test]
fn every_available_index_is_accepted_or_refused() {
    let (mem, _) = memory();
    for size in [1_u16, 2, 4, 256] {
        for next in STARTS {
            let (mut ring, mut queue, _) = at(&mem, size, next, 0);
            for index in 0..size {
                ring.descriptor(index, 0x20_0000, 16, 0, 0);
            }
            for slot in 0..u64::from(size) {
                let head = (slot as u16) ^ 1 & (size - 1);
                mem.write_obj(head, GuestAddress(ring.avail() + 4 + slot * 2))
                    .unwrap();
            }
            let step = if size == 4 { 1 } else { 251 };
            let near = (0..=size + 2).flat_map(|more| [next.wrapping_add(more), next.wrapping_sub(more)]);
            for published in (0..=u16::MAX).step_by(step).chain(near) {
                ring.set_available(published);
                let waiting = published.wrapping_sub(next);
                match queue.pop(&mem) {
                    Ok(None) => assert_eq!(waiting, 0, "{size} {next} {published}"),
                    Ok(Some(chain)) => {
                        assert!((1..=size).contains(&waiting), "{size} {next} {published}");
                        assert_eq!(chain.head(), (next % size) ^ 1 & (size - 1));
                        queue.unpop();
                    }
                    Err(_) => assert!(waiting > size, "{size} {next} {published}"),
                }
                assert_eq!(queue.in_flight(), 0);
            }
        }
    }
}

/// An interrupt is due if the driver's event index was passed: it is one of the indices that were used since.
#[test]
fn an_interrupt_is_due_for_each_index_that_was_passed() {
    let (mem, _) = memory();
    for next in STARTS {
        for group in 0..=4_u16 {
            let passed: Vec<u16> = (0..group).map(|i| next.wrapping_add(i)).collect();
            for event in (0..=u16::MAX)
                .step_by(97)
                .chain((0..12).map(|i| next.wrapping_sub(4).wrapping_add(i)))
            {
                let (ring, mut queue, irq) = at(&mem, 8, next, feature::EVENT_IDX);
                ring.set_used_event(event);
                let heads: Vec<(u16, u32)> = (0..group).map(|head| (head, 0)).collect();
                queue.push_all(&mem, &heads).unwrap();
                queue.notify(&mem).unwrap();
                assert_eq!(
                    irq.take(),
                    usize::from(passed.contains(&event)),
                    "{next} +{group}, event {event}"
                );
            }
        }
    }
}

/// Used entries land in the slots that the index names, around the wrap of both.
#[test]
fn used_entries_follow_the_index_around_the_ring() {
    let (mem, _) = memory();
    for size in [1_u16, 2, 8] {
        for next in STARTS {
            let (ring, mut queue, _) = at(&mem, size, next, 0);
            for turn in 0..3 * size {
                queue.push(&mem, turn % size, u32::from(turn)).unwrap();
                let index: u16 = mem.read_obj(GuestAddress(ring.used_ring() + 2)).unwrap();
                assert_eq!(index, next.wrapping_add(turn).wrapping_add(1));
                let slot = u64::from(next.wrapping_add(turn) % size);
                let entry: u64 = mem
                    .read_obj(GuestAddress(ring.used_ring() + 4 + slot * 8))
                    .unwrap();
                assert_eq!(entry, u64::from(turn % size) | u64::from(turn) << 32);
            }
        }
    }
}
