//! A driver for any device, well-behaved as long as nobody makes it otherwise.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::machine::{BAR, CONFIG, HIGH, LOW_END, Machine};

const FIRST_RING: u64 = 0x1000;
const RING_BYTES: u64 = 0x4000;
/// Queues that the driver knows what to do with.
pub const QUEUES: u16 = 7;
/// Where buffers begin; below lie the rings.
pub const BUFFERS: u64 = 0x2_0000;
/// Bytes of one indirect table.
const TABLE_BYTES: u64 = 512;

/// Longer than any disk of these tests takes to finish what it began.
const RESET_LIMIT: Duration = Duration::from_secs(10);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VIRTIO_F_VERSION_1` and `VIRTIO_F_ACCESS_PLATFORM`.
const DEMANDED: u64 = 3 << 32;
const F_INDIRECT: u64 = 1 << 28;

/// One queue.
#[derive(Debug)]
pub struct Ring {
    /// Descriptors; 0 if the queue is not used.
    pub size: u16,
    base: u64,
    available: u16,
    used: u16,
    free: Vec<u16>,
    /// Descriptors and writable bytes of each chain that the device has, by head.
    out: BTreeMap<u16, (Vec<u16>, u64)>,
}

/// One buffer of a chain.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// The device may read it.
    Readable(Vec<u8>),
    /// The device may write this many bytes.
    Writable(u32),
}

/// The driver.
#[derive(Debug)]
pub struct Guest {
    /// Its queues.
    pub rings: Vec<Ring>,
    next_buffer: u64,
    indirect: bool,
    /// The guest broke no rule since the last set-up, so the device must not either.
    pub honest: bool,
}

impl Ring {
    fn new(index: u16, size: u16) -> Self {
        Self {
            size,
            base: FIRST_RING + u64::from(index) * RING_BYTES,
            available: 0,
            used: 0,
            free: (0..size).rev().collect(),
            out: BTreeMap::new(),
        }
    }

    /// Address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    pub fn avail(&self) -> u64 {
        self.base + 0x2000
    }

    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + 0x3000
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, machine: &Machine, head: u16) {
        let slot = u64::from(self.available % self.size.max(1));
        machine.write(self.avail() + 4 + slot * 2, &head.to_le_bytes());
        self.set_available(machine, self.available.wrapping_add(1));
    }

    /// Sets the index of the available ring.
    pub fn set_available(&mut self, machine: &Machine, index: u16) {
        self.available = index;
        machine.write(self.avail() + 2, &index.to_le_bytes());
    }
}

/// A descriptor as it lies in memory.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

impl Guest {
    /// Resets the device and sets it up: all features that are offered and in `wanted`, queues of `size`
    /// (rounded to what is possible), but those in `without`, a bit each.
    pub fn set_up(machine: &Machine, wanted: u64, size: u16, without: u8) -> Self {
        let set8 = |at: u64, value: u8| machine.set(BAR + at, &[value]);
        let set16 = |at: u64, value: u16| machine.set(BAR + at, &value.to_le_bytes());
        let set32 = |at: u64, value: u32| machine.set(BAR + at, &value.to_le_bytes());
        // Memory and bus mastering on, MSI-X on.
        machine.set(CONFIG + 4, &6_u16.to_le_bytes());
        set8(0x14, 0);
        let until = Instant::now() + RESET_LIMIT;
        while machine.get(BAR + 0x14, 1) != 0 {
            assert!(Instant::now() < until, "the reset does not end");
        }
        set8(0x14, 1);
        set8(0x14, 3);
        let mut features = 0;
        for half in [0, 1] {
            set32(0, half);
            features |= machine.get(BAR + 4, 4) << (half * 32);
        }
        features &= wanted | DEMANDED;
        for half in [0, 1] {
            set32(8, half);
            set32(0xc, ((features >> (half * 32)) & 0xffff_ffff) as u32);
        }
        set8(0x14, 0xb);
        set16(0x10, 0);
        let mut rings = vec![];
        for index in 0..(machine.get(BAR + 0x12, 2) as u16).min(QUEUES) {
            set16(0x16, index);
            let max = (machine.get(BAR + 0x18, 2) as u16).min(256);
            let size = match without & (1 << index) {
                0 => size.clamp(1, max.max(1)).next_power_of_two(),
                _ => 0,
            };
            let ring = Ring::new(index, size);
            if size != 0 {
                machine.write(ring.base, &[0; RING_BYTES as usize]);
                set16(0x18, size);
                set16(0x1a, index % 4);
                for (at, value) in [(0x20, ring.table()), (0x28, ring.avail()), (0x30, ring.used())] {
                    machine.set(BAR + at, &value.to_le_bytes());
                }
                set16(0x1c, 1);
            }
            rings.push(ring);
        }
        set8(0x14, 0xf);
        Self {
            rings,
            next_buffer: BUFFERS,
            indirect: features & F_INDIRECT != 0,
            honest: true,
        }
    }

    /// Routes and unmasks the first vectors, and turns MSI-X on.
    pub fn set_up_interrupts(machine: &Machine) {
        for vector in 0..4_u64 {
            let entry = BAR + 0x4000 + vector * 16;
            machine.set(entry, &0xfee0_0000_u64.to_le_bytes());
            machine.set(entry + 8, &(0x40 + vector).to_le_bytes());
        }
        let mut at = machine.get(CONFIG + 0x34, 1) & 0xfc;
        while at != 0 && machine.get(CONFIG + at, 1) != 0x11 {
            at = machine.get(CONFIG + at + 1, 1) & 0xfc;
        }
        machine.set(CONFIG + at + 2, &0x8000_u16.to_le_bytes());
    }

    /// Room for `len` bytes, reused in the end.
    fn buffer(&mut self, len: u64) -> u64 {
        if self.next_buffer + len > LOW_END {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len.next_multiple_of(16);
        at
    }

    /// Offers a chain of `buffers`, if queue and memory have room for it. Returns its head and the places of
    /// its buffers.
    pub fn send(
        &mut self,
        machine: &Machine,
        queue: u16,
        buffers: &[Buffer],
        indirect: bool,
    ) -> Option<(u16, Vec<u64>)> {
        let indirect = indirect && self.indirect && queue < 2 && buffers.len() as u64 <= TABLE_BYTES / 16;
        let ring = self.rings.get_mut(usize::from(queue))?;
        let needed = if indirect { 1 } else { buffers.len() };
        if buffers.is_empty() || ring.free.len() < needed {
            return None;
        }
        let taken = ring.free.split_off(ring.free.len() - needed);
        let (head, base) = (taken[0], ring.base);
        let table = HIGH + u64::from(queue) * 0x2_0000 + u64::from(head) * TABLE_BYTES;
        let (mut places, mut writable) = (vec![], 0_u64);
        for (i, buffer) in buffers.iter().enumerate() {
            let (len, flag) = match buffer {
                Buffer::Readable(bytes) => (bytes.len() as u32, 0),
                Buffer::Writable(len) => (*len, WRITE),
            };
            let place = self.buffer(u64::from(len));
            match buffer {
                Buffer::Readable(bytes) => machine.write(place, bytes),
                Buffer::Writable(len) => writable += u64::from(*len),
            }
            let last = i + 1 == buffers.len();
            let (at, next) = if indirect {
                (table + i as u64 * 16, i as u16 + 1)
            } else {
                let next = taken.get(i + 1).copied().unwrap_or(0);
                (base + u64::from(taken[i]) * 16, next)
            };
            let flags = flag | if last { 0 } else { NEXT };
            machine.write(at, &descriptor(place, len, flags, next));
            places.push(place);
        }
        if indirect {
            let raw = descriptor(table, buffers.len() as u32 * 16, INDIRECT, 0);
            machine.write(base + u64::from(head) * 16, &raw);
        }
        let ring = self.rings.get_mut(usize::from(queue))?;
        ring.out.insert(head, (taken, writable));
        ring.offer(machine, head);
        Some((head, places))
    }

    /// Takes back what the device is done with, and returns how many chains those were.
    ///
    /// # Panics
    /// The guest broke no rule, but the device did.
    pub fn recycle(&mut self, machine: &Machine, queue: u16) -> usize {
        let honest = self.honest;
        let Some(ring) = self
            .rings
            .get_mut(usize::from(queue))
            .filter(|ring| ring.size != 0)
        else {
            return 0;
        };
        let Some(index) = machine.read(ring.used() + 2).map(u16::from_le_bytes) else {
            return 0;
        };
        let mut count = 0;
        // A guest that broke the ring may find anything there.
        while index != ring.used && count < usize::from(ring.size) {
            let at = ring.used() + 4 + u64::from(ring.used % ring.size) * 8;
            let entry = u64::from_le_bytes(machine.read(at).unwrap_or_default());
            let (head, len) = (entry as u32, entry >> 32);
            let chain = u16::try_from(head).ok().and_then(|head| ring.out.remove(&head));
            if honest {
                let (_, writable) = chain
                    .as_ref()
                    .expect("a chain is used that the device does not have");
                assert!(
                    len <= *writable,
                    "{len} bytes written, there is room for {writable}"
                );
            }
            ring.free
                .extend(chain.map(|(taken, _)| taken).unwrap_or_default());
            ring.used = ring.used.wrapping_add(1);
            count += 1;
        }
        assert!(!honest || index == ring.used, "more chains are used than exist");
        count
    }

    /// Kicks `queue`.
    pub fn kick(&self, machine: &Machine, queue: u16) {
        machine.set(BAR + 0x1000 + u64::from(queue) * 4, &queue.to_le_bytes());
    }
}
