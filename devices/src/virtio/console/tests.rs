use std::io::PipeWriter;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::mock::{MockRing, WRITE, activation, memory, pages};
use super::*;
use crate::console::ConsoleSpec;
use arch::mem::Visibility;

struct Rig {
    device: VirtioConsole,
    receive: MockRing,
    transmit: MockRing,
    keyboard: PipeWriter,
    screen: std::io::PipeReader,
}

impl Rig {
    fn new() -> Self {
        let (mem, _) = memory();
        let (input, keyboard) = std::io::pipe().unwrap();
        let (screen, output) = std::io::pipe().unwrap();
        Self {
            device: VirtioConsole::new(Console::on_pipes(&input, &output, (132, 43))),
            receive: MockRing::new(&mem, 0x10_0000, 64),
            transmit: MockRing::new(&mem, 0x40_0000, 64),
            keyboard,
            screen,
        }
    }

    fn start(&mut self) -> Box<dyn Running> {
        let (with, _) = activation(&self.receive.mem, &[&self.receive, &self.transmit], F_SIZE);
        self.device.activate(with).unwrap()
    }

    fn type_in(&mut self, bytes: &[u8]) {
        self.keyboard.write_all(bytes).unwrap();
        while ready(self.device.console.descriptor()) {
            self.device.console.service();
        }
    }

    fn turn(&self, running: &mut dyn Running) -> bool {
        let ready = ready(self.device.backend().unwrap());
        if ready {
            running.on_backend().unwrap();
        }
        ready
    }

    fn shown(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.screen.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Bytes that arrived in buffers at `at`, in order.
    fn arrived(&mut self, at: &[u64]) -> Vec<u8> {
        let mut all = vec![];
        for at in at {
            let Some((_, len)) = self.receive.take_used() else {
                break;
            };
            all.extend(self.receive.read(*at, len as usize));
        }
        all
    }
}

fn ready(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).unwrap() != 0
}

#[test]
fn output_of_a_kick_is_on_the_screen_when_it_returns() {
    let mut rig = Rig::new();
    let mut running = rig.start();
    rig.transmit.send(&[b"log", b"in: "], &[]);
    rig.transmit.send(&[b"x"], &[]);
    running.on_kick(1).unwrap();
    assert_eq!(rig.shown(8), b"login: x");
    assert_eq!(std::iter::from_fn(|| rig.transmit.take_used()).count(), 2);
}

#[test]
fn a_flood_of_output_is_taken_in_bounded_rounds() {
    let mut rig = Rig::new();
    rig.device = VirtioConsole::new(Console::open(&ConsoleSpec::Null).unwrap());
    let mut running = rig.start();
    for _ in 0..60 {
        rig.transmit.send(&[b"spam"], &[]);
    }
    running.on_kick(1).unwrap();
    let mut taken = vec![std::iter::from_fn(|| rig.transmit.take_used()).count()];
    while rig.turn(&mut *running) {
        taken.push(std::iter::from_fn(|| rig.transmit.take_used()).count());
    }
    assert_eq!(taken, [16, 16, 16, 12]);
}

#[test]
fn a_huge_buffer_is_cut() {
    let mut rig = Rig::new();
    let mut running = rig.start();
    rig.transmit.descriptor(0, 0x80_0000, 8 << 20, 0, 0);
    rig.transmit.offer(0);
    running.on_kick(1).unwrap();
    assert_eq!(rig.transmit.take_used(), Some((0, 0)));
    assert_eq!(rig.shown(64 << 10).len(), 64 << 10);
    rig.device.console.service();
    assert_eq!(rustix::io::ioctl_fionread(&rig.screen).unwrap(), 0, "no more");
    assert_eq!(rig.device.console.dropped(), 0);
}

#[test]
fn input_arrives_in_the_buffers_there_are_and_the_rest_waits() {
    let mut rig = Rig::new();
    let mut running = rig.start();
    let first = rig.receive.send(&[], &[4]).1[0];
    running.on_kick(0).unwrap();
    rig.type_in(b"hello world");
    assert!(rig.turn(&mut *running));
    assert_eq!(rig.arrived(&[first]), b"hell");
    assert!(!rig.turn(&mut *running), "no spinning without buffers");
    let second = rig.receive.send(&[], &[4]).1[0];
    let third = rig.receive.send(&[], &[64]).1[0];
    running.on_kick(0).unwrap();
    assert_eq!(rig.arrived(&[second, third]), b"o world");
}

#[test]
fn input_before_the_driver_and_after_a_reset_is_not_lost() {
    let mut rig = Rig::new();
    rig.type_in(b"early");
    let mut running = rig.start();
    let at = rig.receive.send(&[], &[64]).1[0];
    assert!(rig.turn(&mut *running));
    assert_eq!(rig.arrived(&[at]), b"early");
    drop(running);
    rig.type_in(b"late");
    let mut buf = [0; 8];
    let mut line = rig.device.console.clone();
    assert_eq!(crate::serial::SerialLine::receive(&mut line, &mut buf), 4);
}

#[test]
fn much_input_is_served_in_bounded_rounds_without_loss() {
    let mut rig = Rig::new();
    let mut running = rig.start();
    let at: Vec<u64> = (0..60).map(|_| rig.receive.send(&[], &[16]).1[0]).collect();
    let typed: Vec<u8> = (0..=250_u8).cycle().take(900).collect();
    rig.type_in(&typed);
    let (mut all, mut seen) = (vec![], 0);
    while rig.turn(&mut *running) {
        let round = rig.arrived(&at[seen..]);
        assert!(round.len() <= 16 * 16);
        seen += round.len().div_ceil(16);
        all.extend(round);
    }
    assert_eq!(all, typed);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_queue() {
    let mut rig = Rig::new();
    let mut running = rig.start();
    rig.receive.send(&[b"odd"], &[]);
    rig.type_in(b"x");
    assert!(running.on_backend().is_err());
}

#[test]
fn output_from_private_memory_is_refused() {
    let (mem, visible) = memory();
    let mut ring = MockRing::new(&mem, 0x40_0000, 64);
    let other = MockRing::new(&mem, 0x10_0000, 64);
    let (with, _) = activation(&mem, &[&other, &ring], 0);
    let mut device = VirtioConsole::new(Console::open(&ConsoleSpec::Null).unwrap());
    let mut running = device.activate(with).unwrap();
    visible.set(pages(0x80_0000, 0x1000), Visibility::Private);
    for (head, flags) in [(0, 0), (1, WRITE)] {
        ring.descriptor(head, 0x80_0800, 16, flags, 0);
        ring.offer(head);
        assert!(running.on_kick(1).is_err());
    }
}

#[test]
fn the_size_is_offered_only_where_there_is_one() {
    let rig = Rig::new();
    let mut data = [0; 12];
    rig.device.read_config(0, &mut data);
    assert_eq!(
        (rig.device.features(), &data[..4]),
        (F_SIZE, &[132, 0, 43, 0][..])
    );
    let device = VirtioConsole::new(Console::open(&ConsoleSpec::Null).unwrap());
    device.read_config(0, &mut data);
    assert_eq!((device.features(), data[0]), (0, 0));
}
