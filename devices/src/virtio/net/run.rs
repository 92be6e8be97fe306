//! The running device: queue pairs, their links and the control queue.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use arch::mem::SharedMem;
use arch::poll::{Interest, Poll};

use super::super::device::{Activation, Running};
use super::super::queue::{Chain, QueueBroken, VirtQueue};
use super::super::rate::Limit;
use super::super::serve::{Turns, serve};
use super::header::{MAX_BYTES, net_feature};
use super::link::Link;
use super::rx::{Rx, RxEnd};
use super::tx::{Tx, TxEnd};

/// Where the links are while no driver is up.
pub(super) type Shelf = Arc<Mutex<Vec<Box<dyn Link>>>>;

/// `VIRTIO_NET_CTRL_MQ`, `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];
const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;

/// A queue pair and its link.
#[derive(Debug)]
struct Pair {
    link: Box<dyn Link>,
    rx: Option<Rx>,
    tx: Option<Tx>,
    active: bool,
    received: RxEnd,
    sent: TxEnd,
    hung_up: bool,
    /// What the epoll descriptor watches.
    watched: Interest,
}

impl Pair {
    /// True if a frame was moved, as for [`transmit`](Self::transmit).
    fn receive(&mut self, mem: &SharedMem, spill: &mut [u8]) -> Result<bool, QueueBroken> {
        let mut frames = 0;
        if let Some(rx) = &mut self.rx
            && self.active
            && !self.hung_up
        {
            (self.received, frames) = rx.run(mem, &mut *self.link, spill)?;
            self.hung_up = self.received == RxEnd::HungUp;
        }
        Ok(frames != 0)
    }

    fn transmit(&mut self, mem: &SharedMem, spill: &mut [u8]) -> Result<bool, QueueBroken> {
        let mut frames = 0;
        if let Some(tx) = &mut self.tx {
            (self.sent, frames) = tx.run(mem, &mut *self.link, spill)?;
        }
        Ok(frames != 0)
    }

    /// Makes the epoll descriptor watch what can be acted on, and nothing else: it is level-triggered.
    fn watch(&mut self, poll: &Poll, index: u64) {
        let held = self.link.held();
        let live = self.active && !self.hung_up;
        let takes = self.rx.is_some() && !matches!(self.received, RxEnd::Starved | RxEnd::Limited);
        let wanted = Interest {
            read: live && takes,
            // What is sent to a dead link, or to one that is not used, is swallowed, and more of it has to be.
            write: self.sent == TxEnd::More || live && (held.outgoing || held.incoming && takes),
            hang_up: false,
        };
        if let Err(e) = poll.watch(self.link.fd(), index, &mut self.watched, wanted) {
            log::warn!("network link cannot be watched: {e}");
        }
    }
}

/// A network device whose driver is up.
#[derive(Debug)]
pub(super) struct NetRunning {
    mem: SharedMem,
    poll: Arc<Poll>,
    shelf: Shelf,
    pairs: Vec<Pair>,
    control: Option<(usize, VirtQueue)>,
    features: u64,
    spill: Box<[u8]>,
    limits: Limits,
    receive_turns: Turns,
    transmit_turns: Turns,
}

/// What is kept to, each over all pairs together.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    pub(super) receive: Limit,
    pub(super) transmit: Limit,
}

impl Limits {
    fn acknowledge(&self) {
        self.receive.acknowledge();
        self.transmit.acknowledge();
    }
}

/// Token of a limit's end of waiting; pairs have small numbers.
pub(super) const LIMIT: u64 = u64::MAX;

impl NetRunning {
    pub(super) fn start(with: Activation, poll: Arc<Poll>, shelf: Shelf, limits: Limits) -> io::Result<Self> {
        let links = std::mem::take(&mut *shelf.lock().unwrap_or_else(PoisonError::into_inner));
        if links.is_empty() {
            return Err(io::Error::other("the network device is already running"));
        }
        let features = with.features;
        let control_index = if features & net_feature::MQ != 0 {
            links.len().saturating_mul(2)
        } else {
            2
        };
        let mut queues = with.queues;
        let control = queues.get_mut(control_index).and_then(Option::take);
        let has_control = features & net_feature::CTRL_VQ != 0;
        let mut queues = queues.into_iter();
        let mut next = || queues.next().flatten();
        let pairs = links
            .into_iter()
            .map(|link| Pair {
                link,
                rx: next().map(|queue| Rx::new(queue, features, limits.receive.clone())),
                tx: next().map(|queue| Tx::new(queue, features, limits.transmit.clone())),
                active: false,
                received: RxEnd::More,
                sent: TxEnd::Empty,
                hung_up: false,
                watched: Interest::NONE,
            })
            .collect();
        let mut running = Self {
            mem: with.mem,
            poll,
            shelf,
            pairs,
            control: control
                .filter(|_| has_control)
                .map(|queue| (control_index, queue)),
            features,
            spill: vec![0; MAX_BYTES].into(),
            limits,
            receive_turns: Turns::default(),
            transmit_turns: Turns::default(),
        };
        running.set_pairs(1)?;
        Ok(running)
    }

