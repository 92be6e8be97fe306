//! From the link to the guest.

use std::collections::VecDeque;
use std::io::{self, Write};

use arch::iov::Parts;
use arch::mem::SharedMem;

use super::super::queue::{Chain, QueueBroken, VirtQueue};
use super::super::rate::Limit;
use super::header::{HEADER_BYTES, MAX_BYTES, NUM_BUFFERS_AT, net_feature};
use super::link::Link;
use crate::ratelimit::LogGate;

/// Most frames per wake-up.
const BUDGET: usize = 64;
/// After a wake-up with one frame only, this many take one frame without probing for a second.
const SINGLES: u8 = 8;
/// Smallest part of a frame that is read straight into guest memory.
const DIRECT_MIN: usize = 2048;

/// A link that is dead fails anew for each driver.
pub(super) static GATE: LogGate = LogGate::new(1);

/// How a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxEnd {
    /// The link has, or may have, more.
    More,
    /// The driver offers no buffer.
    Starved,
    /// The limit says when to go on.
    Limited,
    /// The other side of the link is gone.
    HungUp,
}

/// The receive side of a queue pair.
#[derive(Debug)]
pub(super) struct Rx {
    queue: VirtQueue,
    mergeable: bool,
    big_frames: bool,
    checksums: bool,
    /// Buffers popped ahead, with their bytes in all.
    staged: VecDeque<Chain>,
    staged_bytes: u64,
    /// Bytes of the next frame that go straight to guest memory; the rest takes a copy. Follows the frames,
    /// because looking up 64 KiB of guest buffers costs more than a small frame.
    direct: usize,
    singles: u8,
    used: Vec<(u16, u32)>,
    limit: Limit,
}

impl Rx {
    pub(super) fn new(queue: VirtQueue, features: u64, limit: Limit) -> Self {
        Self {
            queue,
            limit,
            mergeable: features & net_feature::MRG_RXBUF != 0,
            checksums: features & net_feature::GUEST_CSUM != 0,
            big_frames: features & (net_feature::GUEST_TSO4 | net_feature::GUEST_TSO6) != 0,
            staged: VecDeque::new(),
            staged_bytes: 0,
            direct: DIRECT_MIN,
            singles: 0,
            used: vec![],
        }
    }

    /// Moves frames until the link or the guest has no more, or the budget is used up; says how many. `spill` holds
    /// [`MAX_BYTES`].
    pub(super) fn run(
        &mut self,
        mem: &SharedMem,
        link: &mut dyn Link,
        spill: &mut [u8],
    ) -> Result<(RxEnd, usize), QueueBroken> {
        self.queue.disable_kicks(mem)?;
        let (end, frames) = self.batch(mem, link, spill)?;
        self.singles = match (frames, self.singles) {
            (1, 0) => SINGLES,
            (1, left) => left.saturating_sub(1),
            _ => 0,
        };
        self.queue.notify(mem)?;
        Ok((end, frames))
    }

    fn batch(
        &mut self,
        mem: &SharedMem,
        link: &mut dyn Link,
        spill: &mut [u8],
    ) -> Result<(RxEnd, usize), QueueBroken> {
        let budget = if self.singles == 0 { BUDGET } else { 1 };
        let mut frames = 0_usize;
        // What the link holds in memory must not wait for another wake-up.
        while frames < budget || frames < BUDGET && link.held().incoming {
            if !self.limit.admits() {
                return Ok((RxEnd::Limited, frames));
            }
            if let Some(end) = self.stage(mem)? {
                return Ok((end, frames));
            }
            match self.receive(mem, link, spill)? {
                Ok((bytes, direct)) => {
                    self.limit.take(bytes as u64);
                    self.deliver(mem, bytes, direct, spill)?;
                }
                Err(RxEnd::More) => break,
                Err(end) => return Ok((end, frames)),
            }
            frames = frames.saturating_add(1);
        }
        Ok((RxEnd::More, frames))
    }

    /// Pops buffers until any frame fits. If there are too few, why the batch ends: kicks are enabled, or buffers keep
    /// coming while they are being enabled, so that one has to look again later.
    fn stage(&mut self, mem: &SharedMem) -> Result<Option<RxEnd>, QueueBroken> {
        let mut kicks = false;
        loop {
            while !self.enough() {
                let Some(chain) = self.queue.pop(mem)? else {
                    break;
                };
                if chain.writable_bytes() < HEADER_BYTES as u64 {
                    return Err(chain.bad_shape(self.queue.index()));
                }
                self.staged_bytes = self.staged_bytes.saturating_add(chain.writable_bytes());
                self.staged.push_back(chain);
            }
            if self.usable() {
                return Ok(None);
            }
            if !self.queue.enable_kicks(mem)? {
                return Ok(Some(RxEnd::Starved));
            }
            // Once more after an interleaved kick, never in a loop that the guest could keep alive.
            if kicks {
                return Ok(Some(RxEnd::More));
            }
            kicks = true;
        }
    }

