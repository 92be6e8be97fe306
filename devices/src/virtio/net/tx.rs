//! From the guest to the link.

use std::io::{self, Read};

use arch::iov::{MAX_PARTS, Parts};
use arch::mem::SharedMem;

use super::super::queue::{Chain, QueueBroken, VirtQueue};
use super::super::rate::Limit;
use super::header::{HEADER_BYTES, MAX_BYTES, outgoing};
use super::link::Link;

/// Most frames per wake-up.
const BUDGET: usize = 256;

/// How a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TxEnd {
    /// The guest offers no more.
    Empty,
    /// There is, or may be, more: to go on with when the link is writable.
    More,
    /// There is, or may be, more: to go on with when the limit admits it.
    Limited,
}

/// The transmit side of a queue pair.
#[derive(Debug)]
pub(super) struct Tx {
    queue: VirtQueue,
    features: u64,
    limit: Limit,
}

impl Tx {
    pub(super) fn new(queue: VirtQueue, features: u64, limit: Limit) -> Self {
        Self {
            queue,
            features,
            limit,
        }
    }

    /// Sends what the guest offers; says how many frames went.
    pub(super) fn run(
        &mut self,
        mem: &SharedMem,
        link: &mut dyn Link,
        spill: &mut [u8],
    ) -> Result<(TxEnd, usize), QueueBroken> {
        self.queue.disable_kicks(mem)?;
        let batch = self.batch(mem, link, spill)?;
        self.queue.notify(mem)?;
        Ok(batch)
    }

    fn batch(
        &mut self,
        mem: &SharedMem,
        link: &mut dyn Link,
        spill: &mut [u8],
    ) -> Result<(TxEnd, usize), QueueBroken> {
        let mut frames = 0_usize;
        for _ in 0..BUDGET {
            if !self.limit.admits() {
                return Ok((TxEnd::Limited, frames));
            }
            let chain = match self.queue.pop(mem)? {
                Some(chain) => chain,
                None if self.queue.enable_kicks(mem)? => continue,
                None => return Ok((TxEnd::Empty, frames)),
            };
            if chain.readable_bytes() < HEADER_BYTES as u64 {
                return Err(chain.bad_shape(self.queue.index()));
            }
            match send(&chain, self.features, mem, link, spill) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.unpop();
                    return Ok((TxEnd::More, frames));
                }
                // A frame that the host does not take is lost, as on a wire.
                Err(e) => log::debug!("outgoing frame dropped: {e}"),
                Ok(()) => {
                    self.limit.take(chain.readable_bytes());
                    frames = frames.saturating_add(1);
                }
            }
            self.queue.push(mem, chain.head(), 0)?;
        }
        Ok((TxEnd::More, frames))
    }
}

fn send(
    chain: &Chain,
    features: u64,
    mem: &SharedMem,
    link: &mut dyn Link,
    spill: &mut [u8],
) -> io::Result<()> {
    let mut reader = chain.reader(mem);
    let mut raw = [0; HEADER_BYTES];
    reader.read_exact(&mut raw)?;
    let frame = usize::try_from(reader.left()).unwrap_or(usize::MAX);
    if frame == 0 || frame > MAX_BYTES.saturating_sub(HEADER_BYTES) {
        return Err(io::Error::other("its length is out of bounds"));
    }
    let Some(mut header) = outgoing(raw, frame, features) else {
        return Err(io::Error::other("its header asks for what was not negotiated"));
    };
    let mut parts = Parts::new();
    parts.push(link.lead(&mut header, frame));
    // One piece is the lead; guest buffers could cross from one memory region to the next, hence half.
    if chain.readable().len() < MAX_PARTS / 2 {
        while let Some((at, bytes)) = reader.front() {
            parts.push_guest(mem, at, bytes as usize)?;
            reader.skip(u64::from(bytes));
        }
    } else if let Some(copy) = spill.get_mut(..frame) {
        reader.read_exact(copy)?;
        parts.push(copy);
    }
    link.send(&parts)
}
