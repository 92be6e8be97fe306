//! The used ring: returning chains and deciding on interrupts (virtio 1.2, "The Virtqueue Used Ring",
//! "Used Buffer Notification Suppression"). Done here because a group of chains must appear at once, and
//! because `virtio-queue` ignores `VIRTQ_AVAIL_F_NO_INTERRUPT`.

use std::sync::atomic::{Ordering, fence};

use arch::mem::SharedMem;
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{QueueBroken, VirtQueue};

const NO_INTERRUPT: u16 = 1;

impl VirtQueue {
    /// Returns a chain to the driver, `written` bytes of its writable part filled.
    ///
    /// # Errors
    /// The used ring is no longer in shared memory.
    pub fn push(&mut self, mem: &SharedMem, head: u16, written: u32) -> Result<(), QueueBroken> {
        self.push_all(mem, &[(head, written)])
    }

    /// Returns several chains, each with the bytes written; the driver sees all of them or none.
    ///
    /// # Errors
    /// The used ring is no longer in shared memory.
    pub fn push_all(&mut self, mem: &SharedMem, chains: &[(u16, u32)]) -> Result<(), QueueBroken> {
        self.put_used(mem, chains).map_err(|e| self.broken(e))
    }

    fn put_used(&mut self, mem: &SharedMem, chains: &[(u16, u32)]) -> Result<(), Error> {
        let ring = self.queue.used_ring();
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            let slot = u64::from(next.checked_rem(size).unwrap_or(0));
            let element = u64::from(*head) | u64::from(*written) << 32;
            let at = at(ring, slot.saturating_mul(8).saturating_add(4))?;
            mem.write_obj(element.to_le(), at).map_err(Error::GuestMemory)?;
            next = next.wrapping_add(1);
            self.in_flight.remove(*head);
        }
        self.queue.set_next_used(next);
        mem.store(next.to_le(), at(ring, 2)?, Ordering::Release)
            .map_err(Error::GuestMemory)
    }

    /// Tells the driver about what was pushed since the last call, unless it does not want to know.
    ///
    /// # Errors
    /// The rings are no longer in shared memory.
    pub fn notify(&mut self, mem: &SharedMem) -> Result<(), QueueBroken> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.announced, used);
        if used != before
            && self
                .wants_interrupt(mem, before, used)
                .map_err(|e| self.broken(e))?
        {
            self.irq.notify();
        }
        Ok(())
    }

    fn wants_interrupt(&self, mem: &SharedMem, before: u16, used: u16) -> Result<bool, Error> {
        // The driver writes its wish and then looks at the used index; we do it the other way round.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset| -> Result<u16, Error> {
            mem.load(at(ring, offset)?, Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(Error::GuestMemory)
        };
        if !self.queue.event_idx_enabled() {
            return Ok(load(0)? & NO_INTERRUPT == 0);
        }
        let event = load(u64::from(self.queue.size()).saturating_mul(2).saturating_add(4))?;
        Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before))
    }
}

fn at(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    ring.checked_add(offset)
        .map(GuestAddress)
        .ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use super::super::super::device::feature;
    use super::super::super::mock::{MockRing, memory};
    use super::*;

    #[test]
    fn a_group_appears_at_once_and_wraps_around_the_ring() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, 0x10_0000, 4);
        let (mut queue, irq) = ring.device_side(0, 0);
        for round in 0..5_u32 {
            let heads: Vec<u16> = (0..3).map(|_| ring.send(&[], &[8]).0).collect();
            for _ in 0..3 {
                queue.pop(&mem).unwrap().unwrap();
            }
            let group: Vec<_> = heads.iter().map(|head| (*head, round)).collect();
            queue.push_all(&mem, &group).unwrap();
            queue.notify(&mem).unwrap();
            queue.notify(&mem).unwrap();
            assert_eq!(irq.take(), 1);
            assert_eq!(queue.in_flight(), 0);
            for head in heads {
                assert_eq!(ring.take_used(), Some((u32::from(head), round)));
            }
        }
    }

    #[test]
    fn interrupts_follow_the_drivers_wish() {
        // Wish, chains pushed one by one before one notify, interrupts.
        let cases = [
            ("event index 0", feature::EVENT_IDX, 0_u16, 0_u16, 1, 1),
            ("event passed within a group", feature::EVENT_IDX, 2, 0, 3, 1),
            ("event not reached", feature::EVENT_IDX, 3, 0, 3, 0),
            ("event far behind", feature::EVENT_IDX, 0xfff0, 0, 3, 0),
            (
                "flags do not count with event index",
                feature::EVENT_IDX,
                0,
                1,
                1,
                1,
            ),
            ("no event index", 0, 9, 0, 1, 1),
            ("no interrupt wanted", 0, 0, 1, 1, 0),
            ("nothing pushed", 0, 0, 0, 0, 0),
        ];
        for (name, features, event, flags, count, interrupts) in cases {
            let (mem, _) = memory();
            let mut ring = MockRing::new(&mem, 0x10_0000, 16);
            let (mut queue, irq) = ring.device_side(0, features);
            ring.set_used_event(event);
            mem.write_obj(flags, GuestAddress(ring.avail())).unwrap();
            for _ in 0..count {
                ring.send(&[b"x"], &[]);
                let head = queue.pop(&mem).unwrap().unwrap().head();
                queue.push(&mem, head, 0).unwrap();
            }
            queue.notify(&mem).unwrap();
            assert_eq!(irq.take(), interrupts, "{name}");
        }
    }
}