    fn enough(&self) -> bool {
        !self.staged.is_empty() && (!self.mergeable || self.staged_bytes >= MAX_BYTES as u64)
    }

    /// While the driver is about to refill a ring that has become nearly empty, a 64 KiB frame would be lost.
    fn usable(&self) -> bool {
        let nearly_empty = self.staged.len() < usize::from(self.queue.size() / 4);
        let waits = self.mergeable && self.big_frames && nearly_empty;
        self.enough() || !(self.staged.is_empty() || waits)
    }

    /// Receives one frame: its length with header, and how much of it already lies in the staged buffers.
    fn receive(
        &self,
        mem: &SharedMem,
        link: &mut dyn Link,
        spill: &mut [u8],
    ) -> Result<Result<(usize, usize), RxEnd>, QueueBroken> {
        let mut parts = Parts::new();
        let chains = if self.mergeable { self.staged.len() } else { 1 };
        'fill: for chain in self.staged.iter().take(chains) {
            for segment in chain.writable() {
                if parts.room() <= 2 || parts.bytes() >= self.direct {
                    break 'fill;
                }
                let pushed = parts.push_guest(mem, segment.start, segment.bytes as usize);
                if !pushed.is_ok_and(|all| all) {
                    return Err(chain.bad_shape(self.queue.index()));
                }
            }
        }
        let direct = parts.bytes();
        parts.push(spill);
        Ok(match link.receive(&parts) {
            Ok(0) => Err(RxEnd::HungUp),
            Ok(bytes) => Ok((bytes, direct)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(RxEnd::More),
            Err(e) => {
                GATE.warn(format_args!("network link fails, it stays down: {e}"));
                Err(RxEnd::HungUp)
            }
        })
    }

    /// Hands a received frame to the driver, or drops it if it does not fit.
    fn deliver(
        &mut self,
        mem: &SharedMem,
        bytes: usize,
        direct: usize,
        spill: &[u8],
    ) -> Result<(), QueueBroken> {
        self.direct = bytes.next_power_of_two().clamp(DIRECT_MIN, MAX_BYTES);
        let room = if self.mergeable {
            self.staged_bytes
        } else {
            self.staged.front().map_or(0, Chain::writable_bytes)
        };
        if bytes <= HEADER_BYTES || bytes as u64 > room {
            return Ok(());
        }
        let mut left = bytes as u64;
        let mut in_place = direct as u64;
        let mut rest = spill;
        self.used.clear();
        for chain in &self.staged {
            let take = chain.writable_bytes().min(left);
            let copy = usize::try_from(take.saturating_sub(in_place)).unwrap_or(0);
            let (now, later) = rest.split_at_checked(copy).unwrap_or_default();
            let mut writer = chain.writer(mem);
            writer.skip(in_place);
            if writer.write_all(now).is_err() {
                return Err(chain.bad_shape(self.queue.index()));
            }
            rest = later;
            in_place = in_place.saturating_sub(take);
            left = left.saturating_sub(take);
            self.used.push((chain.head(), u32::try_from(take).unwrap_or(0)));
            if left == 0 {
                break;
            }
        }
        self.finish(mem)
    }

    fn finish(&mut self, mem: &SharedMem) -> Result<(), QueueBroken> {
        let buffers = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        if let Some(first) = self.staged.front() {
            let mut header = first.writer(mem);
            header.skip(NUM_BUFFERS_AT);
            let mut written = header.write_all(&buffers.to_le_bytes());
            // Linux says DATA_VALID whether or not anybody asked for checksums.
            if !self.checksums {
                written = written.and_then(|()| first.writer(mem).write_all(&[0]));
            }
            if written.is_err() {
                return Err(first.bad_shape(self.queue.index()));
            }
        }
        for chain in self.staged.drain(..self.used.len()) {
            self.staged_bytes = self.staged_bytes.saturating_sub(chain.writable_bytes());
        }
        self.queue.push_all(mem, &self.used)
    }
}
