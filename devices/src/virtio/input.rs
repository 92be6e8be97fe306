//! Input device (virtio 1.2, "Input Device") as a power button. A stock guest's logind or acpid shuts down in
//! order when it is pressed, and it needs no ACPI interrupt.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::mem::SharedMem;

use super::device::{Activation, Running, VirtioDevice};
use super::queue::{QueueBroken, VirtQueue};
use super::serve::{copy_fields, serve};
use crate::wake::Wake;

const NAME: &[u8] = b"cvmm power button";
const SERIAL: &[u8] = b"power0";
/// `struct virtio_input_devids`: `BUS_VIRTUAL`, vendor, product, version, each a `le16`.
const DEVICE_IDS: [u8; 8] = [6, 0, 0xf4, 0x1a, 18, 0, 1, 0];

const CFG_ID_NAME: u8 = 0x01;
const CFG_ID_SERIAL: u8 = 0x02;
const CFG_ID_DEVIDS: u8 = 0x03;
const CFG_EV_BITS: u8 = 0x11;
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// Bit 116: the only key there is.
const KEYS: [u8; 15] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 << (KEY_POWER % 8)];

const EVENTS: usize = 0;
const STATUS: usize = 1;
/// Status events (lamps; there are none) per wake-up.
const STATUS_EVENTS: usize = 16;

/// Presses the button, from any thread. A press before the driver is up waits for it; presses that the guest has
/// not seen yet are one.
#[derive(Clone, Debug)]
pub struct PowerButton(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Readable when the running device has something to do.
    wake: Wake,
    pressed: AtomicBool,
}

impl PowerButton {
    /// Asks the guest for an orderly power-off.
    pub fn press(&self) {
        self.0.pressed.store(true, Ordering::SeqCst);
        self.0.wake.signal();
    }
}

/// A keyboard with one key.
#[derive(Debug)]
pub struct VirtioPowerButton {
    button: PowerButton,
    select: u8,
    subselect: u8,
}

impl VirtioPowerButton {
    /// A device without a driver, and the handle that presses it.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<(Self, PowerButton)> {
        let button = PowerButton(Arc::new(Shared {
            wake: Wake::new()?,
            pressed: AtomicBool::new(false),
        }));
        let device = Self {
            button: button.clone(),
            select: 0,
            subselect: 0,
        };
        Ok((device, button))
    }

    /// What the configuration space shows for the selection; empty if there is no such thing.
    fn selected(&self) -> &'static [u8] {
        match (self.select, self.subselect) {
            (CFG_ID_NAME, 0) => NAME,
            (CFG_ID_SERIAL, 0) => SERIAL,
            (CFG_ID_DEVIDS, 0) => &DEVICE_IDS,
            (CFG_EV_BITS, kind) if u16::from(kind) == EV_KEY => &KEYS,
            _ => &[],
        }
    }
}

impl VirtioDevice for VirtioPowerButton {
    fn id(&self) -> u32 {
        18
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    /// `struct virtio_input_config`: select, subsel, size, five reserved bytes, the selected data.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let selected = self.selected();
        let size = u8::try_from(selected.len()).unwrap_or(0);
        let mut fields = vec![self.select, self.subselect, size, 0, 0, 0, 0, 0];
        fields.extend(selected);
        copy_fields(&fields, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            match at {
                0 => self.select = *byte,
                1 => self.subselect = *byte,
                _ => {}
            }
        }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.button.0.wake.as_fd())
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        let mut queues = with.queues.into_iter();
        Ok(Box::new(RunningButton {
            mem: with.mem,
            events: queues.next().flatten(),
            status: queues.next().flatten(),
            pending: VecDeque::new(),
            button: self.button.clone(),
        }))
    }
}

/// `struct virtio_input_event`: type, code, value.
fn event(kind: u16, code: u16, value: u32) -> [u8; 8] {
    let word = u64::from(kind) | u64::from(code) << 16 | u64::from(value) << 32;
    word.to_le_bytes()
}

