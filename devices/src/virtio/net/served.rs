//! Frames in both directions, with a driver that does what Linux does (drivers/net/virtio_net.c), on a small scale.

use std::collections::VecDeque;
use std::io::{Read, Write};

use rustix::net::sockopt::set_socket_send_buffer_size;

use super::super::mock::memory;
use super::super::served::{Lines, Outside, REST, Ring, Schedule, Wired, pattern, search};
use super::*;

/// A buffer of the driver, and the room for it.
const BUFFER: u32 = 1526;
const SLOT: u64 = 2048;
/// Header of a frame in memory.
const HEADER: usize = 12;
const MOST_FRAME: usize = 1514;
/// Bytes per second where there is a limit.
const RATE: u64 = 2_000_000;
/// Frames of one turn of a NAPI context.
const WEIGHT: usize = 16;

/// Frame `number` of one direction.
fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.extend(pattern(u64::from(number) * 613, len.saturating_sub(4)));
    bytes
}

/// A queue pair of the driver, and the host behind it.
struct Pair {
    rx_due: bool,
    tx_due: bool,
    stopped: bool,
    /// Memory ran out before all buffers were there; the rest comes later.
    short: bool,
    /// Frames that the guest offered and the host did not get.
    outgoing: VecDeque<(u32, usize)>,
    offered: u32,
    /// Frames that the host sent and the guest did not get.
    incoming: VecDeque<(u32, usize)>,
    sent: u32,
    peer: Option<UnixStream>,
    /// What the host wrote and its socket did not take, and what it read of a frame.
    to_write: Vec<u8>,
    read: Vec<u8>,
}

impl Pair {
    fn new(peer: UnixStream) -> Self {
        Self {
            rx_due: false,
            tx_due: false,
            stopped: false,
            short: false,
            outgoing: VecDeque::new(),
            offered: 0,
            incoming: VecDeque::new(),
            sent: 0,
            peer: Some(peer),
            to_write: vec![],
            read: vec![],
        }
    }

    /// Writes what is left; true if the socket took something.
    fn flush(&mut self) -> bool {
        let mut busy = false;
        while let Some(peer) = &mut self.peer
            && !self.to_write.is_empty()
            && let Ok(count) = peer.write(&self.to_write)
        {
            self.to_write.drain(..count);
            busy = true;
        }
        busy
    }

    fn host_sends(&mut self, len: usize) {
        if self.peer.is_some() && self.to_write.len() < 100_000 {
            let bytes = frame(self.sent, len);
            self.to_write
                .extend_from_slice(&(bytes.len() as u32).to_be_bytes());
            self.to_write.extend_from_slice(&bytes);
            self.incoming.push_back((self.sent, bytes.len()));
            self.sent += 1;
            self.flush();
        }
    }

    /// Reads at most `count` bytes; true if anything came.
    fn host_reads(&mut self, count: usize, with: &Schedule) -> bool {
        let mut bytes = [0; 20_000];
        let room = &mut bytes[..count.min(20_000)];
        let Some(Ok(count)) = self.peer.as_mut().map(|peer| peer.read(room)) else {
            return false;
        };
        self.read.extend_from_slice(&bytes[..count]);
        while let Some((length, rest)) = self.read.split_first_chunk::<4>()
            && let Some(got) = rest.get(..u32::from_be_bytes(*length) as usize)
        {
            let expected = self.outgoing.pop_front();
            if expected.is_none_or(|(number, len)| got != frame(number, len)) {
                with.wrong(|| format!("the host gets another frame than {expected:?}"));
            }
            let all = got.len() + 4;
            self.read.drain(..all);
        }
        count != 0
    }
}

/// A driver of a card, and its host.
struct Card {
    rings: Vec<Ring>,
    pairs: Vec<Pair>,
    /// Pairs in use, and those that a command under way asks for.
    active: usize,
    wanted: Option<usize>,
    merges: bool,
    big: bool,
}

