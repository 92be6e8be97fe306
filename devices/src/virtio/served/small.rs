//! The small devices: console, entropy, power button.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use super::super::console::VirtioConsole;
use super::super::input::{PowerButton, VirtioPowerButton};
use super::super::mock::memory;
use super::super::rng::VirtioRng;
use super::*;
use crate::console::Console;

const SLOT: u64 = 256;

/// Does what all three drivers do: gives buffers, and takes them back when interrupted.
struct Driver {
    rings: Vec<Ring>,
    world: World,
    /// What the guest got.
    got: Vec<u8>,
    /// Bytes that the guest sent.
    sent: usize,
}

/// What is behind the device.
enum World {
    Entropy,
    Button { button: PowerButton, pressed: bool },
    Console(Terminal),
}

/// A screen that shows what the guest sends, and somebody who types.
struct Terminal {
    keyboard: Option<PipeWriter>,
    typed: usize,
    screen: PipeReader,
    shown: usize,
}

impl Terminal {
    /// Reads at most `count` bytes; true if anything came.
    fn look(&mut self, count: usize, with: &Schedule) -> bool {
        let mut bytes = [0; 4096];
        let Ok(count) = self.screen.read(&mut bytes[..count.min(4096)]) else {
            return false;
        };
        if bytes[..count] != pattern(self.shown as u64, count) {
            with.wrong(|| "other bytes are shown than the guest sent".into());
        }
        self.shown += count;
        count != 0
    }
}

impl Driver {
    /// Buffers that the device fills, in rings that have such.
    fn fill(&mut self) {
        let ring = &mut self.rings[0];
        while let Some(head) = ring.next() {
            ring.add(&[(ring.at(head), 64, true)]);
        }
        ring.kick();
    }

    fn complete(&mut self, queue: usize, with: &Schedule) {
        let entropy = matches!(self.world, World::Entropy);
        let ring = &mut self.rings[queue];
        loop {
            ring.disable();
            while let Some((head, len)) = ring.get() {
                if queue == 0 {
                    self.got.extend(ring.read(ring.at(head), len as usize));
                }
            }
            if ring.enable() {
                break;
            }
        }
        if queue == 0 && !entropy {
            self.fill();
        }
        if let World::Console(terminal) = &self.world
            && self.got != pattern(0, self.got.len())
        {
            with.wrong(|| format!("the guest got other bytes than the {} typed", terminal.typed));
        }
    }
}

impl Outside for Driver {
    fn rings(&mut self) -> &mut Vec<Ring> {
        &mut self.rings
    }

    fn begin(&mut self, _: &Schedule) {
        if !matches!(self.world, World::Entropy) {
            self.fill();
        }
    }

    fn drive(&mut self, with: &Schedule) {
        let count = with.one(&[1, 2, 20, 40]);
        let entropy = matches!(self.world, World::Entropy);
        let ring = self.rings.last_mut().unwrap();
        with.tell(|| format!("guest offers {count}"));
        for _ in 0..count {
            let Some(head) = ring.next() else { break };
            // The console keeps 64 KiB for whoever does not look.
            let bytes = pattern(self.sent as u64, 64);
            if !entropy {
                ring.write(ring.at(head), &bytes);
                self.sent += bytes.len();
            }
            ring.add(&[(ring.at(head), 64, entropy)]);
        }
        ring.kick();
    }

    fn interrupt(&mut self, queue: usize, with: &Schedule) {
        self.complete(queue, with);
    }

    fn host(&mut self, with: &Schedule) {
        match &mut self.world {
            World::Entropy => {}
            World::Button { button, pressed } => {
                with.tell(|| "the button is pressed".into());
                button.press();
                *pressed = true;
            }
            World::Console(terminal) => {
                let count = with.one(&[1, 100, 5000, 20_000]);
                if with.pick(2) == 0 {
                    with.tell(|| format!("somebody looks at {count}"));
                    terminal.look(count, with);
                } else if let Some(keyboard) = &mut terminal.keyboard {
                    with.tell(|| format!("somebody types {count}"));
                    let bytes = pattern(terminal.typed as u64, count);
                    terminal.typed += keyboard.write(&bytes).unwrap_or(0);
                }
            }
        }
    }

