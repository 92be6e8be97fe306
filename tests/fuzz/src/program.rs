//! A guest program in a byte code: one byte says what to do, operands follow. Every sequence of bytes is a
//! program; one that ends early finds zeros.

use crate::guest::{BUFFERS, Buffer, Guest, QUEUES, descriptor};
use crate::input::Input;
use crate::machine::{BAR, CONFIG, HIGH, HIGH_END, LOW_END, Machine};
use crate::peer::Host;

/// Things that one program may do.
const STEPS: usize = 400;
/// Most pages that one conversion moves.
const PAGES: u8 = 8;

/// What a program can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Offers a chain in the way of a good driver.
    Request,
    /// Writes one descriptor, with any content.
    Descriptor,
    /// Offers any head.
    Offer,
    /// Sets the index of an available ring.
    Index,
    /// Writes to memory.
    Poke,
    /// Kicks.
    Kick,
    /// Moves pages to the other side.
    Convert,
    /// Writes a register of the BAR.
    Write,
    /// Reads one.
    Read,
    /// Writes or reads the configuration space.
    Config,
    /// Resets the device and sets it up again.
    SetUp,
    /// Something happens outside.
    Outside,
    /// Wakes the device without reason.
    Event,
    /// Takes used chains back.
    Recycle,
    /// Offers a request as the device type has them.
    Typical,
}

use Op::*;

/// What each code means for a driver of rings.
pub const DRIVER: [Op; 16] = [
    Typical, Request, Descriptor, Offer, Index, Poke, Kick, Convert, Write, Read, Config, SetUp, Outside,
    Event, Recycle, Typical,
];
/// What each code means for one that is after registers.
pub const REGISTERS: [Op; 16] = [
    Write, Write, Read, Config, Config, Kick, Convert, Event, Poke, SetUp, Outside, Offer, Request, Recycle,
    Write, Descriptor,
];

/// What each code means for a driver that keeps to the rules of the ring.
pub const PACKETS: [Op; 16] = [
    Typical, Typical, Typical, Typical, Outside, Outside, Outside, Recycle, Typical, Typical, Typical,
    Typical, Outside, Outside, Kick, Recycle,
];

/// The machine and the driver that a program runs on.
pub struct Run {
    /// The machine.
    pub machine: Machine,
    /// The driver.
    pub guest: Guest,
}

/// Runs a program of a driver that has set the device up.
pub fn run(data: &[u8], host: impl Fn() -> Host) {
    let mut input = Input::new(data);
    let machine = Machine::new(host());
    let mut run = Run {
        guest: Guest::set_up(&machine, u64::MAX, 16, 0),
        machine,
    };
    run.set_up(&mut input);
    run.all(&mut input, &DRIVER);
}

/// Runs a program that sends and receives, with good rings throughout.
pub fn run_packets(data: &[u8], host: impl Fn() -> Host) {
    let machine = Machine::new(host());
    let mut run = Run {
        guest: Guest::set_up(&machine, u64::MAX, 64, 0),
        machine,
    };
    run.all(&mut Input::new(data), &PACKETS);
}

/// Runs a program that finds the device as it was made.
pub fn run_raw(data: &[u8], host: impl Fn() -> Host) {
    let machine = Machine::new(host());
    let mut run = Run {
        guest: Guest::set_up(&machine, u64::MAX, 4, 0),
        machine,
    };
    run.machine.set(BAR + 0x14, &[0]);
    run.guest.honest = false;
    run.all(&mut Input::new(data), &REGISTERS);
}

