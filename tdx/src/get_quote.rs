//! A guest's requests for quotes: its TDREPORT goes to the host's quote generation service (QGS), the quote comes back
//! into the same shared buffer some time later (Guest-Hypervisor Communication Interface for Intel TDX 1.5,
//! "TDG.VP.VMCALL<GetQuote>").
//!
//! A vCPU thread only looks at the buffer and marks it; one thread per guest talks to the service. Nothing is pinned
//! while it does: a guest may take its buffer away at any time, and then the quote is dropped.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use arch::addr::{Gpa, PageRange};
use arch::blockio::Enter;
use arch::mem::SharedMem;
use vm_memory::{Bytes, GuestAddress};

use crate::bytes::{le32, le64};
use crate::qgs::{Address, Qgs, QgsError, Stop, TD_REPORT_BYTES, TdReport};

/// What the guest gets for the call itself (GHCI, "TDG.VP.VMCALL Completion-Status Codes").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ReplyCode {
    /// Taken; the answer comes through the buffer.
    Success = 0,
    /// Too many requests, or one for this buffer, are in flight.
    Retry = 1,
    /// No buffer that can be used.
    InvalidOperand = 0x8000_0000_0000_0000,
}

/// State of a request, in its buffer (GHCI, "GetQuote Status Code").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Status {
    /// The quote is in the buffer.
    Success = 0,
    /// The service is at work.
    InFlight = u64::MAX,
    /// The service could not make a quote of this report, or one that fits.
    Error = 0x8000_0000_0000_0000,
    /// There is no service, or it does not answer.
    Unavailable = 0x8000_0000_0000_0001,
}

/// Longest buffer that is taken; Linux has buffers of this length.
pub const MOST_BUFFER_BYTES: u64 = 128 << 10;
/// Requests that one guest may have in flight.
pub const MOST_IN_FLIGHT: usize = 8;
/// Time from a request to its answer at the latest. Linux waits for 30 seconds.
pub const MOST_TIME: Duration = Duration::from_secs(25);

/// Time between two lines of the log about failures, which a guest can cause without end.
const QUIET_TIME: Duration = Duration::from_secs(10);

/// The start of a request's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// See [`Status`]; the guest's value means nothing.
    pub status: u64,
    /// Bytes of the quote; the guest's value means nothing.
    pub out_bytes: u32,
}

/// A buffer that holds no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Shorter than a header.
    #[error("a request has at least {} bytes", Header::BYTES)]
    Short,
    /// Not version 1.
    #[error("version {0} of the request's format, 1 is the only one")]
    Version(u64),
    /// The input is no TDREPORT.
    #[error("{0} bytes of input, a TDREPORT has {TD_REPORT_BYTES}")]
    Input(u32),
}

impl Header {
    /// Length in bytes.
    pub const BYTES: usize = 24;
    const STATUS: u64 = 8;
    const OUT_BYTES: u64 = 20;

    /// Reads the header of a request.
    ///
    /// # Errors
    /// See [`BadHeader`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BadHeader> {
        let fields = (le64(bytes, 0), le64(bytes, 8), le32(bytes, 16), le32(bytes, 20));
        let (Some(version), Some(status), Some(in_bytes), Some(out_bytes)) = fields else {
            return Err(BadHeader::Short);
        };
        if version != 1 {
            return Err(BadHeader::Version(version));
        }
        if usize::try_from(in_bytes) != Ok(TD_REPORT_BYTES) {
            return Err(BadHeader::Input(in_bytes));
        }
        Ok(Self { status, out_bytes })
    }
}

/// Tells the guest that a buffer has been filled; called on the service's thread or a vCPU's, never under a lock.
pub type Notify = dyn Fn() + Send + Sync;

/// Where quotes come from, and what the thread that fetches them does first: give up all else. If that fails, nobody is
/// asked.
#[derive(Clone)]
pub struct Source {
    /// The QGS.
    pub address: Address,
    /// Called on the thread.
    pub enter: Enter,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.address).finish()
    }
}

/// The buffers of the requests in flight.
#[derive(Clone, Debug, Default)]
struct Flights(Arc<Mutex<Vec<PageRange>>>);

