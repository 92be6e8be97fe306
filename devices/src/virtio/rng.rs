//! Entropy device (virtio 1.2, "Entropy Device").

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use arch::mem::SharedMem;
use rustix::rand::{GetRandomFlags, getrandom};

use super::device::{Activation, Running, VirtioDevice};
use super::queue::{Chain, QueueBroken, VirtQueue};
use super::serve::serve;
use crate::wake::{Wake, retry};

/// Most bytes for one request, however large its buffers; the device may always give fewer.
const REQUEST_BYTES: u64 = 64 << 10;
/// Requests per wake-up.
const REQUESTS: usize = 4;
const PIECE: usize = 4096;

/// An entropy device fed by the host's kernel.
#[derive(Debug)]
pub struct VirtioRng {
    /// Set by the running device itself when it has more to do.
    again: Arc<Wake>,
}

impl VirtioRng {
    /// A device without a driver.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            again: Arc::new(Wake::new()?),
        })
    }
}

impl VirtioDevice for VirtioRng {
    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.again.as_fd())
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        Ok(Box::new(RunningRng {
            mem: with.mem,
            requests: with.queues.into_iter().next().flatten(),
            again: Arc::clone(&self.again),
        }))
    }
}

struct RunningRng {
    mem: SharedMem,
    requests: Option<VirtQueue>,
    again: Arc<Wake>,
}

impl Running for RunningRng {
    fn on_kick(&mut self, _queue: usize) -> Result<(), QueueBroken> {
        let Some(queue) = &mut self.requests else {
            return Ok(());
        };
        let index = queue.index();
        let handle = |chain: &Chain| fill(chain, &self.mem, index);
        if serve(queue, &self.mem, REQUESTS, handle)? {
            self.again.signal();
        }
        Ok(())
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.again.clear();
        self.on_kick(0)
    }
}

/// Fills one request. Memory that turned private, or an unlikely refusal of the host, ends it early.
fn fill(chain: &Chain, mem: &SharedMem, queue: u16) -> Result<u32, QueueBroken> {
    if chain.writable().is_empty() {
        return Err(chain.bad_shape(queue));
    }
    let mut writer = chain.writer(mem);
    let mut buf = [0; PIECE];
    while writer.left() != 0 && writer.moved() < REQUEST_BYTES {
        let wanted = writer
            .left()
            .min(REQUEST_BYTES.saturating_sub(writer.moved()))
            .min(PIECE as u64);
        let piece = buf
            .get_mut(..usize::try_from(wanted).unwrap_or(PIECE))
            .unwrap_or_default();
        let Ok(count) = retry(|| getrandom(&mut *piece, GetRandomFlags::empty())) else {
            break;
        };
        if writer.write_all(piece.get(..count).unwrap_or_default()).is_err() {
            break;
        }
    }
    Ok(u32::try_from(writer.moved()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::super::mock::{MockRing, activation, memory, pages};
    use super::*;
    use arch::mem::Visibility;

    const BASE: u64 = 0x10_0000;

    fn pending(device: &VirtioRng) -> bool {
        let pending = device.again.clear() != 0;
        if pending {
            device.again.signal();
        }
        pending
    }

    #[test]
    fn a_request_gets_random_bytes_across_its_buffers() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, BASE, 64);
        let (with, irqs) = activation(&mem, &[&ring], 0);
        let mut device = VirtioRng::new().unwrap();
        let mut running = device.activate(with).unwrap();
        let (head, at) = ring.send(&[], &[100, 5000]);
        running.on_kick(0).unwrap();
        assert_eq!(ring.take_used(), Some((u32::from(head), 5100)));
        let bytes = [ring.read(at[0], 100), ring.read(at[1], 5000)].concat();
        for value in 0..=255 {
            let count = bytes.iter().filter(|b| **b == value).count();
            // Mean 20, deviation 4.5: wrong once in far more runs than there will be.
            assert!(count < 80, "{value} occurs {count} times");
        }
        assert_eq!(irqs[0].take(), 1);
    }

    #[test]
    fn a_huge_request_gets_its_bound() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, BASE, 64);
        let (with, _) = activation(&mem, &[&ring], 0);
        let mut running = VirtioRng::new().unwrap().activate(with).unwrap();
        let (head, _) = ring.send(&[], &[8 << 20]);
        running.on_kick(0).unwrap();
        assert_eq!(ring.take_used(), Some((u32::from(head), 64 << 10)));
    }

    #[test]
    fn a_flood_is_served_in_bounded_rounds_without_further_kicks() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, BASE, 64);
        let (with, _) = activation(&mem, &[&ring], 0);
        let mut device = VirtioRng::new().unwrap();
        let mut running = device.activate(with).unwrap();
        for _ in 0..10 {
            ring.send(&[], &[64]);
        }
        running.on_kick(0).unwrap();
        let mut rounds = vec![std::iter::from_fn(|| ring.take_used()).count()];
        while pending(&device) {
            running.on_backend().unwrap();
            rounds.push(std::iter::from_fn(|| ring.take_used()).count());
        }
        assert_eq!(rounds, [4, 4, 2]);
        assert!(!pending(&device));
    }

    #[test]
    fn a_request_without_room_breaks_the_queue() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, BASE, 64);
        let (with, _) = activation(&mem, &[&ring], 0);
        let mut running = VirtioRng::new().unwrap().activate(with).unwrap();
        ring.send(&[b"give"], &[]);
        assert!(running.on_kick(0).is_err());
    }

    #[test]
    fn private_memory_is_never_written() {
        let (mem, visible) = memory();
        let mut ring = MockRing::new(&mem, BASE, 64);
        let (with, _) = activation(&mem, &[&ring], 0);
        let mut running = VirtioRng::new().unwrap().activate(with).unwrap();
        visible.set(pages(0x20_0000, 0x1000), Visibility::Private);
        ring.descriptor(0, 0x1f_f000, 0x1800, super::super::mock::WRITE, 0);
        ring.offer(0);
        assert!(running.on_kick(0).is_err());
    }

    #[test]
    fn a_disabled_queue_is_no_queue() {
        let (mem, _) = memory();
        let ring = MockRing::new(&mem, BASE, 64);
        let (mut with, _) = activation(&mem, &[&ring], 0);
        with.queues = vec![None];
        let mut running = VirtioRng::new().unwrap().activate(with).unwrap();
        running.on_kick(0).unwrap();
        running.on_kick(7).unwrap();
        running.on_backend().unwrap();
    }
}
