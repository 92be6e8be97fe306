//! The configuration space of one function (PCI Local Bus 3.0, "Configuration Space Organization").

use super::{from_le, to_le};

/// Bytes that are decoded; the rest of a function's 4 KiB reads as zero, which means "no extended capabilities".
const BYTES: usize = 256;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// What identifies a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class and subclass.
    pub class: u16,
    /// Revision.
    pub revision: u8,
    /// Subsystem ID; the subsystem vendor is the vendor.
    pub subsystem: u16,
}

/// The one memory BAR of a function: 32-bit, not prefetchable, at a place that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBar {
    /// Guest-physical address, a multiple of `bytes`.
    pub start: u32,
    /// Length, a power of two of at least 16.
    pub bytes: u32,
}

/// Registers of one function. A guest can change only the bits that were declared writable.
///
/// A BAR answers the sizing probe (all ones written, size mask read), but whatever else is written, it reads
/// as its fixed address again. So nothing can be moved over RAM or over another device.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    bar: Option<MemoryBar>,
    sizing: bool,
    last_capability: Option<usize>,
    free: usize,
}

impl ConfigSpace {
    /// A function without interrupt pin. One with a BAR decodes it from the start, as firmware would leave it.
    pub fn new(identity: Identity, bar: Option<MemoryBar>) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            bar,
            sizing: false,
            last_capability: None,
            free: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, 0]);
        space.put(0x0a, &identity.class.to_le_bytes());
        space.put(SUBSYSTEM, &identity.vendor.to_le_bytes());
        space.put(SUBSYSTEM.saturating_add(2), &identity.subsystem.to_le_bytes());
        if bar.is_some() {
            space.put(COMMAND, &[COMMAND_MEMORY]);
            // The third bit is "interrupt disable", which Linux sets when it turns to MSI-X.
            space.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_MASTER, 1 << 2]);
        }
        space
    }

    /// Appends a capability; `body` is what follows the ID and the link. Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.free;
        self.put(at, &[id, 0]);
        self.put(at.saturating_add(2), body);
        self.free = at
            .saturating_add(2)
            .saturating_add(body.len())
            .next_multiple_of(4);
        let link = self
            .last_capability
            .map_or(CAPABILITIES, |last| last.saturating_add(1));
        self.put(link, &[u8::try_from(at).unwrap_or(0)]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_capability = Some(at);
        at
    }

    /// Lets the guest change the bits of `mask` at `at`.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to |= from;
        }
    }

    /// Sets bytes, whether or not the guest may.
    pub fn put(&mut self, at: usize, value: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
    }

    /// The little-endian register of `len` bytes (at most 8) at `at`.
    pub fn get(&self, at: usize, len: usize) -> u64 {
        let end = at.saturating_add(len);
        self.bytes.get(at..end).map_or(0, from_le)
    }

    /// True if the guest lets the function decode its BAR.
    pub fn memory_enabled(&self) -> bool {
        self.get(COMMAND, 1) & u64::from(COMMAND_MEMORY) != 0
    }

    /// A guest's read of an aligned register.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        data.fill(0);
        if let Some(bar) = self.bar
            && at & !3 == BAR0
        {
            let value = if self.sizing {
                bar.bytes.wrapping_neg()
            } else {
                bar.start
            };
            to_le(u64::from(value).checked_shr(shift(at)).unwrap_or(0), data);
            return;
        }
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *to = *from;
        }
    }

    /// A guest's write to an aligned register.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        if at & !3 == BAR0 {
            // Low bits are type bits, which probes may or may not set.
            self.sizing = data.len() == 4 && from_le(data) >> 4 == 0x0fff_ffff;
            return;
        }
        let masks = self.writable.iter().skip(at);
        for ((to, from), mask) in self.bytes.iter_mut().skip(at).zip(data).zip(masks) {
            *to = (*to & !mask) | (from & mask);
        }
    }
}

fn shift(at: usize) -> u32 {
    u32::try_from(at & 3).unwrap_or(0).saturating_mul(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x0200,
            revision: 1,
            subsystem: 0x41,
        };
        let bar = MemoryBar {
            start: 0xc000_8000,
            bytes: 0x8000,
        };
        ConfigSpace::new(identity, Some(bar))
    }

    fn read32(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_can_be_sized_but_not_moved() {
        let mut space = space();
        let cases = [
            ("sizing", 0xffff_ffff, 0xffff_8000),
            ("sizing without type bits", 0xffff_fff0, 0xffff_8000),
            ("restored", 0xc000_8000, 0xc000_8000),
            ("moved over RAM", 0x0000_8000, 0xc000_8000),
            ("moved over ECAM", 0xe000_0000, 0xc000_8000),
        ];
        for (name, written, expected) in cases {
            space.write(BAR0, &u32::to_le_bytes(written));
            assert_eq!(read32(&space, BAR0), expected, "{name}");
        }
        for other in (0x14..0x28).step_by(4).chain([0x30]) {
            space.write(other, &[0xff; 4]);
            assert_eq!(read32(&space, other), 0, "BAR at {other:#x}");
        }
    }

    #[test]
    fn only_declared_bits_change() {
        let mut space = space();
        let before: Vec<u32> = (0..256).step_by(4).map(|at| read32(&space, at)).collect();
        for at in (0..256).step_by(4).filter(|at| *at != BAR0) {
            space.write(at, &[0xff; 4]);
        }
        for (at, old) in (0..256).step_by(4).zip(before) {
            let expected = if at == COMMAND { old | 0x0406 } else { old };
            assert_eq!(read32(&space, at), expected, "register {at:#x}");
        }
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read32(&space, 0x34), 0x40);
        assert_eq!(read32(&space, first), 0x0201_4809);
        assert_eq!(read32(&space, second) & 0xffff, 0x0011);
        assert_eq!(space.get(STATUS, 1), 0x10);
    }
}