/// One of them; dropping it makes room for another.
#[derive(Debug)]
struct Slot {
    flights: Flights,
    buffer: PageRange,
}

impl Flights {
    fn take(&self, buffer: PageRange) -> Option<Slot> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MOST_IN_FLIGHT || all.iter().any(|other| other.overlaps(buffer)) {
            return None;
        }
        all.push(buffer);
        drop(all);
        Some(Slot {
            flights: self.clone(),
            buffer,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut all = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|buffer| *buffer != self.buffer);
    }
}

/// A request on its way to the service.
#[derive(Debug)]
struct Job {
    slot: Slot,
    report: Box<TdReport>,
    until: Instant,
}

/// Serves one guest's requests for as long as it lives. Dropping it abandons those in flight: their buffers are not
/// touched again.
pub struct QuoteService {
    desk: Arc<Desk>,
    flights: Flights,
    worker: Option<Worker>,
}

/// Where answers are written.
struct Desk {
    shared: SharedMem,
    notify: Box<Notify>,
}

#[derive(Debug)]
struct Worker {
    queue: Option<SyncSender<Job>>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for QuoteService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuoteService")
            .field("flights", &self.flights)
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

impl QuoteService {
    /// A service for the guest whose shared memory this is. Without a source every request is answered at once, with
    /// [`Status::Unavailable`].
    ///
    /// # Errors
    /// The process has no more threads or descriptors.
    pub fn new(shared: SharedMem, source: Option<Source>, notify: Box<Notify>) -> io::Result<Self> {
        let desk = Arc::new(Desk { shared, notify });
        let worker = source.map(|source| Worker::start(source, Arc::clone(&desk)));
        Ok(Self {
            desk,
            flights: Flights::default(),
            worker: worker.transpose()?,
        })
    }

    /// Takes the request in the `size` bytes at `gpa`, both as the guest gave them, and never blocks on the service.
    pub fn request(&self, gpa: u64, size: u64) -> ReplyCode {
        let Some(buffer) = buffer(gpa, size) else {
            return ReplyCode::InvalidOperand;
        };
        let Some(slot) = self.flights.take(buffer) else {
            return ReplyCode::Retry;
        };
        let Some(report) = self.desk.open(buffer) else {
            return ReplyCode::InvalidOperand;
        };
        let now = Instant::now();
        let job = Job {
            slot,
            report,
            until: now.checked_add(MOST_TIME).unwrap_or(now),
        };
        let refused = match self.worker.as_ref().and_then(|worker| worker.queue.as_ref()) {
            Some(queue) => queue.try_send(job).err(),
            None => Some(TrySendError::Disconnected(job)),
        };
        // The queue has a place for each flight, so it refuses only if its thread is gone.
        if let Some(TrySendError::Full(job) | TrySendError::Disconnected(job)) = refused {
            self.desk.close(job.slot, Err(Status::Unavailable));
        }
        ReplyCode::Success
    }
}

/// The buffer that a guest names, if it can hold a request. RAM that is private is seen later.
fn buffer(gpa: u64, size: u64) -> Option<PageRange> {
    let range = PageRange::new(Gpa(gpa), size).ok()?;
    (size <= MOST_BUFFER_BYTES).then_some(range)
}

impl Desk {
    /// Reads the request once and marks its buffer; `None` if a page of it is not shared RAM, or it holds no request.
    fn open(&self, buffer: PageRange) -> Option<Box<TdReport>> {
        let _batch = self.shared.batch();
        if !self.shared.all_shared(buffer.start(), buffer.bytes()) {
            return None;
        }
        let mut request = [0; Header::BYTES + TD_REPORT_BYTES];
        let start = GuestAddress(buffer.start().0);
        self.shared.read_slice(&mut request, start).ok()?;
        let (header, report) = request.split_first_chunk::<{ Header::BYTES }>()?;
        Header::parse(header).ok()?;
        let report: &TdReport = report.first_chunk()?;
        self.set_status(buffer, Status::InFlight)?;
        Some(Box::new(*report))
    }

