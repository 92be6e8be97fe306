//! What a guest reads and writes: the BAR, and the registers of the function, one of which is a window onto the BAR.

use std::time::Instant;

use super::common::Request;
use super::config::{NOTIFY_BYTES, Part};
use super::{Core, State, VirtioPci};
use crate::bus::BusDevice;
use crate::pci::root::PciFunction;

impl Core {
    fn read_bar(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match Part::at(offset, data.len()) {
            Part::Common(at) => {
                self.settle(state);
                state.registers.read(at, data);
            }
            Part::Isr(0) if data.len() == 1 => data.fill(self.msix.take_isr()),
            Part::Device(at) => {
                data.fill(0);
                state.device.read_config(at, data);
            }
            Part::Vectors(at) => self.msix.read_table(at, data),
            Part::Pending(at) => self.msix.read_pending(at, data),
            Part::Notify(_) | Part::Isr(_) | Part::Nothing => {}
        }
    }

    fn write_bar(&self, state: &mut State, offset: u64, data: &[u8]) {
        match Part::at(offset, data.len()) {
            // Nothing that a driver sets before it has seen the reset take place would outlive it.
            Part::Common(_) | Part::Device(_) if state.resetting.is_some() => {}
            Part::Common(at) => match state.registers.write(at, data) {
                Some(Request::Reset) => {
                    state.resetting = Some(Instant::now());
                    self.stop(state);
                    self.msix.forget();
                }
                Some(Request::Start) => self.start(state),
                None => {}
            },
            Part::Notify(at) if at.is_multiple_of(NOTIFY_BYTES) => {
                let queue = usize::try_from(at / NOTIFY_BYTES).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    let _ = kick.write(1);
                }
            }
            Part::Device(at) => {
                state.device.write_config(at, data);
                state.registers.config_changed();
            }
            Part::Vectors(at) => self.msix.write_table(at, data),
            Part::Notify(_) | Part::Isr(_) | Part::Pending(_) | Part::Nothing => {}
        }
    }
}

/// The BAR.
impl BusDevice for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut state = self.0.lock();
        if state.face.space.memory_enabled() {
            self.0.read_bar(&mut state, offset, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.0.lock();
        if state.face.space.memory_enabled() {
            self.0.write_bar(&mut state, offset, data);
        }
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        let mut state = self.0.lock();
        state.face.space.read(at, data);
        if let Some(window) = state.face.window(at) {
            let mut value = [0; 4];
            if let Some(part) = value.get_mut(..window.len) {
                self.0.read_bar(&mut state, window.offset, part);
            }
            for (to, from) in data.iter_mut().zip(value) {
                *to = from;
            }
        }
    }

    fn write_config(&mut self, at: usize, data: &[u8]) {
        let mut state = self.0.lock();
        state.face.space.write(at, data);
        if let Some(window) = state.face.window(at)
            && let Some(part) = data.get(..window.len)
        {
            self.0.write_bar(&mut state, window.offset, part);
        }
        let (enabled, masked) = state.face.msix_control();
        self.0.msix.set_control(enabled, masked);
    }
}