    fn answer(&mut self, with: &Schedule) -> bool {
        match &mut self.world {
            World::Console(terminal) => terminal.look(4096, with),
            _ => false,
        }
    }

    fn left(&mut self) -> Option<String> {
        let unused = self.rings.last().unwrap().unused();
        match &self.world {
            World::Console(terminal) if self.got.len() != terminal.typed => Some(format!(
                "{} of {} bytes typed arrive",
                self.got.len(),
                terminal.typed
            )),
            World::Console(terminal) if terminal.shown != self.sent => Some(format!(
                "{} of {} bytes sent are shown",
                terminal.shown, self.sent
            )),
            World::Button { pressed: true, .. } if self.got.is_empty() => {
                Some("nobody hears of the button".into())
            }
            World::Button { .. } if !self.got.len().is_multiple_of(32) => Some("half a press".into()),
            _ => (unused != 0).then(|| format!("{unused} buffers are not used")),
        }
    }

    fn end(&mut self, with: &Schedule) {
        for queue in 0..self.rings.len() {
            let ring = &mut self.rings[queue];
            let unused = usize::from(ring.unused());
            if queue == 0 && ring.size() != 0 && !matches!(self.world, World::Entropy) {
                while let Some((head, len)) = ring.get() {
                    self.got.extend(ring.read(ring.at(head), len as usize));
                }
            } else if queue == 1 {
                self.sent -= unused * 64;
            }
        }
        if matches!(self.world, World::Button { .. }) {
            // A press that was cut short comes again, as a whole.
            self.got.truncate(self.got.len() / 32 * 32);
        }
        with.tell(|| format!("the guest got {} bytes", self.got.len()));
    }
}

/// A console on two pipes, or one whose input is a file that holds what will be typed.
fn console(with: &Schedule) -> (Console, Terminal) {
    let (screen, output) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&screen, true).unwrap();
    let mut terminal = Terminal {
        keyboard: None,
        typed: 0,
        screen,
        shown: 0,
    };
    let console = if with.pick(3) == 0 {
        let mut file =
            File::from(rustix::fs::memfd_create("typed", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        terminal.typed = with.one(&[1, 30_000]);
        file.write_all(&pattern(0, terminal.typed)).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        Console::on_pipes(&file, &output, (80, 25))
    } else {
        let (input, keyboard) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&keyboard, true).unwrap();
        terminal.keyboard = Some(keyboard);
        Console::on_pipes(&input, &output, (80, 25))
    };
    (console, terminal)
}

fn wired(with: &Schedule) -> Wired {
    let (mem, lines) = (memory().0, Arc::new(Lines::default()));
    let size = with.one(&[2, 8, 16]);
    let mut device_console = None;
    let (device, world, queues): (Box<dyn super::super::device::VirtioDevice>, _, _) = match with.pick(4) {
        0 => (Box::new(VirtioRng::new().unwrap()), World::Entropy, 1),
        1 => {
            let (device, button) = VirtioPowerButton::new().unwrap();
            let pressed = false;
            (Box::new(device), World::Button { button, pressed }, 2)
        }
        _ => {
            let (console, terminal) = console(with);
            device_console = Some(console.clone());
            (Box::new(VirtioConsole::new(console)), World::Console(terminal), 2)
        }
    };
    // More than one round of the console or the entropy device.
    let size = if queues == 1 || device_console.is_some() {
        size * 4
    } else {
        size
    };
    let ring = |queue: u16| {
        let base = 0x10_0000 + u64::from(queue) * 0x10_0000;
        Ring::new(&mem, &lines, queue, base, size, SLOT)
    };
    let driver = Driver {
        rings: (0..queues).map(ring).collect(),
        world,
        got: vec![],
        sent: 0,
    };
    Wired {
        device,
        outside: Box::new(driver),
        mem,
        lines,
        features: 0,
        console: device_console,
        rest: REST,
    }
}

#[test]
fn no_small_device_forgets() {
    search("small devices", 500, &wired);
}
