//! What simple devices have in common: a bounded round over a queue, and a configuration space of plain fields.

use arch::mem::SharedMem;

use super::queue::{Chain, QueueBroken, VirtQueue};

/// Whose turn it is among queues that share an allowance: the one after the last that got some of it goes first.
#[derive(Debug, Default)]
pub struct Turns {
    first: usize,
}

impl Turns {
    /// All of `count` queues, in the order of their turns.
    pub fn order(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        let first = self.first.min(count);
        (first..count).chain(0..first)
    }

    /// Queue `index` got something.
    pub fn took(&mut self, index: usize) {
        self.first = index.saturating_add(1);
    }
}

/// Handles up to `limit` chains and returns each with the bytes that `handle` says it wrote. True if chains may
/// be left: the caller has to come back without a kick.
///
/// # Errors
/// The guest broke the ring, or `handle` says so.
pub fn serve(
    queue: &mut VirtQueue,
    mem: &SharedMem,
    limit: usize,
    mut handle: impl FnMut(&Chain) -> Result<u32, QueueBroken>,
) -> Result<bool, QueueBroken> {
    let mut left = limit;
    let more = loop {
        queue.disable_kicks(mem)?;
        while left != 0
            && let Some(chain) = queue.pop(mem)?
        {
            let written = handle(&chain)?;
            queue.push(mem, chain.head(), written)?;
            left = left.saturating_sub(1);
        }
        if left == 0 {
            break true;
        }
        if !queue.enable_kicks(mem)? {
            break false;
        }
    };
    queue.notify(mem)?;
    Ok(more)
}

/// Copies from the fields of a configuration space; bytes of `data` past their end stay as they are.
pub fn copy_fields(fields: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let fields = fields.get(from..).unwrap_or_default();
    for (to, field) in data.iter_mut().zip(fields) {
        *to = *field;
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::feature;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU16, Ordering};

    use arch::addr::Gpa;
    use arch::mem::Watch;
    use vm_memory::{Bytes, GuestAddress, Permissions};

    use super::super::mock::{MockRing, memory};
    use super::*;

    #[test]
    fn a_round_is_bounded_and_ends_with_kicks_enabled() {
        for features in [0, feature::EVENT_IDX] {
            let (mem, _) = memory();
            let mut ring = MockRing::new(&mem, 0x10_0000, 16);
            let (mut queue, irq) = ring.device_side(0, features);
            for _ in 0..5 {
                ring.send(&[b"x"], &[]);
            }
            let mut round = |limit| {
                let mut served = 0;
                let handle = |_: &Chain| {
                    served += 1;
                    Ok(0)
                };
                let more = serve(&mut queue, &mem, limit, handle).unwrap();
                (served, more)
            };
            let rounds = [round(3), round(3), round(3)];
            assert_eq!(rounds, [(3, true), (2, false), (0, false)]);
            assert_eq!((0..6).filter(|_| ring.take_used().is_some()).count(), 5);
            // Without a wish of the driver, or with the event at index 0, the first round announces.
            assert!(irq.take() >= 1);
        }
    }

    /// Moves the available index to and fro between any two looks at it.
    #[derive(Debug)]
    struct Restless {
        mem: SharedMem,
        index: u64,
        looks: AtomicU16,
    }

    impl Watch for Restless {
        fn before(&self, at: Gpa, _: u64, access: Permissions) {
            if at.0 == self.index && access == Permissions::Read {
                let looks = self.looks.fetch_add(1, Ordering::SeqCst);
                assert!(looks < 1000, "the device does not come to an end");
                self.mem.write_obj(looks % 2, GuestAddress(self.index)).unwrap();
            }
        }
    }

    #[test]
    fn a_restless_index_keeps_no_round_going() {
        for (features, first) in [(0, 0), (0, 1), (feature::EVENT_IDX, 0), (feature::EVENT_IDX, 1)] {
            let (mem, _) = memory();
            let ring = MockRing::new(&mem, 0x10_0000, 16);
            ring.descriptor(0, 0x20_0000, 16, 0, 0);
            let (mut queue, _) = ring.device_side(0, features);
            let watch = Restless {
                index: ring.avail() + 2,
                mem: mem.clone(),
                looks: first.into(),
            };
            // An index that went back behind what was taken breaks the queue, which is an end too.
            let _ = serve(&mut queue, &mem.watched(Arc::new(watch)), 4, |_| Ok(0));
        }
    }

    #[test]
    fn fields_are_read_at_any_offset_and_size() {
        let fields = [1, 2, 3, 4, 5];
        for len in [0, 1, 2, 3, 4, 8, 16] {
            for offset in (0..10).chain([u64::MAX - 1, u64::MAX]) {
                let mut data = vec![0; len];
                copy_fields(&fields, offset, &mut data);
                for (i, byte) in data.iter().enumerate() {
                    let at = offset.saturating_add(i as u64);
                    let expected = usize::try_from(at).ok().and_then(|at| fields.get(at));
                    assert_eq!(byte, expected.unwrap_or(&0), "{offset}+{i}");
                }
            }
        }
    }
}