impl Run {
    fn all(&mut self, input: &mut Input<'_>, codes: &[Op; 16]) {
        self.machine.settle();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            self.step(codes[usize::from(input.u8() & 15)], input);
            self.machine.settle();
        }
        self.machine.check();
        self.still_works();
    }

    /// Whatever a guest did, the next driver has a working device.
    fn still_works(&mut self) {
        self.machine.show(0, LOW_END);
        self.machine.show(HIGH, HIGH_END - HIGH);
        self.guest = Guest::set_up(&self.machine, u64::MAX, 16, 0);
        self.machine.settle();
        let probe = self.machine.host.probe;
        probe(self);
    }

    fn step(&mut self, op: Op, input: &mut Input<'_>) {
        match op {
            Request => self.request(input),
            Typical => self.typical(input),
            Descriptor => self.descriptor(input),
            Offer => {
                let (queue, head) = (queue(input), input.u16());
                self.broken(queue, |ring, machine| ring.offer(machine, head));
            }
            Index => {
                let (queue, index) = (queue(input), input.u16());
                self.broken(queue, |ring, machine| ring.set_available(machine, index));
            }
            Poke => {
                let at = self.address(input);
                let count = usize::from(input.u8());
                self.guest.honest &= (BUFFERS..LOW_END - 256).contains(&at);
                self.machine.write(at, input.take(count));
            }
            Kick => self.guest.kick(&self.machine, queue(input)),
            Convert => self.convert(input),
            Write => {
                let (at, len, value) = (register(input), length(input), input.u64());
                self.guest.honest = false;
                self.machine.set(at, &value.to_le_bytes()[..len]);
            }
            Read => {
                let (at, len) = (register(input), length(input));
                self.machine.get(at, len);
            }
            Config => {
                let (at, len, value) = (u64::from(input.u16()), length(input), input.u64());
                let at = CONFIG.wrapping_add(at).wrapping_sub(0x8000) & !(1 << 14);
                self.guest.honest = false;
                self.machine.set(at, &value.to_le_bytes()[..len]);
                self.machine.get(at, len);
            }
            SetUp => self.set_up(input),
            Outside => self.machine.host.outside.act(input),
            Event => {
                let source = input.u8();
                // The last sixteen are sources that do not exist, and the backend.
                let base = if source < 0xf0 { 0 } else { 0xff00 };
                self.machine.event(base | u16::from(source));
            }
            Recycle => {
                self.guest.recycle(&self.machine, queue(input));
            }
        }
    }

    fn set_up(&mut self, input: &mut Input<'_>) {
        let (how, without, mask) = (input.u8(), input.u8(), input.u64());
        let size = 1 << (4 ^ (how & 7));
        // Most masks leave most features.
        let wanted = if how & 8 == 0 { !mask } else { mask };
        self.machine.show(0, BUFFERS);
        self.guest = Guest::set_up(
            &self.machine,
            wanted,
            size,
            if how & 16 == 0 { 0 } else { without },
        );
        if how & 32 == 0 {
            Guest::set_up_interrupts(&self.machine);
        }
    }

    fn request(&mut self, input: &mut Input<'_>) {
        let (queue, shape) = (queue(input), input.u8());
        let mut buffers = vec![];
        for _ in 0..shape & 3 {
            let (len, literal) = (
                usize::from(input.u16() & 0x7ff) + 1,
                usize::from(input.u8() & 0x3f),
            );
            let mut bytes = input.take(literal.min(len)).to_vec();
            bytes.resize(len, 0xab);
            buffers.push(Buffer::Readable(bytes));
        }
        for _ in 0..(shape >> 2) & 3 {
            buffers.push(Buffer::Writable(u32::from(input.u16() & 0x3fff) + 1));
        }
        self.guest.send(&self.machine, queue, &buffers, shape & 16 != 0);
        if shape & 32 == 0 {
            self.guest.kick(&self.machine, queue);
        }
    }

    fn typical(&mut self, input: &mut Input<'_>) {
        let how = input.u8();
        let typical = self.machine.host.typical;
        let (queue, buffers) = typical(input);
        self.guest.send(&self.machine, queue, &buffers, how & 1 != 0);
        if how & 2 == 0 {
            self.guest.kick(&self.machine, queue);
        }
        if how & 4 == 0 {
            self.machine.settle();
            self.guest.recycle(&self.machine, queue);
        }
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let (queue, index) = (queue(input), u64::from(input.u8()));
        let at = self.address(input);
        let (len, flags, next) = (input.u32(), input.u16(), input.u16());
        // Small numbers are the interesting ones, but a byte may make them large.
        let len = if flags & 0x8000 == 0 { len & 0xffff } else { len };
        self.broken(queue, |ring, machine| {
            machine.write(ring.table() + index * 16, &descriptor(at, len, flags & 7, next));
        });
    }

    fn broken(&mut self, queue: u16, f: impl FnOnce(&mut crate::guest::Ring, &Machine)) {
        self.guest.honest = false;
        if let Some(ring) = self.guest.rings.get_mut(usize::from(queue)) {
            f(ring, &self.machine);
        }
    }

    fn convert(&mut self, input: &mut Input<'_>) {
        let (page, how) = (u64::from(input.u8()), input.u8());
        let pages = u64::from(how & (PAGES - 1)) + 1;
        let start = match page.checked_sub(LOW_END >> 12) {
            None => page << 12,
            Some(page) => HIGH + (page << 12),
        };
        self.guest.honest = false;
        if how & 0x80 == 0 {
            self.machine.hide(start, pages << 12);
        } else {
            self.machine.show(start, pages << 12);
        }
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        let (kind, offset) = (input.u8(), u64::from(input.u16()));
        let ring = self.guest.rings.get(usize::from(kind >> 4));
        match kind & 15 {
            0..=3 => BUFFERS + offset,
            4 => ring.map_or(0, |ring| ring.table()) + offset,
            5 => ring.map_or(0, |ring| ring.avail()) + offset,
            6 => ring.map_or(0, |ring| ring.used()) + offset,
            7 => LOW_END.saturating_sub(offset),
            8 => HIGH + offset,
            9 => HIGH_END.saturating_sub(offset),
            10 => LOW_END + offset,
            11 => BAR + offset,
            12 => CONFIG + offset,
            13 => u64::MAX - offset,
            14 => offset << 32,
            _ => input.u64(),
        }
    }
}

fn queue(input: &mut Input<'_>) -> u16 {
    u16::from(input.u8()) % (QUEUES + 1)
}

fn length(input: &mut Input<'_>) -> usize {
    usize::from(input.u8() & 7) + 1
}

/// A register of the BAR, more often one of the common structure than its share.
fn register(input: &mut Input<'_>) -> u64 {
    let at = input.u16();
    BAR + u64::from(if at & 0x8000 == 0 { at & 0x3f } else { at & 0x7fff })
}
