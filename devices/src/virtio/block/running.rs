//! A block device whose driver is up.

use std::io::{self, Read, Write};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arch::addr::Gpa;
use arch::blockio::{Action, COPIES, Disk, Done, Engine};
use arch::mem::SharedMem;
use vm_memory::{Bytes, GuestAddress};

use super::Home;
use super::request::{Data, HEADER_BYTES, ID_BYTES, Limits, Range, Request, Status};
use crate::ratelimit::LogGate;
use crate::virtio::device::Running;
use crate::virtio::queue::{Chain, ChainIo, QueueBroken, VirtQueue};
use crate::virtio::rate::Limit;
use crate::virtio::serve::Turns;

/// Data that one call begins to move at most, in bytes, so that one disk does not starve other devices.
const BYTES_PER_CALL: u64 = 16 << 20;
/// How long the end of a machine waits for the host's disk.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A guest may begin a driver's life as often as it likes.
pub(super) static GATE: LogGate = LogGate::new(1);

/// What all queues of a running disk share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) mem: SharedMem,
    pub(super) disk: Arc<Disk>,
    pub(super) limits: Limits,
    /// Writes complete on stable storage.
    pub(super) durable: bool,
    pub(super) id: [u8; 20],
    /// Rates to keep, of all queues together.
    pub(super) limit: Limit,
}

/// What is left of what one call may do, over all queues of the disk.
#[derive(Debug)]
struct Allowance {
    /// Requests to begin.
    chains: u16,
    /// Data of those, in bytes.
    bytes: u64,
    /// What engines may copy in this thread, in bytes.
    copies: u64,
}

impl Allowance {
    /// For one call: a queue's worth of requests.
    fn of_call(chains: u16) -> Self {
        Self {
            chains,
            bytes: BYTES_PER_CALL,
            copies: COPIES,
        }
    }

    fn is_used_up(&self) -> bool {
        self.chains == 0 || self.bytes == 0
    }
}

/// Where a turn over the ring ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The ring is empty.
    Nothing,
    /// The allowance of one call is used up.
    More,
    /// A rate is; the limit's poll says when to go on.
    Waits,
}

/// The running device.
#[derive(Debug)]
pub(super) struct RunningBlock {
    shared: Shared,
    lanes: Vec<Lane>,
    turns: Turns,
    home: Home,
}

/// One queue and its engine.
#[derive(Debug)]
pub(super) struct Lane {
    /// `None` if the driver left it disabled.
    queue: Option<VirtQueue>,
    engine: Box<dyn Engine>,
    /// Requests in flight, by head.
    begun: Vec<Option<Reply>>,
    /// What was left in the ring.
    left: Left,
    /// A host error was logged.
    told: bool,
    /// Scratch lists, kept for their memory.
    segments: Vec<(Gpa, u32)>,
    done: Vec<Done>,
    /// Chains to give back, with the bytes written.
    used: Vec<(u16, u32)>,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug)]
struct Reply {
    /// Place of the status byte.
    status: Gpa,
    /// Writable bytes before it.
    room: u64,
    /// How many of them are filled, from the front, if all goes well.
    fills: u64,
}

impl Lane {
    pub(super) fn new(queue: Option<VirtQueue>, engine: Box<dyn Engine>) -> Self {
        let size = queue.as_ref().map_or(0, |queue| usize::from(queue.size()));
        Self {
            queue,
            engine,
            begun: vec![None; size],
            left: Left::Nothing,
            told: false,
            segments: Vec::new(),
            done: Vec::new(),
            used: Vec::new(),
        }
    }

    /// Descriptors of the queue.
    fn size(&self) -> u16 {
        self.queue.as_ref().map_or(0, VirtQueue::size)
    }

