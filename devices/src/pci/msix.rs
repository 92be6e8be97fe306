//! MSI-X (PCI Local Bus 3.0, "MSI-X Capability and Table Structure"): the table and the pending bits of one
//! function, and the seam through which a message reaches the guest.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::kvm::vm::MsiMessage;
use vmm_sys_util::eventfd::EventFd;

use super::{from_le, to_le};

/// Bytes of one table entry.
const ENTRY_BYTES: u64 = 16;
/// Mask bit of an entry's last word, "Vector Control for MSI-X Table Entries".
const ENTRY_MASKED: u32 = 1;
/// The only place where a message is an interrupt (Intel SDM vol. 3, "Message Address Register Format").
const LOCAL_APICS: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// Interrupt lines of the VM, each of which stands for one message. Implemented over KVM and by tests.
pub trait Interrupts: Send + Sync + std::fmt::Debug {
    /// Points `line` at `message`, or at nothing.
    ///
    /// # Errors
    /// The kernel's.
    fn route(&self, line: u32, message: Option<MsiMessage>) -> io::Result<()>;
    /// An event whose every write raises `line`; non-blocking. Called until it has succeeded once per line.
    ///
    /// # Errors
    /// The kernel's.
    fn connect(&self, line: u32) -> io::Result<EventFd>;
}

/// The interrupts of one function. Shared between the thread that raises them and the vCPUs that program them.
#[derive(Debug)]
pub struct Msix {
    table: Mutex<Table>,
    interrupts: Arc<dyn Interrupts>,
    first_line: u32,
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
    /// Causes raised while MSI-X was off, for the ISR register.
    isr: u8,
    /// The host refused an interrupt; said once.
    complained: bool,
}

#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// Connected at first use, because a machine has more vectors than it needs.
    line: Option<Line>,
}

#[derive(Debug)]
struct Line {
    event: EventFd,
    /// What the kernel was told; it is told again only after a change.
    routed: Option<MsiMessage>,
}

impl Msix {
    /// A function with `count` vectors, on the lines from `first_line`.
    pub fn new(count: u16, first_line: u32, interrupts: Arc<dyn Interrupts>) -> Self {
        let vector = || Vector {
            message: MsiMessage::default(),
            masked: true,
            pending: false,
            line: None,
        };
        Self {
            table: Mutex::new(Table {
                enabled: false,
                masked: false,
                vectors: std::iter::repeat_with(vector).take(usize::from(count)).collect(),
                isr: 0,
                complained: false,
            }),
            interrupts,
            first_line,
        }
    }

    /// Raises `vector` for `cause`, an ISR bit. A masked vector becomes pending; one that does not exist, or
    /// whose message is no interrupt, is dropped. While MSI-X is off, only the cause is kept.
    pub fn raise(&self, vector: u16, cause: u8) {
        let mut table = self.lock();
        if !table.enabled {
            table.isr |= cause;
            return;
        }
        let masked = table.masked;
        if let Some(entry) = table.vectors.get_mut(usize::from(vector)) {
            entry.pending = true;
            if !masked {
                self.deliver(&mut table, usize::from(vector));
            }
        }
    }

    /// Returns and clears the causes.
    pub fn take_isr(&self) -> u8 {
        std::mem::take(&mut self.lock().isr)
    }

    /// Forgets what was raised and not delivered; the device was reset.
    pub fn forget(&self) {
        let mut table = self.lock();
        table.isr = 0;
        for vector in &mut table.vectors {
            vector.pending = false;
        }
    }

    /// The guest wrote the enable and function mask bits.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        let mut table = self.lock();
        table.enabled = enabled;
        table.masked = masked;
        if enabled && !masked {
            for index in 0..table.vectors.len() {
                self.deliver(&mut table, index);
            }
        }
    }

    /// A guest's read of the table; accesses other than words and double words read as ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_whole(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (at, part) in (offset..).step_by(4).zip(data.chunks_mut(4)) {
            if let Some(vector) = table.index(at).and_then(|index| table.vectors.get(index)) {
                to_le(u64::from(vector.word(at)), part);
            }
        }
    }

    /// A guest's write to the table; accesses other than words and double words are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_whole(offset, data.len()) {
            return;
        }
        let mut table = self.lock();
        for (at, part) in (offset..).step_by(4).zip(data.chunks(4)) {
            let Some(index) = table.index(at) else { return };
            if let Some(vector) = table.vectors.get_mut(index) {
                vector.set_word(at, u32::try_from(from_le(part)).unwrap_or(0));
            }
            if table.enabled && !table.masked {
                self.deliver(&mut table, index);
            }
        }
    }

    /// A guest's read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_whole(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (byte, to) in (offset..).zip(data) {
            let first = usize::try_from(byte.saturating_mul(8)).unwrap_or(usize::MAX);
            let bits = table.vectors.iter().skip(first).take(8).rev();
            *to = bits.fold(0, |bits, vector| (bits << 1) | u8::from(vector.pending));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the message of vector `index`, if that is pending and not masked.
    fn deliver(&self, table: &mut Table, index: usize) {
        let Some(vector) = table.vectors.get_mut(index).filter(|v| v.pending && !v.masked) else {
            return;
        };
        vector.pending = false;
        if !LOCAL_APICS.contains(&vector.message.address) {
            return;
        }
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let line = self.first_line.saturating_add(number);
        let Err(error) = vector.send(line, self.interrupts.as_ref()) else {
            return;
        };
        // It stays pending, so that the next one may bring it along.
        vector.pending = true;
        if !std::mem::replace(&mut table.complained, true) {
            log::error!("interrupt line {line} is lost, its device may hang: {error}");
        }
    }
}

impl Table {
    fn index(&self, offset: u64) -> Option<usize> {
        let index = usize::try_from(offset / ENTRY_BYTES).ok()?;
        (index < self.vectors.len()).then_some(index)
    }
}

impl Vector {
    fn word(&self, offset: u64) -> u32 {
        let [low, high] = halves(self.message.address);
        match offset % ENTRY_BYTES {
            0 => low,
            4 => high,
            8 => self.message.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_word(&mut self, offset: u64, value: u32) {
        let [low, high] = halves(self.message.address);
        match offset % ENTRY_BYTES {
            0 => self.message.address = join(value, high),
            4 => self.message.address = join(low, value),
            8 => self.message.data = value,
            _ => self.masked = value & ENTRY_MASKED != 0,
        }
    }

    fn send(&mut self, number: u32, interrupts: &dyn Interrupts) -> io::Result<()> {
        let line = match &mut self.line {
            Some(line) => line,
            empty => empty.insert(Line {
                event: interrupts.connect(number)?,
                routed: None,
            }),
        };
        if line.routed != Some(self.message) {
            interrupts.route(number, Some(self.message))?;
            line.routed = Some(self.message);
        }
        line.event.write(1)
    }
}

/// The specification allows accesses of 4 and 8 bytes to table and pending bits.
fn is_whole(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn halves(address: u64) -> [u32; 2] {
    let low = u32::try_from(address & u64::from(u32::MAX)).unwrap_or(0);
    [low, u32::try_from(address >> 32).unwrap_or(0)]
}

fn join(low: u32, high: u32) -> u64 {
    (u64::from(high) << 32) | u64::from(low)
}
