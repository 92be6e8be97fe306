//! The driver's side of a virtqueue, and guest memory, for tests of devices and transports.
#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may end in a panic"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};

use arch::addr::{Gpa, PageRange};
use arch::mem::{SharedMem, Visibility, VisibilityMap, Watch};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::device::{Activation, feature};
use super::queue::{QueueIrq, VirtQueue};

/// RAM of the mock: `[0, LOW_END)` and `[HIGH, HIGH_END)`, a hole between them.
pub const LOW_END: u64 = 16 << 20;
/// Start of the second range.
pub const HIGH: u64 = 32 << 20;
/// End of the second range.
pub const HIGH_END: u64 = 34 << 20;

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Guest memory, all of it shared, and the map with which a test turns pages private.
pub fn memory() -> (SharedMem, Arc<VisibilityMap>) {
    let ram = [(0, LOW_END), (HIGH, HIGH_END - HIGH)];
    let map = GuestMemoryMmap::from_ranges(&ram.map(|(at, len)| (GuestAddress(at), len as usize))).unwrap();
    let ranges = ram.map(|(at, len)| pages(at, len));
    let visible = Arc::new(VisibilityMap::new(&ranges, Visibility::Shared));
    (SharedMem::new(Arc::new(map), Arc::clone(&visible)), visible)
}

/// A page range that is known to be good.
pub fn pages(at: u64, len: u64) -> PageRange {
    PageRange::new(Gpa(at), len).unwrap()
}

/// Tells another thread to stop, also when the test fails, which would otherwise wait for it for ever.
#[derive(Debug)]
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Counts interrupts.
#[derive(Clone, Debug, Default)]
pub struct IrqCount(Arc<AtomicUsize>);

impl IrqCount {
    /// Interrupts since the last call.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl QueueIrq for IrqCount {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// One split virtqueue as a driver sees it. It owns a window of guest memory: table at `base`, available
/// ring at `base + 0x4000`, used ring at `base + 0x6000`, buffers from `base + 0x1_0000`. Sizes up to 1024.
#[derive(Debug)]
pub struct MockRing {
    /// Memory the ring lies in.
    pub mem: SharedMem,
    /// Start of its window.
    pub base: u64,
    /// Descriptors.
    pub size: u16,
    next_descriptor: u16,
    next_buffer: u64,
    available: u16,
    used: u16,
}

impl MockRing {
    /// A ring of `size` descriptors at `base` (4 KiB-aligned).
    pub fn new(mem: &SharedMem, base: u64, size: u16) -> Self {
        let ring = Self {
            mem: mem.clone(),
            base,
            size,
            next_descriptor: 0,
            next_buffer: base + 0x1_0000,
            available: 0,
            used: 0,
        };
        ring.mem.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
        ring
    }

    /// Address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    pub fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    /// Address of the used ring.
    pub fn used_ring(&self) -> u64 {
        self.base + 0x6000
    }

    /// The device's view of this ring, and its interrupts.
    pub fn device_side(&self, index: u16, features: u64) -> (VirtQueue, IrqCount) {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.table()))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.mem));
        let irq = IrqCount::default();
        (VirtQueue::new(index, queue, features, Box::new(irq.clone())), irq)
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn put(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.mem
            .write_slice(&raw, GuestAddress(table + u64::from(index) * 16))
            .unwrap();
    }

    /// Writes descriptor `index` of the queue's own table.
    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.put(self.table(), index, addr, len, flags, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, head: u16) {
        let at = self.avail() + 4 + u64::from(self.available % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(at)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Sets the index of the available ring, wherever that leads.
    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        self.mem.write_obj(index, GuestAddress(self.avail() + 2)).unwrap();
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail() + 4 + u64::from(self.size) * 2;
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Reserves a buffer of `len` bytes and returns its address.
    pub fn buffer(&mut self, len: usize) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += (len as u64).next_multiple_of(16);
        at
    }

    /// Makes a chain of `readable` buffers with these contents and `writable` buffers of these lengths
    /// available. Returns its head and the addresses of all buffers.
    pub fn send(&mut self, readable: &[&[u8]], writable: &[u32]) -> (u16, Vec<u64>) {
        let count = readable.len() + writable.len();
        let head = self.next_descriptor;
        let mut addresses = vec![];
        for i in 0..count {
            let (len, write) = match readable.get(i) {
                Some(bytes) => (bytes.len() as u32, 0),
                None => (writable[i - readable.len()], WRITE),
            };
            let at = self.buffer(len as usize);
            if let Some(bytes) = readable.get(i) {
                self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
            }
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if i + 1 < count { NEXT } else { 0 };
            self.descriptor(index, at, len, write | more, self.next_descriptor);
            addresses.push(at);
        }
        self.offer(head);
        (head, addresses)
    }

    /// The next used entry: head and bytes written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.mem.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        self.used = self.used.wrapping_add(1);
        let id = self.mem.read_obj(GuestAddress(at)).unwrap();
        let len = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((id, len))
    }

    /// Bytes of guest memory.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