    /// Begins what the driver offers and answers what is finished.
    fn serve(&mut self, shared: &Shared, allowed: &mut Allowance) -> Result<(), QueueBroken> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        let result = self.turn(shared, &mut queue, allowed);
        self.queue = Some(queue);
        result
    }

    fn turn(
        &mut self,
        shared: &Shared,
        queue: &mut VirtQueue,
        allowed: &mut Allowance,
    ) -> Result<(), QueueBroken> {
        let mem = &shared.mem;
        loop {
            queue.disable_kicks(mem)?;
            self.left = self.begin_all(shared, queue, allowed)?;
            self.answer_all(shared, queue, allowed)?;
            match self.left {
                Left::More => {
                    shared.disk.wake();
                    break;
                }
                Left::Waits => break,
                Left::Nothing if !queue.enable_kicks(mem)? => break,
                Left::Nothing => {}
            }
        }
        queue.notify(mem)
    }

    /// Begins requests until the ring is empty, or the allowance or a rate is used up.
    fn begin_all(
        &mut self,
        shared: &Shared,
        queue: &mut VirtQueue,
        allowed: &mut Allowance,
    ) -> Result<Left, QueueBroken> {
        while !allowed.is_used_up() {
            if !shared.limit.admits() {
                return Ok(Left::Waits);
            }
            let Some(chain) = queue.pop(&shared.mem)? else {
                return Ok(Left::Nothing);
            };
            allowed.chains = allowed.chains.saturating_sub(1);
            let moves = chain.readable_bytes().saturating_add(chain.writable_bytes());
            allowed.bytes = allowed.bytes.saturating_sub(moves);
            shared.limit.take(moves);
            self.begin(shared, queue.index(), &chain)?;
        }
        Ok(Left::More)
    }

    fn begin(&mut self, shared: &Shared, queue: u16, chain: &Chain) -> Result<(), QueueBroken> {
        let head = chain.head();
        let slot = self.begun.get(usize::from(head));
        let (Some(None), Some(mut reply)) = (slot, Reply::of(chain)) else {
            // Nowhere to put an answer.
            return Err(chain.bad_shape(queue));
        };
        let status = match self.submit(shared, chain, &mut reply) {
            Ok(true) => {
                if let Some(slot) = self.begun.get_mut(usize::from(head)) {
                    *slot = Some(reply);
                }
                return Ok(());
            }
            Ok(false) => Status::Ok,
            Err(status) => status,
        };
        self.used.push((head, reply.give(&shared.mem, status)));
        Ok(())
    }

    /// Hands a request to the engine; false if it is done already.
    fn submit(&mut self, shared: &Shared, chain: &Chain, reply: &mut Reply) -> Result<bool, Status> {
        let (mem, limits) = (&shared.mem, &shared.limits);
        let mut reader = chain.reader(mem);
        let header = read_array(&mut reader)?;
        let data = Data {
            readable: chain.readable_bytes().saturating_sub(HEADER_BYTES),
            writable: reply.room,
        };
        let action = match Request::parse(header, data, limits)? {
            Request::Read { offset } => {
                reply.fills = reply.room;
                collect(chain.writer(mem), reply.room, &mut self.segments);
                let segments = &self.segments;
                Action::Read { offset, segments }
            }
            Request::Write { offset } => {
                collect(reader, data.readable, &mut self.segments);
                let (segments, durable) = (&self.segments, shared.durable);
                Action::Write {
                    offset,
                    segments,
                    durable,
                }
            }
            Request::Flush => Action::Flush,
            Request::Id => {
                let count = usize::try_from(reply.room.min(ID_BYTES)).unwrap_or(0);
                let id = shared.id.get(..count).unwrap_or_default();
                chain.writer(mem).write_all(id).map_err(|_| Status::IoErr)?;
                reply.fills = count as u64;
                return Ok(false);
            }
            Request::Discard => {
                let Range { offset, bytes, .. } = Range::discard(read_array(&mut reader)?, limits)?;
                Action::Discard { offset, bytes }
            }
            Request::Zero => {
                let Range { offset, bytes, unmap } = Range::zero(read_array(&mut reader)?, limits)?;
                Action::Zero {
                    offset,
                    bytes,
                    unmap,
                    durable: shared.durable,
                }
            }
        };
        self.engine
            .submit(mem, u64::from(chain.head()), action)
            .map_err(|_| Status::IoErr)?;
        Ok(true)
    }

    /// Lets the engine work and answers what is finished.
    fn answer_all(
        &mut self,
        shared: &Shared,
        queue: &mut VirtQueue,
        allowed: &mut Allowance,
    ) -> Result<(), QueueBroken> {
        match self.engine.run(&mut self.done, &mut allowed.copies) {
            Ok(true) => {
                self.left = Left::More;
                shared.disk.wake();
            }
            Ok(false) => {}
            Err(e) => self.complain(&e),
        }
        let mut done = std::mem::take(&mut self.done);
        for Done { tag, result } in done.drain(..) {
            let head = u16::try_from(tag).unwrap_or(u16::MAX);
            let Some(reply) = self.begun.get_mut(usize::from(head)).and_then(Option::take) else {
                continue;
            };
            let status = match result {
                Ok(()) => Status::Ok,
                Err(e) if e.kind() == io::ErrorKind::Unsupported => Status::Unsupp,
                Err(e) => {
                    self.complain(&e);
                    Status::IoErr
                }
            };
            self.used.push((head, reply.give(&shared.mem, status)));
        }
        self.done = done;
        if !self.used.is_empty() {
            queue.push_all(&shared.mem, &self.used)?;
            self.used.clear();
        }
        Ok(())
    }

    /// Logs the first host error of a driver's life; the guest gets every one.
    fn complain(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.told, true) {
            GATE.warn(format_args!(
                "the host's disk failed, and the guest is told so: {error}"
            ));
        }
    }

    /// Answers what is finished, and takes up what an earlier call left.
    fn on_backend(&mut self, shared: &Shared, allowed: &mut Allowance) -> Result<(), QueueBroken> {
        if self.left != Left::Nothing {
            return self.serve(shared, allowed);
        }
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        let result = self.answer_all(shared, &mut queue, allowed);
        let result = result.and_then(|()| queue.notify(&shared.mem));
        self.queue = Some(queue);
        result
    }
}

