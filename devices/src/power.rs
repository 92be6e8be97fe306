//! Power ports: the ACPI sleep and reset registers of a hardware-reduced machine (ACPI 6.5, "Sleep Control and
//! Status Registers" and "Reset Register"), and one port on which the boot shim reports.

use crate::bus::BusDevice;

/// First port of the block.
pub const PORT: u64 = 0x600;
/// Ports in the block.
pub const PORTS: u64 = 8;
/// `SLP_TYP` of the S5 state; the `_S5_` package in the DSDT says the same.
pub const SLP_TYP_S5: u8 = 5;
/// `RESET_VALUE` of the FADT.
pub const RESET_VALUE: u8 = 1;

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;
const SHIM: u64 = 4;
const SLP_EN: u8 = 1 << 5;
const SHIM_TERMINATED: u32 = 1 << 31;
const SHIM_RELEASE_STAGING: u32 = 1;

/// What the guest asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Soft off (S5).
    Off,
    /// Reset.
    Reboot,
    /// The boot shim refused to go on, for this reason (31 bits).
    ShimTerminated(u32),
    /// The boot shim has copied the payload; the host may free the staging memory.
    ReleaseStaging,
}

/// The power ports. Of `Off`, `Reboot` and `ShimTerminated` only the first is reported, and `ReleaseStaging`
/// once, so a guest that keeps writing costs its own time only.
pub struct PowerPorts {
    report: Box<dyn FnMut(PowerEvent) + Send>,
    ended: bool,
    released: bool,
}

impl std::fmt::Debug for PowerPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerPorts")
            .field("ended", &self.ended)
            .field("released", &self.released)
            .finish_non_exhaustive()
    }
}

impl PowerPorts {
    /// Ports that call `report`, at most twice, on the thread of the vCPU that wrote. It must not block.
    pub fn new(report: Box<dyn FnMut(PowerEvent) + Send>) -> Self {
        Self {
            report,
            ended: false,
            released: false,
        }
    }

    fn end(&mut self, event: PowerEvent) {
        if !std::mem::replace(&mut self.ended, true) {
            (self.report)(event);
        }
    }

    fn shim(&mut self, value: u32) {
        if value & SHIM_TERMINATED != 0 {
            self.end(PowerEvent::ShimTerminated(value & !SHIM_TERMINATED));
        } else if value == SHIM_RELEASE_STAGING && !std::mem::replace(&mut self.released, true) {
            (self.report)(PowerEvent::ReleaseStaging);
        }
    }
}

impl BusDevice for PowerPorts {
    /// Both sleep registers read as zero: nothing is in progress and the machine never wakes from S5.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (SLEEP_CONTROL | SLEEP_STATUS, [byte]) = (offset, data) {
            *byte = 0;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, &[byte]) if byte & SLP_EN != 0 && (byte >> 2) & 7 == SLP_TYP_S5 => {
                self.end(PowerEvent::Off);
            }
            (RESET, &[RESET_VALUE]) => self.end(PowerEvent::Reboot),
            (SHIM, &[a, b, c, d]) => self.shim(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn events(writes: &[(u64, &[u8])]) -> Vec<PowerEvent> {
        let (sender, receiver) = mpsc::channel();
        let mut ports = PowerPorts::new(Box::new(move |event| sender.send(event).unwrap()));
        for (offset, data) in writes {
            ports.write(*offset, data);
        }
        drop(ports);
        receiver.iter().collect()
    }

    #[test]
    fn each_request_is_reported() {
        let cases: [(u64, &[u8], PowerEvent); 5] = [
            (0, &[0x34], PowerEvent::Off),
            (0, &[!0x08], PowerEvent::Off),
            (2, &[1], PowerEvent::Reboot),
            (4, &[1, 0, 0, 0], PowerEvent::ReleaseStaging),
            (4, &[0x21, 0x43, 0, 0x80], PowerEvent::ShimTerminated(0x4321)),
        ];
        for (offset, data, event) in cases {
            assert_eq!(events(&[(offset, data)]), [event], "{offset} {data:x?}");
        }
    }

    #[test]
    fn other_values_sizes_and_ports_do_nothing() {
        let cases: [(u64, &[u8]); 13] = [
            (0, &[0x14]),
            (0, &[0x20]),
            (0, &[0x3c]),
            (0, &[0x34, 0]),
            (0, &[]),
            (1, &[0x34]),
            (2, &[0]),
            (2, &[6]),
            (2, &[1, 0]),
            (4, &[1]),
            (4, &[1, 0, 0, 0, 0, 0, 0, 0]),
            (4, &[2, 0, 0, 0]),
            (5, &[1, 0, 0, 0]),
        ];
        for (offset, data) in cases {
            assert_eq!(events(&[(offset, data)]), [], "{offset} {data:x?}");
        }
    }

    #[test]
    fn a_storm_is_reported_once() {
        let mut writes: Vec<(u64, &[u8])> = vec![(4, &[1, 0, 0, 0]); 100];
        writes.extend(vec![(2_u64, [1].as_slice()); 100]);
        writes.extend(vec![(0_u64, [0x34].as_slice()); 100]);
        assert_eq!(events(&writes), [PowerEvent::ReleaseStaging, PowerEvent::Reboot]);
    }

    #[test]
    fn sleep_registers_read_as_idle_and_the_rest_as_undriven() {
        let mut ports = PowerPorts::new(Box::new(|_| {}));
        for (offset, expected) in [(0, 0), (1, 0), (2, 0xff), (4, 0xff), (7, 0xff)] {
            let mut data = [0xff];
            ports.read(offset, &mut data);
            assert_eq!(data, [expected], "offset {offset}");
        }
        let mut wide = [0xff; 2];
        ports.read(0, &mut wide);
        assert_eq!(wide, [0xff; 2]);
    }
}