struct RunningButton {
    mem: SharedMem,
    events: Option<VirtQueue>,
    status: Option<VirtQueue>,
    /// Events of one press that the guest has no buffers for yet.
    pending: VecDeque<[u8; 8]>,
    button: PowerButton,
}

impl Drop for RunningButton {
    /// A press that did not get through is for the next driver.
    fn drop(&mut self) {
        if !self.pending.is_empty() {
            self.button.press();
        }
    }
}

impl RunningButton {
    fn deliver(&mut self) -> Result<(), QueueBroken> {
        let Some(queue) = &mut self.events else {
            return Ok(());
        };
        while let Some(event) = self.pending.front() {
            let Some(chain) = queue.pop(&self.mem)? else {
                if queue.enable_kicks(&self.mem)? {
                    continue;
                }
                break;
            };
            if chain.writable_bytes() < 8 {
                return Err(chain.bad_shape(queue.index()));
            }
            let mut writer = chain.writer(&self.mem);
            // Memory that turned private: the event is lost, which the guest asked for.
            let _ = writer.write_all(event);
            let written = u32::try_from(writer.moved()).unwrap_or(0);
            queue.push(&self.mem, chain.head(), written)?;
            self.pending.pop_front();
        }
        queue.notify(&self.mem)
    }

    fn ignore_status(&mut self) -> Result<(), QueueBroken> {
        if let Some(queue) = &mut self.status
            && serve(queue, &self.mem, STATUS_EVENTS, |_| Ok(0))?
        {
            self.button.0.wake.signal();
        }
        Ok(())
    }
}

impl Running for RunningButton {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        match queue {
            EVENTS => self.deliver(),
            STATUS => self.ignore_status(),
            _ => Ok(()),
        }
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.button.0.wake.clear();
        let pressed = self.button.0.pressed.swap(false, Ordering::SeqCst);
        if pressed && self.pending.is_empty() {
            let press = [
                event(EV_KEY, KEY_POWER, 1),
                event(EV_SYN, 0, 0),
                event(EV_KEY, KEY_POWER, 0),
                event(EV_SYN, 0, 0),
            ];
            self.pending.extend(press);
        }
        self.deliver()?;
        self.ignore_status()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock::{MockRing, activation, memory};
    use super::*;

    const PRESS: [[u8; 8]; 4] = [
        [1, 0, 116, 0, 1, 0, 0, 0],
        [0; 8],
        [1, 0, 116, 0, 0, 0, 0, 0],
        [0; 8],
    ];

    struct Rig {
        device: VirtioPowerButton,
        button: PowerButton,
        events: MockRing,
        status: MockRing,
    }

    impl Rig {
        fn new() -> Self {
            let (mem, _) = memory();
            let (device, button) = VirtioPowerButton::new().unwrap();
            Self {
                device,
                button,
                events: MockRing::new(&mem, 0x10_0000, 16),
                status: MockRing::new(&mem, 0x20_0000, 16),
            }
        }

        fn start(&mut self) -> Box<dyn Running> {
            let (with, _) = activation(&self.events.mem, &[&self.events, &self.status], 0);
            self.device.activate(with).unwrap()
        }

        /// What the transport does when the descriptor is readable; false if it is not.
        fn turn(&self, running: &mut dyn Running) -> bool {
            let ready = self.button.0.wake.clear() != 0;
            if ready {
                self.button.0.wake.signal();
                running.on_backend().unwrap();
            }
            ready
        }

        fn used(&mut self, at: &[u64]) -> Vec<Vec<u8>> {
            let used = std::iter::from_fn(|| self.events.take_used()).count();
            at[..used].iter().map(|at| self.events.read(*at, 8)).collect()
        }
    }

    fn config(device: &VirtioPowerButton, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        device.read_config(0, &mut data);
        data
    }

    #[test]
    fn a_press_is_key_down_and_key_up() {
        let mut rig = Rig::new();
        let mut running = rig.start();
        let at: Vec<u64> = (0..8).map(|_| rig.events.send(&[], &[8]).1[0]).collect();
        running.on_kick(0).unwrap();
        assert!(rig.used(&at).is_empty());
        rig.button.press();
        assert!(rig.turn(&mut *running));
        assert_eq!(rig.used(&at), PRESS);
        assert!(!rig.turn(&mut *running));
    }

