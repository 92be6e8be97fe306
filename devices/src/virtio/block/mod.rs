//! virtio-blk (virtio 1.2, "Block Device"). Data goes straight between the disk and shared guest memory; only
//! headers are copied.

mod config;
pub mod request;
mod running;
#[cfg(test)]
mod served;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arch::blockio::{Disk, Engine, Enter};
use arch::poll::{Interest, Poll};

use super::device::{Activation, Running, VirtioDevice};
use super::rate::{Limit, Rates};
use request::{Limits, SECTOR_BYTES, feature};
use running::{Lane, RunningBlock, Shared};

/// Descriptors per queue: enough for a request of 1 MiB in scattered 4 KiB pages, which a smaller queue
/// makes two.
const QUEUE_SIZE: u16 = 512;
/// Data segments of the longest request; header and status need the rest.
const SEG_MAX: u16 = QUEUE_SIZE.saturating_sub(2);

/// Where engines wait for the next driver. They are made before the process is sandboxed.
type Home = Arc<Mutex<Vec<Box<dyn Engine>>>>;

/// A disk whose driver is not up.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    read_only: bool,
    id: [u8; 20],
    config: [u8; config::CONFIG_BYTES],
    features: u64,
    queue_sizes: Vec<u16>,
    home: Home,
    limit: Limit,
    /// The engines and the end of a wait, if there is a limit.
    poll: Option<Poll>,
}

impl Block {
    /// Takes a disk, locked by the caller if it matters. `id` is what the guest reads as its serial number,
    /// zero-padded. Bytes after the last whole sector are not offered. Threads for I/O, if there have to be any, call
    /// `enter` first.
    ///
    /// # Errors
    /// `file` is not a regular file or block device, or there are no queues.
    pub fn open(file: File, read_only: bool, queues: u16, id: [u8; 20], enter: &Enter) -> io::Result<Self> {
        let disk = Disk::open(file)?;
        let engines = disk.engines(queues, QUEUE_SIZE, enter);
        Self::new(disk, engines, read_only, id)
    }

    /// As [`open`](Self::open), with one engine for each queue.
    fn new(disk: Disk, engines: Vec<Box<dyn Engine>>, read_only: bool, id: [u8; 20]) -> io::Result<Self> {
        let geometry = disk.geometry();
        let queues = u16::try_from(engines.len()).unwrap_or(0);
        if queues == 0 {
            let why = "a disk needs 1 to 65535 queues";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Self {
            config: config::bytes(&geometry, u32::from(SEG_MAX), queues),
            features: config::features(&geometry, read_only, queues),
            queue_sizes: vec![QUEUE_SIZE; engines.len()],
            home: Arc::new(Mutex::new(engines)),
            disk: Arc::new(disk),
            read_only,
            id,
            limit: Limit::default(),
            poll: None,
        })
    }

    /// Keeps the disk to `rates`, over all its queues together.
    ///
    /// # Errors
    /// The process or host has no more descriptors.
    pub fn limit(mut self, rates: Rates) -> io::Result<Self> {
        const READ: Interest = Interest {
            read: true,
            ..Interest::NONE
        };
        if !rates.are_unlimited() {
            let poll = Poll::open()?;
            poll.watch(self.disk.notifier(), 0, &mut { Interest::NONE }, READ)?;
            self.limit = Limit::new(rates, &poll, 1)?;
            self.poll = Some(poll);
        }
        Ok(self)
    }

    /// Capacity in bytes that the guest sees.
    pub fn capacity_bytes(&self) -> u64 {
        let bytes = self.disk.geometry().bytes;
        bytes.saturating_sub(bytes % SECTOR_BYTES)
    }

    fn take_engines(&self) -> io::Result<Vec<Box<dyn Engine>>> {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |engine: &mut Box<dyn Engine>| engine.quiesce(Duration::ZERO);
        if home.len() != self.queue_sizes.len() || !home.iter_mut().all(idle) {
            let why = "the host has not finished the disk operations of the last driver";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
        }
        Ok(std::mem::take(&mut *home))
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.config.get(start..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The cache mode would be the only writable field, and it is not offered.
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(
            self.poll
                .as_ref()
                .map_or_else(|| self.disk.notifier(), AsFd::as_fd),
        )
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        let mut queues = with.queues.into_iter();
        let lanes = self
            .take_engines()?
            .into_iter()
            .map(|engine| Lane::new(queues.next().flatten(), engine))
            .collect();
        let shared = Shared {
            mem: with.mem,
            disk: Arc::clone(&self.disk),
            limits: Limits {
                sectors: self.disk.geometry().bytes / SECTOR_BYTES,
                features: with.features,
                read_only: self.read_only,
            },
            // Without a flush request each write must be stable when it completes.
            durable: with.features & feature::FLUSH == 0,
            id: self.id,
            limit: self.limit.clone(),
        };
        Ok(Box::new(RunningBlock::new(shared, lanes, Arc::clone(&self.home))))
    }
}

#[cfg(test)]
mod tests;
