//! What simple devices have in common: a bounded round over a queue, and a configuration space of plain fields.

use arch::mem::SharedMem;

use super::queue::{Chain, QueueBroken, VirtQueue};

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
            let mut served = 0;
            let mut round = |limit| {
                let handle = |_: &Chain| {
                    served += 1;
                    Ok(0)
                };
                serve(&mut queue, &mem, limit, handle).unwrap()
            };
            assert!(round(3));
            assert!(!round(3));
            assert!(!round(3));
            assert_eq!(served, 5);
            assert_eq!((0..6).filter(|_| ring.take_used().is_some()).count(), 5);
            // Without a wish of the driver, or with the event at index 0, the first round announces.
            assert!(irq.take() >= 1);
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
