//! The small devices: console, entropy, power button.

use std::io::{PipeReader, PipeWriter, Read, Write};

use super::super::console::VirtioConsole;
use super::super::device::VirtioDevice;
use super::super::input::{PowerButton, VirtioPowerButton};
use super::super::mock::{MockRing, activation};
use super::super::rng::VirtioRng;
use super::*;
use crate::console::Console;

const FIRST: u64 = 0x10_0000;
const SECOND: u64 = 0x40_0000;

/// Kicks `queues`, then lets the backend work once.
fn kick(running: &mut dyn Running, queues: &[usize], mem: &SharedMem) -> Result<(), QueueBroken> {
    for queue in queues {
        let _batch = mem.batch();
        running.on_kick(*queue)?;
    }
    let _batch = mem.batch();
    running.on_backend()
}

fn nothing(_: &mut Outside) -> Vec<u8> {
    vec![]
}

fn entropy(memory: &Memory) -> (Subject, Vec<Lie>) {
    let mut ring = MockRing::new(&memory.driver, FIRST, 16);
    let (with, _) = activation(&memory.device, &[&ring], 0);
    let running = VirtioRng::new().unwrap().activate(with).unwrap();
    ring.send(&[], &[100, 5000]);
    let subject = Subject {
        rings: vec![ring],
        running: Some(running),
        work: |running, outside| kick(running, &[0], outside.downcast_ref().unwrap()),
        outside: Box::new(memory.driver.clone()),
        effect: nothing,
        // What is random is not compared.
        buffers: vec![],
    };
    (subject, vec![])
}

struct Finger {
    mem: SharedMem,
    _button: PowerButton,
}

fn press(memory: &Memory) -> (Subject, Vec<Lie>) {
    let mut events = MockRing::new(&memory.driver, FIRST, 16);
    let mut status = MockRing::new(&memory.driver, SECOND, 16);
    let (with, _) = activation(&memory.device, &[&events, &status], 0);
    let (mut device, button) = VirtioPowerButton::new().unwrap();
    let running = device.activate(with).unwrap();
    let buffers = (0..4).map(|_| (events.send(&[], &[8]).1[0], 8)).collect();
    status.send(&[&[17, 0, 0, 0, 1, 0, 0, 0]], &[]);
    button.press();
    let subject = Subject {
        rings: vec![events, status],
        running: Some(running),
        work: |running, outside| {
            let finger: &Finger = outside.downcast_ref().unwrap();
            kick(running, &[0, 1], &finger.mem)
        },
        outside: Box::new(Finger {
            mem: memory.driver.clone(),
            _button: button,
        }),
        effect: nothing,
        buffers,
    };
    (subject, vec![])
}

struct Terminal {
    mem: SharedMem,
    console: Console,
    screen: PipeReader,
    _keyboard: PipeWriter,
}

fn terminal(memory: &Memory) -> (Subject, Vec<Lie>) {
    let mut receive = MockRing::new(&memory.driver, FIRST, 16);
    let mut transmit = MockRing::new(&memory.driver, SECOND, 16);
    let (input, mut keyboard) = std::io::pipe().unwrap();
    let (screen, output) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&screen, true).unwrap();
    let console = Console::on_pipes(&input, &output, (80, 25));
    keyboard.write_all(b"typed by somebody").unwrap();
    console.service();
    let (with, _) = activation(&memory.device, &[&receive, &transmit], 1);
    let running = VirtioConsole::new(console.clone()).activate(with).unwrap();
    let (_, at) = receive.send(&[], &[8, 100]);
    transmit.send(&[b"shown to ", b"somebody"], &[]);
    let subject = Subject {
        rings: vec![receive, transmit],
        running: Some(running),
        work: |running, outside| {
            let terminal: &Terminal = outside.downcast_ref().unwrap();
            kick(running, &[1, 0], &terminal.mem)
        },
        outside: Box::new(Terminal {
            mem: memory.driver.clone(),
            console,
            screen,
            _keyboard: keyboard,
        }),
        effect: |outside| {
            let terminal: &mut Terminal = outside.downcast_mut().unwrap();
            terminal.console.flush();
            let mut shown = vec![];
            let _ = terminal.screen.read_to_end(&mut shown);
            shown
        },
        buffers: vec![(at[0], 8), (at[1], 100)],
    };
    (subject, vec![])
}

#[test]
fn small_devices_withstand_memory_that_lies() {
    check("entropy", &entropy);
    check("button", &press);
    check("console", &terminal);
}