    fn set_status(&self, buffer: PageRange, status: Status) -> Option<()> {
        let at = GuestAddress(buffer.start().0.checked_add(Header::STATUS)?);
        self.shared.store(status as u64, at, Ordering::Release).ok()
    }

    /// Leaves the answer in the buffer, unless the guest has taken it away, and tells the guest.
    fn close(&self, slot: Slot, outcome: Result<&[u8], Status>) {
        if self.write(slot, outcome).is_some() {
            (self.notify)();
        } else {
            log::debug!("the guest took the buffer of its quote away; the quote is dropped");
        }
    }

    fn write(&self, slot: Slot, outcome: Result<&[u8], Status>) -> Option<()> {
        let buffer = slot.buffer;
        let _batch = self.shared.batch();
        let start = buffer.start().0;
        if !self.shared.all_shared(buffer.start(), buffer.bytes()) {
            return None;
        }
        // Memory that became private and shared again in between is zero, and no longer what the guest lent.
        let status = GuestAddress(start.checked_add(Header::STATUS)?);
        if self.shared.load::<u64>(status, Ordering::Acquire).ok()? != Status::InFlight as u64 {
            return None;
        }
        let (quote, status) = match outcome {
            Ok(quote) => (quote, Status::Success),
            Err(status) => (&[][..], status),
        };
        let data = GuestAddress(start.checked_add(Header::BYTES as u64)?);
        let out_bytes = GuestAddress(start.checked_add(Header::OUT_BYTES)?);
        let length = u32::try_from(quote.len()).ok()?;
        self.shared.write_slice(quote, data).ok()?;
        self.shared.write_slice(&length.to_le_bytes(), out_bytes).ok()?;
        // Before the guest can see that it may ask again.
        drop(slot);
        // Last: the guest looks at the rest only once it sees the status change.
        self.set_status(buffer, status)
    }
}

impl Worker {
    fn start(source: Source, desk: Arc<Desk>) -> io::Result<Self> {
        let Source { address, enter } = source;
        let qgs = Qgs::new(address);
        let (queue, jobs) = sync_channel(MOST_IN_FLIGHT);
        let stop = Arc::new(Stop::new()?);
        let seen = Arc::clone(&stop);
        let thread = Builder::new()
            .name("quotes".into())
            .spawn(move || match enter() {
                Ok(()) => work(&qgs, &desk, &jobs, &seen),
                Err(e) => refuse(&desk, &jobs, &e),
            })?;
        Ok(Self {
            queue: Some(queue),
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.raise();
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread for quotes panicked; this is a bug of cvmm");
        }
    }
}

/// When something was last said.
#[derive(Debug, Default)]
struct Ration(Option<Instant>);

impl Ration {
    /// True if it may be said at `now`; then it is quiet for [`QUIET_TIME`].
    fn admits(&mut self, now: Instant) -> bool {
        let admitted = self
            .0
            .is_none_or(|last| now.saturating_duration_since(last) >= QUIET_TIME);
        if admitted {
            self.0 = Some(now);
        }
        admitted
    }
}

fn work(qgs: &Qgs, desk: &Desk, jobs: &Receiver<Job>, stop: &Stop) {
    let mut failures = Ration::default();
    for job in jobs {
        let bytes = job.slot.buffer.bytes();
        let room = usize::try_from(bytes).unwrap_or(0).saturating_sub(Header::BYTES);
        let outcome = qgs.quote(&job.report, room, job.until, stop);
        if stop.raised() {
            return;
        }
        if let Err(e) = &outcome
            && failures.admits(Instant::now())
        {
            log::warn!("quote service {}: {e}", qgs.address());
        }
        desk.close(job.slot, outcome.as_deref().map_err(QgsError::status));
    }
}

/// What is left for a thread that could not give up what it must: no word to the outside.
fn refuse(desk: &Desk, jobs: &Receiver<Job>, cause: &io::Error) {
    log::error!("the guest gets no quotes, because their thread cannot be confined: {cause}");
    for job in jobs {
        desk.close(job.slot, Err(Status::Unavailable));
    }
}

#[cfg(test)]
mod lies;
#[cfg(test)]
mod tests;
