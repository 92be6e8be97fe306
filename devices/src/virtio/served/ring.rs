//! A split ring as Linux drives it (drivers/virtio/virtio_ring.c: what it writes and when, not how).

use std::sync::Arc;

use arch::mem::SharedMem;
use vm_memory::{Bytes, GuestAddress};

use super::super::mock::{MockRing, NEXT, WRITE};
use super::machine::Lines;

/// Where the buffers of a ring begin, behind its base.
const SLOTS: u64 = 0x1_0000;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One ring, each descriptor with a buffer of its own.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(super) mock: MockRing,
    lines: Arc<Lines>,
    queue: u16,
    /// Bytes of each descriptor's buffer.
    pub(crate) slot: u64,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each chain, by head.
    chains: Vec<Vec<u16>>,
    /// Available index, and what it was at the last kick.
    available: u16,
    kicked: u16,
    /// Used index as far as it was looked at.
    seen: u16,
    /// The driver wants interrupts.
    listens: bool,
}

impl Ring {
    /// Ring number `queue` at `base`. Its buffers lie behind it.
    pub(crate) fn new(
        mem: &SharedMem,
        lines: &Arc<Lines>,
        queue: u16,
        base: u64,
        size: u16,
        slot: u64,
    ) -> Self {
        Self {
            mock: MockRing::new(mem, base, size),
            lines: Arc::clone(lines),
            queue,
            slot,
            event_idx: false,
            free: (0..size).rev().collect(),
            chains: vec![vec![]; usize::from(size)],
            available: 0,
            kicked: 0,
            seen: 0,
            listens: true,
        }
    }

    /// As new, for a driver that begins again.
    pub(super) fn begin(&mut self, event_idx: bool) {
        let mem = self.mock.mem.clone();
        *self = Self::new(
            &mem,
            &self.lines,
            self.queue,
            self.mock.base,
            self.size(),
            self.slot,
        );
        self.event_idx = event_idx;
    }

    pub(crate) fn size(&self) -> u16 {
        self.mock.size
    }

    /// Descriptors that are free.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Chains that the driver has not got back.
    pub(crate) fn outstanding(&self) -> u16 {
        self.available.wrapping_sub(self.seen)
    }

    /// Chains that the device has not used.
    pub(crate) fn unused(&self) -> u16 {
        self.available.wrapping_sub(self.used())
    }

    fn load(&self, at: u64) -> u16 {
        self.mock.mem.read_obj(GuestAddress(at)).unwrap()
    }

    fn used(&self) -> u16 {
        self.load(self.mock.used_ring() + 2)
    }

    /// Buffer of descriptor `index`.
    pub(crate) fn at(&self, index: u16) -> u64 {
        self.mock.base + SLOTS + u64::from(index) * self.slot
    }

    /// Descriptor that the next chain begins with.
    pub(crate) fn next(&self) -> Option<u16> {
        self.free.last().copied()
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.mock.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        self.mock.read(at, len)
    }

    /// Makes a chain of `parts` available: address, length, writable. False without room.
    pub(crate) fn add(&mut self, parts: &[(u64, u32, bool)]) -> bool {
        if self.free.len() < parts.len() {
            return false;
        }
        let indices: Vec<u16> = parts.iter().filter_map(|_| self.free.pop()).collect();
        for (i, (at, len, writable)) in parts.iter().enumerate() {
            let next = indices.get(i + 1);
            let flags = next.map_or(0, |_| NEXT) | if *writable { WRITE } else { 0 };
            self.mock
                .descriptor(indices[i], *at, *len, flags, next.copied().unwrap_or(0));
        }
        let head = indices[0];
        self.mock.offer(head);
        self.available = self.available.wrapping_add(1);
        self.chains[usize::from(head)] = indices;
        true
    }

    /// Kicks if the device asked for one.
    pub(crate) fn kick(&mut self) -> bool {
        let (old, new) = (
            std::mem::replace(&mut self.kicked, self.available),
            self.available,
        );
        let used_ring = self.mock.used_ring();
        let wanted = if self.event_idx {
            let event = self.load(used_ring + 4 + u64::from(self.size()) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(used_ring) & NO_NOTIFY == 0
        };
        if wanted {
            self.lines.kick(self.queue);
        }
        wanted
    }

    /// The next chain that the device is done with: its head and what it says it wrote.
    pub(crate) fn get(&mut self) -> Option<(u16, u32)> {
        let (head, len) = self.mock.take_used()?;
        let head = u16::try_from(head).unwrap();
        self.seen = self.seen.wrapping_add(1);
        self.free
            .extend(std::mem::take(&mut self.chains[usize::from(head)]).iter().rev());
        if self.listens && self.event_idx {
            self.mock.set_used_event(self.seen);
        }
        Some((head, len))
    }

    /// Wants no interrupts for now.
    pub(crate) fn disable(&mut self) {
        self.listens = false;
        if self.event_idx {
            // As Linux does for want of something better.
            self.mock.set_used_event(0);
        } else {
            self.write(self.mock.avail(), &NO_INTERRUPT.to_le_bytes());
        }
    }

    /// Wants interrupts again; false if some chain was used meanwhile.
    pub(crate) fn enable(&mut self) -> bool {
        self.enable_after(0)
    }

    /// Wants an interrupt only when three quarters of what is offered are used; false if that is so already.
    pub(crate) fn enable_late(&mut self) -> bool {
        self.enable_after((u32::from(self.outstanding()) * 3 / 4) as u16)
    }

    fn enable_after(&mut self, chains: u16) -> bool {
        self.listens = true;
        if self.event_idx {
            self.mock.set_used_event(self.seen.wrapping_add(chains));
        } else {
            self.write(self.mock.avail(), &0_u16.to_le_bytes());
        }
        self.used().wrapping_sub(self.seen) <= chains
    }

    pub(super) fn fields(&self) -> Fields {
        Fields {
            avail: self.mock.avail(),
            used: self.mock.used_ring(),
            size: u64::from(self.size()),
        }
    }

    /// An interrupt came since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.lines.raised(self.queue)
    }

    /// A chain was used that the driver wanted to hear of, and it cannot know.
    pub(super) fn is_unheard(&self) -> bool {
        let event = self.load(self.mock.avail() + 4 + u64::from(self.size()) * 2);
        let (used, seen) = (self.used(), self.seen);
        let due = !self.event_idx || used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(seen);
        self.listens && used != seen && due
    }
}

/// Where a ring has its flags, indices and events.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    avail: u64,
    used: u64,
    size: u64,
}

impl Fields {
    pub(super) fn contain(self, at: u64) -> bool {
        let head = |ring: u64| (ring..ring + 4).contains(&at);
        head(self.avail) || head(self.used) || at == self.avail + 4 + self.size * 2 || self.are_a_wish(at)
    }

    /// The device's flags or event.
    pub(super) fn are_a_wish(self, at: u64) -> bool {
        at == self.used || at == self.used + 4 + self.size * 8
    }
}
