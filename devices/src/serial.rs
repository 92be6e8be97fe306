//! A 16550A without an interrupt line (National Semiconductor PC16550D data sheet, "Registers"). The guest polls
//! it. Linux polls through the interrupt identification register, so that one follows the enabled conditions
//! although nothing is ever raised.

use std::collections::VecDeque;

use crate::bus::BusDevice;

/// First port of the early console.
pub const PORT: u64 = 0x3f8;
/// Ports of one UART.
pub const PORTS: u64 = 8;
/// Bytes in the receive FIFO; more than the original's 16, so that a slow poller sees a line at a time.
const FIFO: usize = 64;

const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_ALL: u8 = 0x0f;
const IIR_NONE: u8 = 1;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVE: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_FIFOS: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
const LCR_DLAB: u8 = 1 << 7;
const MCR_ALL: u8 = 0x1f;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 2;
/// The transmitter is always empty.
const LSR_IDLE: u8 = 0x60;
/// Carrier, data set ready, clear to send: a cable with somebody at the other end.
const MSR_CONNECTED: u8 = 0xb0;

/// The other end of the cable. Both methods return at once.
pub trait SerialLine: Send {
    /// Takes bytes that the guest sent.
    fn send(&mut self, bytes: &[u8]);
    /// Fills `buf` with bytes for the guest; returns how many, zero if there are none now.
    fn receive(&mut self, buf: &mut [u8]) -> usize;
}

/// The UART.
pub struct Serial {
    line: Box<dyn SerialLine>,
    input: VecDeque<u8>,
    overrun: bool,
    /// An interrupt "transmitter empty" that the guest has not read yet.
    transmitted: bool,
    fifos: bool,
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial")
            .field("ier", &self.ier)
            .field("lcr", &self.lcr)
            .field("mcr", &self.mcr)
            .field("input", &self.input.len())
            .finish_non_exhaustive()
    }
}