/// A driver on another vCPU: each time that the device asks for kicks (EVENT_IDX) it makes the next entry of its ring
/// available, too early to see the wish and to kick.
#[derive(Debug)]
pub struct Late {
    mem: SharedMem,
    index: u64,
    wish: u64,
    wished: AtomicBool,
    available: AtomicU16,
    last: u16,
}

impl Late {
    /// Makes entries of `ring` available, up to index `last`.
    pub fn new(ring: &MockRing, last: u16) -> Self {
        Self {
            mem: ring.mem.clone(),
            index: ring.avail() + 2,
            wish: ring.used_ring() + 4 + u64::from(ring.size) * 8,
            wished: AtomicBool::new(false),
            available: AtomicU16::new(ring.available),
            last,
        }
    }
}

impl Watch for Late {
    fn before(&self, at: Gpa, _: u64, access: Permissions) {
        if at.0 == self.wish && access == Permissions::Write {
            self.wished.store(true, Ordering::SeqCst);
        }
        let looks = at.0 == self.index && access == Permissions::Read;
        if looks
            && self.wished.swap(false, Ordering::SeqCst)
            && self.available.load(Ordering::SeqCst) < self.last
        {
            let next = self.available.fetch_add(1, Ordering::SeqCst) + 1;
            self.mem.write_obj(next, GuestAddress(self.index)).unwrap();
        }
    }
}

/// Activates a device with one queue per ring, all usual features on top of `features`. Returns what
/// `VirtioDevice::activate` wants and the interrupts of each queue.
pub fn activation(mem: &SharedMem, rings: &[&MockRing], features: u64) -> (Activation, Vec<IrqCount>) {
    let features = features
        | feature::VERSION_1
        | feature::ACCESS_PLATFORM
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX;
    let (queues, irqs): (Vec<_>, Vec<_>) = rings
        .iter()
        .zip(0..)
        .map(|(ring, index)| ring.device_side(index, features))
        .unzip();
    let with = Activation {
        mem: mem.clone(),
        queues: queues.into_iter().map(Some).collect(),
        features,
    };
    (with, irqs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_chain_goes_to_the_device_and_back() {
        let (mem, _) = memory();
        let mut ring = MockRing::new(&mem, 0x10_0000, 16);
        let (mut queue, irq) = ring.device_side(0, feature::EVENT_IDX);
        let (head, at) = ring.send(&[b"ping"], &[8]);
        let chain = queue.pop(&mem).unwrap().unwrap();
        let mut request = [0; 4];
        chain.reader(&mem).read_exact(&mut request).unwrap();
        chain.writer(&mem).write_all(b"pong").unwrap();
        queue.push(&mem, chain.head(), 4).unwrap();
        queue.notify(&mem).unwrap();
        assert_eq!(&request, b"ping");
        assert_eq!(ring.take_used(), Some((u32::from(head), 4)));
        assert_eq!(ring.read(at[1], 4), b"pong");
        assert_eq!(irq.take(), 1);
        assert!(queue.pop(&mem).unwrap().is_none());
    }
}