impl Card {
    fn control(&mut self) -> Option<&mut Ring> {
        let control = self.pairs.len() * 2;
        self.rings.get_mut(control)
    }

    /// `try_fill_recv`, which gets memory for at most `most` buffers.
    fn fill(&mut self, pair: usize, most: usize) {
        let ring = &mut self.rings[pair * 2];
        let mut left = most;
        while left != 0
            && let Some(head) = ring.next()
        {
            ring.add(&[(ring.at(head), BUFFER, true)]);
            left -= 1;
        }
        self.pairs[pair].short = ring.room() != 0;
        ring.kick();
    }

    /// One frame, if there is one.
    fn take(&mut self, pair: usize, with: &Schedule) -> bool {
        let ring = &mut self.rings[pair * 2];
        let mut buffer = || {
            let (head, len) = ring.get()?;
            Some(ring.read(ring.at(head), len as usize))
        };
        let Some(mut all) = buffer() else {
            return false;
        };
        let buffers = if self.merges { all[10] } else { 1 };
        for _ in 1..buffers {
            match buffer() {
                Some(more) => all.extend(more),
                None => with.wrong(|| "a frame without its other buffers".into()),
            }
        }
        let expected = self.pairs[pair].incoming.pop_front();
        if expected.is_none_or(|(number, len)| all[HEADER..] != frame(number, len)) {
            with.wrong(|| format!("the guest gets another frame than {expected:?}"));
        }
        true
    }

    /// `virtnet_poll`.
    fn poll_receive(&mut self, pair: usize, with: &Schedule) {
        let mut frames = 0;
        while frames < WEIGHT && self.take(pair, with) {
            frames += 1;
        }
        let ring = &self.rings[pair * 2];
        if ring.room() > WEIGHT.min(usize::from(ring.size())) / 2 {
            self.fill(pair, with.one(&[usize::MAX, usize::MAX, 1]));
        }
        self.pairs[pair].rx_due = frames == WEIGHT || !self.rings[pair * 2].enable();
        if self.pairs[pair].rx_due {
            self.rings[pair * 2].disable();
        }
    }

    /// `virtnet_poll_tx`.
    fn poll_transmit(&mut self, pair: usize) {
        let ring = &mut self.rings[pair * 2 + 1];
        ring.disable();
        while ring.get().is_some() {}
        self.pairs[pair].stopped &= ring.room() < 2;
        self.pairs[pair].tx_due = !ring.enable();
        if self.pairs[pair].tx_due {
            ring.disable();
        }
    }

    /// `start_xmit`.
    fn transmit(&mut self, pair: usize, len: usize, more: bool) {
        let (ring, pair) = (&mut self.rings[pair * 2 + 1], &mut self.pairs[pair]);
        if pair.stopped {
            return;
        }
        loop {
            ring.disable();
            while ring.get().is_some() {}
            if more || ring.enable_late() {
                break;
            }
        }
        let Some(head) = ring.next() else {
            return;
        };
        let bytes = frame(pair.offered, len);
        let at = ring.at(head);
        ring.write(at, &[0; HEADER]);
        ring.write(at + HEADER as u64, &bytes);
        let parts = [
            (at, HEADER as u32, false),
            (at + HEADER as u64, bytes.len() as u32, false),
        ];
        ring.add(&parts[..]);
        pair.outgoing.push_back((pair.offered, bytes.len()));
        pair.offered += 1;
        if ring.room() < 2 {
            pair.stopped = true;
            pair.tx_due |= !ring.enable_late();
        }
        if !more || pair.stopped {
            ring.kick();
        }
    }

    fn use_pairs(&mut self, count: usize) {
        if self.wanted.is_some() {
            return;
        }
        if let Some(ring) = self.control()
            && let Some(head) = ring.next()
        {
            let at = ring.at(head);
            ring.write(at, &[4, 0, count as u8, 0]);
            ring.add(&[(at, 4, false), (at + 8, 1, true)]);
            ring.kick();
            self.wanted = Some(count);
        }
    }