    /// Uses the first `count` pairs only.
    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.active = index < count;
            // Buffers may have come, or a wait have ended, while nobody looked.
            pair.received = RxEnd::More;
            // Before it is detached: a detached tap is always ready.
            pair.watch(&self.poll, index as u64);
            pair.link.attach(pair.active.then_some(self.features))?;
        }
        Ok(())
    }

    fn command(&mut self, chain: &Chain) -> u8 {
        let mut bytes = [0; 4];
        let mut reader = chain.reader(&self.mem);
        if reader.left() != bytes.len() as u64 || reader.read_exact(&mut bytes).is_err() {
            return ACK_ERR;
        }
        let [class, command, low, high] = bytes;
        let count = usize::from(u16::from_le_bytes([low, high]));
        let known = [class, command] == SET_PAIRS && self.features & net_feature::MQ != 0;
        if known && (1..=self.pairs.len()).contains(&count) && self.set_pairs(count).is_ok() {
            ACK_OK
        } else {
            ACK_ERR
        }
    }

    fn control(&mut self, queue: &mut VirtQueue) -> Result<(), QueueBroken> {
        let mem = self.mem.clone();
        let index = queue.index();
        // Rounds are as long as the queue: a guest that adds commands meanwhile kicks again.
        let limit = usize::from(queue.size()).saturating_add(1);
        serve(queue, &mem, limit, |chain| {
            if chain.readable_bytes() < SET_PAIRS.len() as u64 || chain.writable_bytes() == 0 {
                return Err(chain.bad_shape(index));
            }
            let ack = self.command(chain);
            let answered = chain.writer(&mem).write_all(&[ack]);
            answered.map(|()| 1).map_err(|_| chain.bad_shape(index))
        })
        .map(drop)
    }

    /// Serves all pairs, which share the rates, in the order of their turns.
    fn serve_all(&mut self) -> Result<(), QueueBroken> {
        let count = self.pairs.len();
        for index in self.receive_turns.order(count) {
            if let Some(pair) = self.pairs.get_mut(index)
                && pair.receive(&self.mem, &mut self.spill)?
            {
                self.receive_turns.took(index);
            }
        }
        for index in self.transmit_turns.order(count) {
            if let Some(pair) = self.pairs.get_mut(index).filter(|pair| pair.sent != TxEnd::Empty)
                && pair.transmit(&self.mem, &mut self.spill)?
            {
                self.transmit_turns.took(index);
            }
        }
        for (pair, index) in self.pairs.iter_mut().zip(0..) {
            pair.watch(&self.poll, index);
        }
        Ok(())
    }

    fn serve_pair(&mut self, index: usize) -> Result<(), QueueBroken> {
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        pair.receive(&self.mem, &mut self.spill)?;
        if pair.sent != TxEnd::Empty {
            pair.transmit(&self.mem, &mut self.spill)?;
        }
        pair.watch(&self.poll, index as u64);
        Ok(())
    }
}

impl Running for NetRunning {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        if let Some((index, mut control)) = self.control.take_if(|(index, _)| *index == queue) {
            let outcome = self.control(&mut control);
            self.control = Some((index, control));
            return outcome;
        }
        let index = queue / 2;
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        if queue.is_multiple_of(2) {
            if pair.received == RxEnd::Starved {
                pair.receive(&self.mem, &mut self.spill)?;
            }
        } else {
            pair.transmit(&self.mem, &mut self.spill)?;
        }
        pair.watch(&self.poll, index as u64);
        Ok(())
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        if self.pairs.len() == 1 {
            self.limits.acknowledge();
            return self.serve_pair(0);
        }
        let ready = self.poll.ready();
        if ready.iter().any(|(token, _)| token == LIMIT) {
            self.limits.acknowledge();
            return self.serve_all();
        }
        for (index, _) in ready.iter() {
            self.serve_pair(usize::try_from(index).unwrap_or(usize::MAX))?;
        }
        Ok(())
    }
}

impl Drop for NetRunning {
    fn drop(&mut self) {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, mut pair) in self.pairs.drain(..).enumerate() {
            pair.active = false;
            pair.sent = TxEnd::Empty;
            pair.watch(&self.poll, index as u64);
            // As it was opened: the next owner of a duplicate cannot tell a detached queue from no tap.
            if let Err(e) = pair.link.attach(Some(0)) {
                log::warn!("network link cannot be put back: {e}");
            }
            shelf.push(pair.link);
        }
    }
}
