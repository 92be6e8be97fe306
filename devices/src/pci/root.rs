//! The root: bus 0, reached through ECAM only (PCI Express 4.0, "Enhanced Configuration Access Mechanism").

use super::config::{ConfigSpace, Identity, MemoryBar};
use super::{WINDOW_BYTES, WINDOW_START};
use crate::bus::BusDevice;

/// Length of every BAR. The first slot's lies at the start of the window and there are no gaps, because a guest
/// that removes a function and scans the bus again looks for the lowest place that is free: it finds the same.
pub const BAR_BYTES: u32 = 0x8000;
/// Interrupt lines of each slot.
pub const LINES_PER_SLOT: u32 = 64;
const SLOTS: u8 = 32;
const _: () = assert!(BAR_BYTES as u64 * SLOTS as u64 <= WINDOW_BYTES);

/// A function as the root sees it.
pub trait PciFunction: Send {
    /// Fills `data` (1, 2 or 4 bytes, aligned) from the register at `at`, below 4096.
    fn read_config(&mut self, at: usize, data: &mut [u8]);
    /// Takes a write to the register at `at`.
    fn write_config(&mut self, at: usize, data: &[u8]);
}

/// Bus 0 has no free slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no PCI slot is free: a machine takes at most 31 devices; remove some")]
pub struct BusFull;

/// What a slot gives to its function. All of it follows from the slot number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Device number, 1 to 31.
    pub number: u8,
    /// Place of the BAR.
    pub bar: MemoryBar,
    /// First of [`LINES_PER_SLOT`] interrupt lines (KVM's GSI numbers).
    pub first_line: u32,
}

impl Slot {
    fn new(number: u8) -> Self {
        let before = u64::from(number.saturating_sub(1));
        let bar_offset = before.saturating_mul(u64::from(BAR_BYTES));
        Self {
            number,
            bar: MemoryBar {
                start: u32::try_from(WINDOW_START.saturating_add(bar_offset)).unwrap_or(u32::MAX),
                bytes: BAR_BYTES,
            },
            first_line: u32::from(number).saturating_mul(LINES_PER_SLOT),
        }
    }
}

/// Bus 0. Slot 0 holds the host bridge.
pub struct PciRoot {
    functions: Vec<Box<dyn PciFunction>>,
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciRoot")
            .field("functions", &self.functions.len())
            .finish()
    }
}

impl Default for PciRoot {
    fn default() -> Self {
        Self {
            functions: vec![Box::new(HostBridge::new())],
        }
    }
}

impl PciRoot {
    /// The slot that the next [`attach`](Self::attach) fills.
    ///
    /// # Errors
    /// There is none left.
    pub fn next_slot(&self) -> Result<Slot, BusFull> {
        u8::try_from(self.functions.len())
            .ok()
            .filter(|number| *number < SLOTS)
            .map(Slot::new)
            .ok_or(BusFull)
    }

    /// Puts a function into the next slot.
    ///
    /// # Errors
    /// There is none left.
    pub fn attach(&mut self, function: Box<dyn PciFunction>) -> Result<Slot, BusFull> {
        let slot = self.next_slot()?;
        self.functions.push(function);
        Ok(slot)
    }

    /// The function and register that an access to ECAM names, if it is one that hardware would take.
    fn decode(&mut self, offset: u64, len: usize) -> Option<(&mut dyn PciFunction, usize)> {
        if !matches!(len, 1 | 2 | 4) || !offset.is_multiple_of(len as u64) {
            return None;
        }
        let function_of_device = (offset >> 12) & 7;
        let device = usize::try_from(offset >> 15).ok()?;
        let register = usize::try_from(offset & 0xfff).ok()?;
        let function = self
            .functions
            .get_mut(device)
            .filter(|_| function_of_device == 0)?;
        Some((function.as_mut(), register))
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.decode(offset, data.len()) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.decode(offset, data.len()) {
            function.write_config(register, data);
        }
    }
}

/// Function 00:00.0, which exists to be found.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // Red Hat's generic PCIe host bridge, which no operating system has a driver or quirk for.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x0600,
            revision: 0,
            subsystem: 0x1100,
        };
        Self(ConfigSpace::new(identity, None))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        self.0.read(at, data);
    }

    fn write_config(&mut self, at: usize, data: &[u8]) {
        self.0.write(at, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_functions_and_odd_accesses_read_as_ones() {
        let mut root = PciRoot::default();
        let cases: &[(&str, u64, usize, u64)] = &[
            ("host bridge ID", 0, 4, 0x0008_1b36),
            ("host bridge class", 0x0a, 2, 0x0600),
            ("one byte", 0x0b, 1, 0x06),
            ("extended space", 0x100, 4, 0),
            ("last register", 0xffc, 4, 0),
            ("function 1", 0x1000, 4, 0xffff_ffff),
            ("device 1", 0x8000, 4, 0xffff_ffff),
            ("last device", 0xf_8000, 2, 0xffff),
            ("end of ECAM", 0xf_fffc, 4, 0xffff_ffff),
            ("unaligned", 0x1, 2, 0xffff),
            ("crossing registers", 0x2, 4, 0xffff_ffff),
            ("three bytes", 0x0, 3, 0xff_ffff),
            ("eight bytes", 0x0, 8, u64::MAX),
        ];
        for &(name, offset, len, expected) in cases {
            let mut data = [0; 8];
            root.read(offset, &mut data[..len]);
            assert_eq!(u64::from_le_bytes(data), expected, "{name}");
            root.write(offset, &[0xff; 8][..len]);
            let mut again = [0; 8];
            root.read(offset, &mut again[..len]);
            assert_eq!(again, data, "{name} after a write");
        }
    }

    #[test]
    fn slots_are_deterministic_disjoint_and_end() {
        let mut root = PciRoot::default();
        let mut slots = vec![];
        while let Ok(slot) = root.attach(Box::new(HostBridge::new())) {
            slots.push(slot);
        }
        assert_eq!(slots.len(), 31);
        assert_eq!(root.next_slot(), Err(BusFull));
        assert_eq!((slots[0].bar.start, slots[0].first_line), (0xc000_0000, 64));
        for pair in slots.windows(2) {
            assert_eq!(pair[0].bar.start + pair[0].bar.bytes, pair[1].bar.start);
            assert_eq!(pair[0].first_line + 64, pair[1].first_line);
        }
        let last = slots[30].bar;
        assert!(u64::from(last.start + last.bytes) <= WINDOW_START + WINDOW_BYTES);
    }
}
