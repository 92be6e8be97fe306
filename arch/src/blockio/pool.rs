//! Disk I/O on plain blocking system calls: in the calling thread, or on a few threads that exist from the start, so that
//! nobody who serves a guest has to be able to make threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::disk::call;
use super::flight::{Flight, Step, Work};
use super::{Action, DROP_LIMIT, Done, Engine, Enter, Refused};
use crate::mem::SharedMem;

/// Threads for one disk.
const THREADS: usize = 4;
/// Stack of such a thread in bytes; it holds a few frames and a system call.
const STACK_BYTES: usize = 64 << 10;

/// The threads that work for one disk. They end with it.
#[derive(Debug)]
pub(super) struct Crew {
    file: Arc<File>,
    board: Arc<Board>,
}

#[derive(Debug, Default)]
struct Board {
    jobs: Mutex<Jobs>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<(Flight, Arc<Outbox>)>,
    threads: usize,
    closed: bool,
}

/// Where one engine's finished operations gather.
#[derive(Debug)]
struct Outbox {
    done: Mutex<Vec<Done>>,
    arrived: Condvar,
    notify: Arc<EventFd>,
}

/// Who makes the system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The thread that calls [`Engine::run`].
    Caller,
    /// The crew.
    Threads,
}

/// One queue's engine.
#[derive(Debug)]
pub(super) struct Pool {
    crew: Arc<Crew>,
    outbox: Arc<Outbox>,
    submitted: VecDeque<Flight>,
    depth: usize,
    in_flight: usize,
    place: Place,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `flight` to its end in this thread.
fn finish(file: &File, mut flight: Flight) -> Done {
    loop {
        let result = call(file, &flight, u64::MAX);
        if let Step::Over(result) = flight.settle(result) {
            return flight.done(result);
        }
    }
}

impl Crew {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self {
            file,
            board: Arc::default(),
        }
    }

    /// Starts the threads, once. Each calls `enter` first and ends if that fails; as many as the host has room for.
    pub(super) fn staff(&self, enter: &Enter) {
        let mut jobs = lock(&self.board.jobs);
        while jobs.threads < THREADS {
            if let Err(e) = self.hire(enter) {
                log::warn!("a disk has {} of {THREADS} threads: {e}", jobs.threads);
                return;
            }
            jobs.threads = jobs.threads.saturating_add(1);
        }
    }

    fn hire(&self, enter: &Enter) -> io::Result<()> {
        let (file, board, enter) = (Arc::clone(&self.file), Arc::clone(&self.board), Arc::clone(enter));
        std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK_BYTES)
            .spawn(move || match enter() {
                Ok(()) => board.serve(&file),
                Err(e) => board.leave(&file, &e),
            })?;
        Ok(())
    }

    /// Queues `flights` for the threads, or does them here if there are none.
    fn assign(&self, flights: impl Iterator<Item = Flight>, outbox: &Arc<Outbox>) {
        let mut jobs = lock(&self.board.jobs);
        jobs.waiting
            .extend(flights.map(|flight| (flight, Arc::clone(outbox))));
        for _ in 0..jobs.waiting.len().min(THREADS) {
            self.board.more.notify_one();
        }
        if jobs.threads == 0 {
            let waiting = mem::take(&mut jobs.waiting);
            drop(jobs);
            finish_all(&self.file, waiting);
        }
    }

    /// Takes back what no thread has begun for `outbox`; says how much.
    fn recall(&self, outbox: &Arc<Outbox>) -> usize {
        let mut jobs = lock(&self.board.jobs);
        let before = jobs.waiting.len();
        jobs.waiting.retain(|(_, to)| !Arc::ptr_eq(to, outbox));
        before.saturating_sub(jobs.waiting.len())
    }
}

fn finish_all(file: &File, waiting: VecDeque<(Flight, Arc<Outbox>)>) {
    for (flight, outbox) in waiting {
        outbox.put(finish(file, flight));
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        lock(&self.board.jobs).closed = true;
        self.board.more.notify_all();
    }
}

impl Board {
    /// The life of one thread.
    fn serve(&self, file: &File) {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some((flight, outbox)) = jobs.waiting.pop_front() {
                drop(jobs);
                outbox.put(finish(file, flight));
                jobs = lock(&self.jobs);
            } else if jobs.closed {
                return;
            } else {
                jobs = self.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The end of a thread that could not begin. The last one leaves no work behind.
    fn leave(&self, file: &File, why: &io::Error) {
        log::error!("a thread for disk I/O cannot start: {why}");
        let mut jobs = lock(&self.jobs);
        jobs.threads = jobs.threads.saturating_sub(1);
        if jobs.threads == 0 {
            let waiting = mem::take(&mut jobs.waiting);
            drop(jobs);
            finish_all(file, waiting);
        }
    }
}

impl Outbox {
    fn put(&self, done: Done) {
        let mut list = lock(&self.done);
        list.push(done);
        self.arrived.notify_all();
        if list.len() == 1 {
            // The counter is full only if it is readable already.
            let _full = self.notify.write(1);
        }
    }
}

impl Pool {
    pub(super) fn new(crew: Arc<Crew>, notify: Arc<EventFd>, depth: u16, place: Place) -> Self {
        Self {
            crew,
            outbox: Arc::new(Outbox {
                done: Mutex::default(),
                arrived: Condvar::new(),
                notify,
            }),
            submitted: VecDeque::new(),
            depth: usize::from(depth),
            in_flight: 0,
            place,
        }
    }

    /// Does what was submitted in this thread as far as `left` goes; true if some is left.
    fn work(&mut self, done: &mut Vec<Done>, left: &mut u64) -> bool {
        while let Some(flight) = self.submitted.front_mut() {
            if *left == 0 {
                return true;
            }
            let allocates = matches!(flight.work(), Work::Allocate { .. });
            let result = call(&self.crew.file, flight, *left);
            *left = match u64::try_from(result) {
                _ if allocates => 0,
                Ok(moved) => left.saturating_sub(moved),
                Err(_) => *left,
            };
            if let Step::Over(result) = flight.settle(result) {
                let over = self.submitted.pop_front();
                done.extend(over.map(|flight| flight.done(result)));
            }
        }
        false
    }
}

impl Engine for Pool {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        if self.in_flight >= self.depth {
            return Err(Refused::Full);
        }
        self.submitted.push_back(Flight::new(mem, tag, action)?);
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(())
    }

    fn run(&mut self, done: &mut Vec<Done>, copies: &mut u64) -> io::Result<bool> {
        let before = done.len();
        let mut more = false;
        if self.place == Place::Caller {
            more = self.work(done, copies);
        } else {
            if !self.submitted.is_empty() {
                self.crew.assign(self.submitted.drain(..), &self.outbox);
            }
            done.append(&mut lock(&self.outbox.done));
        }
        let finished = done.len().saturating_sub(before);
        self.in_flight = self.in_flight.saturating_sub(finished);
        Ok(more)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        self.in_flight = self.in_flight.saturating_sub(self.submitted.len());
        self.submitted.clear();
        let recalled = self.crew.recall(&self.outbox);
        self.in_flight = self.in_flight.saturating_sub(recalled);
        let until = Instant::now().checked_add(limit);
        let mut done = lock(&self.outbox.done);
        loop {
            self.in_flight = self.in_flight.saturating_sub(mem::take(&mut *done).len());
            if self.in_flight == 0 {
                return true;
            }
            let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            let waited = self.outbox.arrived.wait_timeout(done, left);
            done = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.quiesce(DROP_LIMIT) {
            log::warn!("the host has not finished {} disk operations", self.in_flight);
        }
    }
}