    /// True if a command was answered.
    fn hear(&mut self, with: &Schedule) -> bool {
        let Some(ring) = self.control() else {
            return false;
        };
        let Some((head, _)) = ring.get() else {
            return false;
        };
        if ring.read(ring.at(head) + 8, 1) != [0] {
            with.wrong(|| "a command is refused".into());
        }
        self.active = self.wanted.take().unwrap_or(1);
        true
    }
}

impl Outside for Card {
    fn rings(&mut self) -> &mut Vec<Ring> {
        &mut self.rings
    }

    fn begin(&mut self, _: &Schedule) {
        (self.active, self.wanted) = (1, None);
        for index in 0..self.pairs.len() {
            let pair = &mut self.pairs[index];
            (pair.rx_due, pair.tx_due, pair.stopped) = (false, false, false);
            self.fill(index, usize::MAX);
        }
        if let Some(control) = self.control() {
            control.disable();
            let all = self.pairs.len();
            self.use_pairs(all);
        }
    }

    fn drive(&mut self, with: &Schedule) {
        self.hear(with);
        let pair = with.pick(self.pairs.len());
        if self.pairs[pair].rx_due && with.pick(2) == 0 {
            with.tell(|| format!("guest polls {pair}"));
            return self.poll_receive(pair, with);
        }
        if self.pairs[pair].tx_due && with.pick(2) == 0 {
            with.tell(|| format!("guest completes {pair}"));
            return self.poll_transmit(pair);
        }
        if self.pairs[pair].short && with.pick(2) == 0 {
            with.tell(|| format!("guest refills {pair}"));
            return self.fill(pair, with.one(&[usize::MAX, 1]));
        }
        match with.pick(8) {
            0 | 1 => {
                let all = self.pairs.len();
                let count = with.one(&[1, all, all.min(2)]);
                with.tell(|| format!("guest wants {count} pairs"));
                self.use_pairs(count);
            }
            _ if pair < self.active => {
                let (count, len) = (with.one(&[1, 1, 2, 20, 300]), with.one(&[60, 60, MOST_FRAME]));
                with.tell(|| format!("guest sends {count} of {len} on {pair}"));
                for left in (0..count).rev() {
                    self.transmit(pair, len, left != 0);
                }
            }
            _ => {}
        }
    }

    fn interrupt(&mut self, queue: usize, _: &Schedule) {
        if let Some(pair) = self.pairs.get_mut(queue / 2) {
            self.rings[queue].disable();
            if queue.is_multiple_of(2) {
                pair.rx_due = true;
            } else {
                pair.tx_due = true;
            }
        }
    }

    fn host(&mut self, with: &Schedule) {
        let index = with.pick(self.pairs.len());
        // What is sure to fit, however few buffers there are.
        let buffers = usize::from(self.rings[0].size() / 4);
        let most = if self.big {
            buffers * BUFFER as usize - HEADER
        } else {
            MOST_FRAME
        };
        let pair = &mut self.pairs[index];
        match with.pick(16) {
            0..=7 => {
                let (count, len) = (
                    with.one(&[1, 1, 3, 100]),
                    with.one(&[60, MOST_FRAME, most.min(60_000)]),
                );
                with.tell(|| format!("host sends {count} of {len} to {index}"));
                for _ in 0..count {
                    pair.host_sends(len);
                }
            }
            8..=14 => {
                let count = with.one(&[1, 100, 3000, 20_000]);
                with.tell(|| format!("host reads {count} from {index}"));
                pair.host_reads(count, with);
            }
            _ if with.pick(8) == 0 => {
                with.tell(|| format!("host hangs up {index}"));
                pair.peer = None;
            }
            _ => drop(pair.flush()),
        }
    }

