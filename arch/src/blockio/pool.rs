//! Disk I/O on plain blocking system calls: in the calling thread, or on a few threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::disk::call;
use super::flight::{Flight, Step};
use super::{Action, DROP_LIMIT, Done, Engine, Refused};
use crate::mem::SharedMem;

/// Most threads for one disk.
const MAX_THREADS: usize = 4;
/// Stack of such a thread in bytes; it holds a few frames and a system call.
const STACK_BYTES: usize = 64 << 10;

/// The threads that work for one disk. They start when there is work and end with the disk.
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
    idle: usize,
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
    submitted: Vec<Flight>,
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
        let result = call(file, &flight);
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

    /// Queues `flights` and makes sure that someone works on them: threads, or this one if the host has no
    /// room for a thread.
    fn assign(&self, flights: impl Iterator<Item = Flight>, outbox: &Arc<Outbox>) {
        let mut jobs = lock(&self.board.jobs);
        jobs.waiting
            .extend(flights.map(|flight| (flight, Arc::clone(outbox))));
        for _ in 0..jobs.waiting.len().min(MAX_THREADS) {
            self.board.more.notify_one();
        }
        while jobs.threads < MAX_THREADS && jobs.idle < jobs.waiting.len() && self.hire().is_ok() {
            jobs.threads = jobs.threads.saturating_add(1);
            jobs.idle = jobs.idle.saturating_add(1);
        }
        if jobs.threads == 0 {
            let waiting = mem::take(&mut jobs.waiting);
            drop(jobs);
            for (flight, outbox) in waiting {
                outbox.put(finish(&self.file, flight));
            }
        }
    }

    fn hire(&self) -> io::Result<()> {
        let (file, board) = (Arc::clone(&self.file), Arc::clone(&self.board));
        std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK_BYTES)
            .spawn(move || board.serve(&file))?;
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        lock(&self.board.jobs).closed = true;
        self.board.more.notify_all();
    }
}

impl Board {
    /// The life of one thread, which counts as idle when it begins.
    fn serve(&self, file: &File) {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some((flight, outbox)) = jobs.waiting.pop_front() {
                jobs.idle = jobs.idle.saturating_sub(1);
                drop(jobs);
                outbox.put(finish(file, flight));
                jobs = lock(&self.jobs);
                jobs.idle = jobs.idle.saturating_add(1);
            } else if jobs.closed {
                return;
            } else {
                jobs = self.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
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
            submitted: Vec::new(),
            depth: usize::from(depth),
            in_flight: 0,
            place,
        }
    }
}

impl Engine for Pool {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        if self.in_flight >= self.depth {
            return Err(Refused::Full);
        }
        self.submitted.push(Flight::new(mem, tag, action)?);
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(())
    }

    fn run(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        let before = done.len();
        if self.place == Place::Caller {
            let file = &self.crew.file;
            done.extend(self.submitted.drain(..).map(|flight| finish(file, flight)));
        } else {
            if !self.submitted.is_empty() {
                self.crew.assign(self.submitted.drain(..), &self.outbox);
            }
            done.append(&mut lock(&self.outbox.done));
        }
        let finished = done.len().saturating_sub(before);
        self.in_flight = self.in_flight.saturating_sub(finished);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        self.in_flight = self.in_flight.saturating_sub(self.submitted.len());
        self.submitted.clear();
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