impl Reply {
    /// Finds the last writable byte.
    fn of(chain: &Chain) -> Option<Self> {
        let last = chain.writable().last()?;
        let before = last.bytes.checked_sub(1)?;
        Some(Self {
            status: Gpa(last.start.0.checked_add(u64::from(before))?),
            room: chain.writable_bytes().checked_sub(1)?,
            fills: 0,
        })
    }

    /// Writes the status byte and returns how many bytes from the front of the chain are filled. A driver that
    /// made its status byte private gets no status.
    fn give(&self, mem: &SharedMem, status: Status) -> u32 {
        let wrote = mem.write_obj(status as u8, GuestAddress(self.status.0));
        let filled = if status == Status::Ok { self.fills } else { 0 };
        // The status counts only if there is no gap before it.
        let last = u64::from(wrote.is_ok() && filled == self.room);
        u32::try_from(filled.saturating_add(last)).unwrap_or(u32::MAX)
    }
}

/// Copies the next 16 bytes out.
fn read_array(from: &mut ChainIo<'_>) -> Result<[u8; 16], Status> {
    let mut bytes = [0; 16];
    from.read_exact(&mut bytes).map_err(|_| Status::IoErr)?;
    Ok(bytes)
}

/// Lists the next `bytes` of a chain.
fn collect(mut from: ChainIo<'_>, mut bytes: u64, into: &mut Vec<(Gpa, u32)>) {
    into.clear();
    while bytes != 0
        && let Some((start, length)) = from.front()
    {
        let length = u32::try_from(bytes).unwrap_or(u32::MAX).min(length);
        into.push((start, length));
        from.skip(u64::from(length));
        bytes = bytes.saturating_sub(u64::from(length));
    }
}

impl RunningBlock {
    pub(super) fn new(shared: Shared, lanes: Vec<Lane>, home: Home) -> Self {
        Self {
            shared,
            lanes,
            turns: Turns::default(),
            home,
        }
    }
}

impl Running for RunningBlock {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        match self.lanes.get_mut(queue) {
            Some(lane) => lane.serve(&self.shared, &mut Allowance::of_call(lane.size())),
            None => Ok(()),
        }
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.shared.disk.acknowledge();
        self.shared.limit.acknowledge();
        let mut allowed = Allowance::of_call(self.lanes.iter().map(Lane::size).max().unwrap_or(0));
        for index in self.turns.order(self.lanes.len()) {
            let (chains, copies) = (allowed.chains, allowed.copies);
            if let Some(lane) = self.lanes.get_mut(index) {
                lane.on_backend(&self.shared, &mut allowed)?;
            }
            if (allowed.chains, allowed.copies) != (chains, copies) {
                self.turns.took(index);
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> bool {
        self.shared.disk.acknowledge();
        self.shared.limit.acknowledge();
        // Every engine is asked, so that the memory of all that is over can be converted.
        let ask = |idle: bool, lane: &mut Lane| lane.engine.quiesce(Duration::ZERO) && idle;
        self.lanes.iter_mut().fold(true, ask)
    }
}

/// Waits only at the end of a machine: what was reset is idle.
impl Drop for RunningBlock {
    fn drop(&mut self) {
        let began = Instant::now();
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        for mut lane in self.lanes.drain(..) {
            if lane.engine.quiesce(END_LIMIT.saturating_sub(began.elapsed())) {
                home.push(lane.engine);
            } else {
                let seconds = END_LIMIT.as_secs();
                log::warn!(
                    "the host's disk has not finished its operations within {seconds} s, and the machine ends without \
                     them; their memory stays pinned"
                );
                // Dropping it would wait once more.
                std::mem::forget(lane.engine);
            }
        }
        self.shared.disk.acknowledge();
    }
}