    #[test]
    fn a_press_waits_for_the_driver_and_for_buffers() {
        let mut rig = Rig::new();
        rig.button.press();
        let mut running = rig.start();
        assert!(rig.turn(&mut *running));
        let mut seen = vec![];
        for _ in 0..4 {
            let at = rig.events.send(&[], &[4, 4]).1;
            running.on_kick(0).unwrap();
            assert_eq!(rig.events.take_used().map(|(_, len)| len), Some(8));
            seen.push([rig.events.read(at[0], 4), rig.events.read(at[1], 4)].concat());
            // Impatience adds nothing.
            rig.button.press();
            rig.turn(&mut *running);
        }
        assert_eq!(seen, PRESS);
    }

    #[test]
    fn a_press_that_did_not_get_through_survives_a_reset() {
        let mut rig = Rig::new();
        let mut running = rig.start();
        rig.button.press();
        rig.turn(&mut *running);
        drop(running);
        rig.events = MockRing::new(&rig.events.mem, 0x30_0000, 16);
        let mut running = rig.start();
        let at: Vec<u64> = (0..4).map(|_| rig.events.send(&[], &[8]).1[0]).collect();
        assert!(rig.turn(&mut *running));
        assert_eq!(rig.used(&at), PRESS);
    }

    #[test]
    fn too_small_a_buffer_breaks_the_queue() {
        for writable in [&[][..], &[7]] {
            let mut rig = Rig::new();
            let mut running = rig.start();
            rig.events.send(&[b"readable"], writable);
            rig.button.press();
            assert!(running.on_backend().is_err());
        }
    }

    #[test]
    fn status_events_come_back_unread_in_bounded_rounds() {
        let mut rig = Rig::new();
        rig.status = MockRing::new(&rig.events.mem, 0x20_0000, 64);
        let mut running = rig.start();
        for _ in 0..40 {
            rig.status.send(&[&[0; 8]], &[]);
        }
        running.on_kick(1).unwrap();
        let mut rounds = vec![std::iter::from_fn(|| rig.status.take_used()).count()];
        while rig.turn(&mut *running) {
            rounds.push(std::iter::from_fn(|| rig.status.take_used()).count());
        }
        assert_eq!(rounds, [16, 16, 8]);
    }

    #[test]
    fn the_selection_decides_what_the_configuration_shows() {
        let cases: [(u8, u8, &[u8]); 9] = [
            (0x01, 0, b"cvmm power button"),
            (0x02, 0, b"power0"),
            (0x03, 0, &[6, 0, 0xf4, 0x1a, 18, 0, 1, 0]),
            (0x11, 1, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]),
            (0x11, 0, &[]),
            (0x11, 3, &[]),
            (0x10, 0, &[]),
            (0x12, 0, &[]),
            (0xff, 0xff, &[]),
        ];
        let (mut device, _) = VirtioPowerButton::new().unwrap();
        for (select, subselect, shown) in cases {
            device.write_config(0, &[select]);
            device.write_config(1, &[subselect]);
            let mut expected = vec![
                select,
                subselect,
                u8::try_from(shown.len()).unwrap(),
                0,
                0,
                0,
                0,
                0,
            ];
            expected.extend(shown);
            expected.resize(136, 0);
            assert_eq!(config(&device, 136), expected);
        }
    }

    #[test]
    fn writes_elsewhere_change_nothing() {
        let (mut device, _) = VirtioPowerButton::new().unwrap();
        device.write_config(0, &[1, 0]);
        let before = config(&device, 136);
        for (offset, len) in [(2, 8), (8, 4), (135, 8), (u64::MAX, 8), (u64::MAX - 3, 8), (0, 0)] {
            device.write_config(offset, &vec![0xaa; len]);
            assert_eq!(config(&device, 136), before, "{offset:#x}+{len}");
        }
    }
}
