//! The running device: its queues.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use arch::mem::SharedMem;

use super::super::device::{Activation, Running};
use super::super::queue::{Chain, QueueBroken, VirtQueue};
use super::conn::BURST_MAX;
use super::host::Host;
use super::mux::Mux;
use super::packet::{HEADER_BYTES, Header};

/// Most packets in each direction per wake-up.
const BUDGET: usize = 256;

/// A vsock device whose driver is up.
#[derive(Debug)]
pub(super) struct VsockRunning {
    mem: SharedMem,
    rx: VirtQueue,
    tx: VirtQueue,
    pub(super) mux: Mux,
    /// Receive buffers popped ahead.
    staged: VecDeque<Chain>,
    used: Vec<(u16, u32)>,
    /// The guest offers no receive buffer; its next kick goes on.
    starved: bool,
    /// The guest's packets used up the budget.
    tx_waits: bool,
}

impl VsockRunning {
    pub(super) fn start(with: Activation, cid: u64, host: Arc<Host>) -> io::Result<Self> {
        let mut queues = with.queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(io::Error::other("the driver left a vsock queue disabled"));
        };
        Ok(Self {
            mem: with.mem,
            rx,
            tx,
            mux: Mux::start(cid, host)?,
            staged: VecDeque::new(),
            used: vec![],
            starved: false,
            tx_waits: false,
        })
    }

    /// Takes packets of the guest.
    fn take(&mut self) -> Result<(), QueueBroken> {
        self.tx_waits = true;
        self.tx.disable_kicks(&self.mem)?;
        for _ in 0..BUDGET {
            let chain = match self.tx.pop(&self.mem)? {
                Some(chain) => chain,
                None if self.tx.enable_kicks(&self.mem)? => continue,
                None => {
                    self.tx_waits = false;
                    break;
                }
            };
            let mut bytes = [0; HEADER_BYTES];
            if chain.reader(&self.mem).read_exact(&mut bytes).is_err() {
                return Err(chain.bad_shape(self.tx.index()));
            }
            self.mux.on_packet(&self.mem, &chain, &Header::parse(&bytes));
            self.tx.push(&self.mem, chain.head(), 0)?;
        }
        self.tx.notify(&self.mem)
    }

    /// Gives the guest what it is due, as far as it has buffers. True if the budget ended it.
    fn give(&mut self) -> Result<bool, QueueBroken> {
        if self.starved || !self.mux.has_output() {
            return Ok(false);
        }
        self.rx.disable_kicks(&self.mem)?;
        let mut budget = BUDGET;
        while self.mux.has_output() && budget > 0 && !self.starved {
            self.starved = !self.stage()?;
            if !self.starved {
                self.emit()?;
            }
            budget = budget.saturating_sub(1);
        }
        self.rx.notify(&self.mem)?;
        Ok(budget == 0)
    }

    fn emit(&mut self) -> Result<(), QueueBroken> {
        self.used.clear();
        if self.mux.emit(&self.mem, &self.staged, &mut self.used).is_err() {
            return Err(match self.staged.front() {
                Some(chain) => chain.bad_shape(self.rx.index()),
                None => return Ok(()),
            });
        }
        self.staged.drain(..self.used.len());
        if self.used.is_empty() {
            return Ok(());
        }
        self.rx.push_all(&self.mem, &self.used)
    }

    /// Pops receive buffers ahead; false, with kicks enabled, if there is none.
    fn stage(&mut self) -> Result<bool, QueueBroken> {
        for last in [false, true] {
            while self.staged.len() < BURST_MAX {
                let Some(chain) = self.rx.pop(&self.mem)? else {
                    break;
                };
                if chain.writable_bytes() <= HEADER_BYTES as u64 {
                    return Err(chain.bad_shape(self.rx.index()));
                }
                self.staged.push_back(chain);
            }
            if !self.staged.is_empty() {
                return Ok(true);
            }
            if last || !self.rx.enable_kicks(&self.mem)? {
                break;
            }
        }
        Ok(false)
    }
}

impl Running for VsockRunning {
    fn on_kick(&mut self, queue: usize) -> Result<(), QueueBroken> {
        match queue {
            0 => self.starved = false,
            1 => self.take()?,
            // The event queue is for migration, which a confidential guest here does not do.
            _ => return Ok(()),
        }
        let more = self.give()?;
        self.mux.settle(more || self.tx_waits);
        Ok(())
    }

    fn on_backend(&mut self) -> Result<(), QueueBroken> {
        self.mux.on_events();
        if self.tx_waits {
            self.take()?;
        }
        let more = self.give()?;
        self.mux.settle(more || self.tx_waits);
        Ok(())
    }
}