impl Serial {
    /// A UART after reset, at 9600 baud as far as the guest can tell.
    pub fn new(line: Box<dyn SerialLine>) -> Self {
        Self {
            line,
            input: VecDeque::new(),
            overrun: false,
            transmitted: false,
            fifos: false,
            ier: 0,
            lcr: 3,
            mcr: 0,
            scratch: 0,
            divisor: [12, 0],
        }
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn latched(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    /// Takes bytes from the line once the guest has read all that it had. In loop-back mode they wait outside.
    fn fill(&mut self) {
        if self.input.is_empty() && !self.looped() {
            let mut buf = [0; FIFO];
            let count = self.line.receive(&mut buf);
            self.input.extend(buf.iter().take(count));
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.transmitted = true;
        if !self.looped() {
            self.line.send(&[byte]);
        } else if self.input.len() < FIFO {
            self.input.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    fn receive(&mut self) -> u8 {
        self.fill();
        self.input.pop_front().unwrap_or(0)
    }

    fn interrupt(&mut self) -> u8 {
        self.fill();
        let cause = if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVE != 0 && !self.input.is_empty() {
            IIR_RECEIVE
        } else if self.ier & IER_TRANSMIT != 0 && std::mem::take(&mut self.transmitted) {
            IIR_TRANSMIT
        } else {
            IIR_NONE
        };
        cause | if self.fifos { IIR_FIFOS } else { 0 }
    }

    fn line_status(&mut self) -> u8 {
        self.fill();
        let data = if self.input.is_empty() { 0 } else { LSR_DATA };
        let overrun = if std::mem::take(&mut self.overrun) {
            LSR_OVERRUN
        } else {
            0
        };
        LSR_IDLE | data | overrun
    }

    /// In loop-back mode the four outputs of the modem control register come back as inputs.
    fn modem_status(&self) -> u8 {
        if !self.looped() {
            return MSR_CONNECTED;
        }
        let (dtr, rts, outs) = (self.mcr & 1, (self.mcr >> 1) & 1, (self.mcr >> 2) & 3);
        (rts << 4) | (dtr << 5) | (outs << 6)
    }

    fn enable(&mut self, ier: u8) {
        if ier & !self.ier & IER_TRANSMIT != 0 {
            self.transmitted = true;
        }
        self.ier = ier & IER_ALL;
    }

    fn control_fifos(&mut self, fcr: u8) {
        let enable = fcr & FCR_ENABLE != 0;
        if enable != self.fifos || fcr & FCR_CLEAR_RECEIVE != 0 {
            self.input.clear();
        }
        self.fifos = enable;
    }
}

impl BusDevice for Serial {
    /// Registers are bytes; wider reads see an undriven bus.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [byte] = data else { return };
        *byte = match (offset, self.latched()) {
            (0, true) => self.divisor[0],
            (1, true) => self.divisor[1],
            (0, false) => self.receive(),
            (1, false) => self.ier,
            (2, _) => self.interrupt(),
            (3, _) => self.lcr,
            (4, _) => self.mcr,
            (5, _) => self.line_status(),
            (6, _) => self.modem_status(),
            (7, _) => self.scratch,
            _ => return,
        };
    }

    /// Registers are bytes; wider writes are dropped.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[byte] = data else { return };
        match (offset, self.latched()) {
            (0, true) => self.divisor[0] = byte,
            (1, true) => self.divisor[1] = byte,
            (0, false) => self.transmit(byte),
            (1, false) => self.enable(byte),
            (2, _) => self.control_fifos(byte),
            (3, _) => self.lcr = byte,
            (4, _) => self.mcr = byte & MCR_ALL,
            (7, _) => self.scratch = byte,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Cable(Arc<Mutex<(Vec<u8>, VecDeque<u8>)>>);

    impl SerialLine for Cable {
        fn send(&mut self, bytes: &[u8]) {
            self.0.lock().unwrap().0.extend(bytes);
        }
        fn receive(&mut self, buf: &mut [u8]) -> usize {
            let input = &mut self.0.lock().unwrap().1;
            let count = input.len().min(buf.len());
            buf[..count].copy_from_slice(&input.drain(..count).collect::<Vec<_>>());
            count
        }
    }

    fn uart() -> (Serial, Cable) {
        let cable = Cable::default();
        (Serial::new(Box::new(cable.clone())), cable)
    }

    fn get(uart: &mut Serial, offset: u64) -> u8 {
        let mut data = [0xff];
        uart.read(offset, &mut data);
        data[0]
    }

    fn put(uart: &mut Serial, offset: u64, byte: u8) {
        uart.write(offset, &[byte]);
    }

    #[test]
    fn linux_autoconfig_finds_a_16550a() {
        let (mut uart, _) = uart();
        put(&mut uart, 1, 0);
        assert_eq!(get(&mut uart, 1) & 0xf, 0);
        put(&mut uart, 1, 0xf);
        assert_eq!(get(&mut uart, 1) & 0xf, 0xf);
        put(&mut uart, 1, 0);
        put(&mut uart, 4, 0x1a);
        assert_eq!(get(&mut uart, 6) & 0xf0, 0x90);
        put(&mut uart, 4, 0);
        put(&mut uart, 3, 0xbf);
        put(&mut uart, 2, 0);
        put(&mut uart, 3, 0);
        put(&mut uart, 2, 1);
        assert_eq!(get(&mut uart, 2) >> 6, 3, "FIFOs work");
        for not_a_16650 in [0x80, 0xbf] {
            put(&mut uart, 3, not_a_16650);
            assert_ne!(get(&mut uart, 2), 0);
        }
        put(&mut uart, 3, 0);
        put(&mut uart, 1, 0x40);
        assert_eq!(get(&mut uart, 1), 0, "not an XScale");
    }

    #[test]
    fn output_goes_out_at_once_and_the_transmitter_is_always_empty() {
        let (mut uart, cable) = uart();
        put(&mut uart, 0, b'x');
        assert_eq!(cable.0.lock().unwrap().0, b"x");
        assert_eq!(get(&mut uart, 5), 0x60);
    }

    #[test]
    fn input_is_taken_without_loss_whatever_its_length() {
        let (mut uart, cable) = uart();
        let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
        cable.0.lock().unwrap().1.extend(&sent);
        let mut got = vec![];
        while get(&mut uart, 5) & LSR_DATA != 0 {
            got.push(get(&mut uart, 0));
        }
        assert_eq!(got, sent);
        assert_eq!(get(&mut uart, 0), 0);
    }

    #[test]
    fn loop_back_overruns_at_its_bound_and_says_so_once() {
        let (mut uart, cable) = uart();
        put(&mut uart, 4, MCR_LOOP);
        for _ in 0..1000 {
            put(&mut uart, 0, b'y');
        }
        assert_eq!(get(&mut uart, 5), 0x63);
        assert_eq!(get(&mut uart, 5), 0x61);
        let mut count = 0;
        while get(&mut uart, 5) & LSR_DATA != 0 {
            assert_eq!(get(&mut uart, 0), b'y');
            count += 1;
        }
        assert_eq!(count, 64);
        assert_eq!(cable.0.lock().unwrap().0, b"");
    }

    #[test]
    fn a_poller_of_the_interrupt_register_sees_enabled_conditions() {
        let (mut uart, cable) = uart();
        assert_eq!(get(&mut uart, 2), IIR_NONE);
        put(&mut uart, 1, IER_TRANSMIT);
        assert_eq!(get(&mut uart, 2), IIR_TRANSMIT);
        assert_eq!(get(&mut uart, 2), IIR_NONE);
        put(&mut uart, 0, b'z');
        assert_eq!(get(&mut uart, 2), IIR_TRANSMIT);
        cable.0.lock().unwrap().1.extend(b"a");
        assert_eq!(get(&mut uart, 2), IIR_NONE, "receive is not enabled");
        put(&mut uart, 1, IER_RECEIVE);
        assert_eq!(get(&mut uart, 2), IIR_RECEIVE);
        assert_eq!(get(&mut uart, 0), b'a');
        assert_eq!(get(&mut uart, 2), IIR_NONE);
    }

    #[test]
    fn the_divisor_hides_behind_its_latch() {
        let (mut uart, cable) = uart();
        put(&mut uart, 3, LCR_DLAB | 3);
        put(&mut uart, 0, 1);
        put(&mut uart, 1, 2);
        assert_eq!((get(&mut uart, 0), get(&mut uart, 1)), (1, 2));
        put(&mut uart, 3, 3);
        assert_eq!((get(&mut uart, 0), get(&mut uart, 1)), (0, 0));
        assert_eq!(cable.0.lock().unwrap().0, b"");
    }

    #[test]
    fn wide_accesses_are_undriven() {
        let (mut uart, cable) = uart();
        for len in [0, 2, 3, 4, 8] {
            for offset in 0..10 {
                uart.write(offset, &vec![b'w'; len]);
                let mut data = vec![0xff; len];
                uart.read(offset, &mut data);
                assert_eq!(data, vec![0xff; len], "{offset}+{len}");
            }
        }
        assert_eq!(cable.0.lock().unwrap().0, b"");
    }

    proptest::proptest! {
        #[test]
        fn no_sequence_of_accesses_breaks_it(ops in proptest::collection::vec((0_u64..10, proptest::num::u8::ANY, proptest::bool::ANY), 0..400)) {
            let (mut uart, cable) = uart();
            cable.0.lock().unwrap().1.extend([7; 100]);
            for (offset, byte, write) in ops {
                if write { put(&mut uart, offset, byte) } else { get(&mut uart, offset); }
                assert!(uart.input.len() <= FIFO);
            }
        }
    }
}