    fn answer(&mut self, with: &Schedule) -> bool {
        let mut busy = self.hear(with);
        for index in 0..self.pairs.len() {
            busy |= self.pairs[index].flush();
            busy |= self.pairs[index].host_reads(usize::MAX, with);
            if self.pairs[index].short {
                busy = true;
                self.fill(index, usize::MAX);
            }
            if self.pairs[index].rx_due {
                busy = true;
                self.poll_receive(index, with);
            }
            if self.pairs[index].tx_due {
                busy = true;
                self.poll_transmit(index);
            }
        }
        busy
    }

    fn left(&mut self) -> Option<String> {
        if self.wanted.is_some() {
            return Some("a command is not answered".into());
        }
        for (index, pair) in self.pairs.iter().enumerate() {
            let unused = self.rings[index * 2 + 1].unused();
            if unused != 0 {
                return Some(format!("{unused} frames of the guest are not taken from {index}"));
            }
            if pair.peer.is_some() && !pair.outgoing.is_empty() {
                return Some(format!(
                    "{} frames of the guest do not reach the host on {index}",
                    pair.outgoing.len()
                ));
            }
            if pair.peer.is_some() && index < self.active && !pair.incoming.is_empty() {
                return Some(format!(
                    "{} frames of the host do not reach the guest on {index}",
                    pair.incoming.len()
                ));
            }
        }
        None
    }

    fn end(&mut self, with: &Schedule) {
        for index in 0..self.pairs.len() {
            while self.take(index, with) {}
            let unused = usize::from(self.rings[index * 2 + 1].unused());
            let pair = &mut self.pairs[index];
            pair.outgoing.truncate(pair.outgoing.len().saturating_sub(unused));
        }
    }
}

fn wired(with: &Schedule) -> Wired {
    let count = with.one(&[1, 2, 2, 3]);
    let (mut links, mut pairs): (Vec<Box<dyn Link>>, _) = (vec![], vec![]);
    for _ in 0..count {
        let (near, peer) = UnixStream::pair().unwrap();
        for socket in [&near, &peer] {
            socket.set_nonblocking(true).unwrap();
            set_socket_send_buffer_size(socket, 4096).unwrap();
        }
        links.push(Box::new(Stream::new(near)));
        pairs.push(Pair::new(peer));
    }
    let (merges, big) = with.one(&[(false, false), (true, false), (true, true)]);
    let mut features = MAC | STATUS;
    features |= if merges { MRG_RXBUF } else { 0 };
    features |= if big { GUEST_CSUM | GUEST_TSO4 } else { 0 };
    features |= if count > 1 { MQ | CTRL_VQ } else { 0 };
    let rates = || Rates {
        bytes: with.one(&[None, Some(RATE)]),
        operations: None,
    };
    let (receive, transmit) = (rates(), rates());
    let net = Net::new(links, GUEST_CSUM | GUEST_TSO4, None, MacAddress::of_device(1)).unwrap();
    let net = net.limit(receive, transmit).unwrap();
    // Nothing is left of the first second.
    net.limits.receive.take(RATE);
    net.limits.transmit.take(RATE);
    let (mem, lines) = (memory().0, Arc::new(Lines::default()));
    let (rx, tx) = (with.one(&[4, 8, 32, 256]), with.one(&[2, 4, 16, 256]));
    let size = |queue: u16| match queue {
        _ if queue == count * 2 => 4,
        _ if queue.is_multiple_of(2) => rx,
        _ => tx,
    };
    let queues = count * 2 + u16::from(count > 1);
    let ring = |queue: u16| {
        let base = 0x10_0000 + u64::from(queue) * 0xa_0000;
        Ring::new(&mem, &lines, queue, base, size(queue), SLOT)
    };
    let rings = (0..queues).map(ring).collect();
    let card = Card {
        rings,
        pairs,
        active: 1,
        wanted: None,
        merges,
        big,
    };
    Wired {
        device: Box::new(net),
        outside: Box::new(card),
        mem,
        lines,
        features,
        console: None,
        rest: REST,
    }
}

#[test]
fn no_frame_is_forgotten() {
    search("net", 800, &wired);
}
