//! Disk I/O on `io_uring`: one system call starts a whole batch, and completions are read from memory.
// UNSAFETY: the kernel follows pointers in submission entries until it posts their completion.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, register::Restriction};
use vmm_sys_util::eventfd::EventFd;

use super::flight::{Flight, PIECE_BYTES, Step, Work};
use super::{Action, DROP_LIMIT, Done, Engine, Refused};
use crate::mem::SharedMem;

/// The disk is the only file that the ring knows, under this number.
const DISK: Fixed = Fixed(0);

/// One queue's ring.
pub(super) struct Uring {
    ring: IoUring,
    /// Operations in flight, by the number in their `user_data`. It grows to as many as were ever in flight
    /// at once, at most `depth`.
    flights: Vec<Option<Flight>>,
    /// Numbers without a flight.
    free: Vec<u32>,
    depth: usize,
    notify: Arc<EventFd>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for `depth` operations on `file` that can do nothing else, even if this process is taken over.
    pub(super) fn new(file: &File, notify: Arc<EventFd>, depth: u16) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring: IoUring = IoUring::builder()
            .setup_r_disabled()
            .setup_submit_all()
            .build(u32::from(depth))?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(notify.as_raw_fd())?;
        let mut allowed = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_allowed(Flags::ASYNC.bits()),
        ];
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            flights: Vec::new(),
            free: Vec::new(),
            depth: usize::from(depth),
            notify,
        })
    }

    /// Queues the next system call of flight `number`.
    fn issue(&mut self, number: u32) {
        let Some(Some(flight)) = self.flights.get(number as usize) else {
            return;
        };
        let entry = entry(flight).user_data(u64::from(number));
        // SAFETY: `entry` points at the flight's list of pieces, a heap block that stays in place until the
        // completion, and through it at guest memory that the flight keeps mapped and pinned. A flight leaves
        // `self.flights` only after its completion, or never (see `drop`).
        let full = unsafe { self.ring.submission().push(&entry) };
        // There is an entry for each flight, and a flight has one entry at most.
        debug_assert!(full.is_ok(), "submission queue is full");
    }

    /// Starts what is queued.
    fn start(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            let code = match self.ring.submit() {
                Ok(0) => libc::EAGAIN,
                Ok(_) => continue,
                Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
            };
            match code {
                libc::EINTR => {}
                libc::EAGAIN | libc::EBUSY | libc::ENOMEM => {
                    // Whoever watches the notifier comes back and tries again.
                    let _full = self.notify.write(1);
                    return Ok(());
                }
                _ => return Err(io::Error::from_raw_os_error(code)),
            }
        }
        Ok(())
    }

    /// Takes completions; true if the rest of a flight was queued.
    fn harvest(&mut self, done: &mut Vec<Done>) -> bool {
        let mut again = false;
        loop {
            let next = self.ring.completion().next();
            let Some(completion) = next else { return again };
            let Ok(number) = u32::try_from(completion.user_data()) else {
                continue;
            };
            let Some(slot) = self.flights.get_mut(number as usize) else {
                continue;
            };
            let Some(mut flight) = slot.take() else {
                continue;
            };
            match flight.settle(completion.result()) {
                Step::Over(result) => {
                    self.free.push(number);
                    done.push(flight.done(result));
                }
                Step::Again => {
                    *slot = Some(flight);
                    self.issue(number);
                    again = true;
                }
            }
        }
    }

    /// Waits for one completion or `limit`.
    fn wait(&mut self, limit: Duration) -> io::Result<()> {
        let limit = Timespec::from(limit);
        let args = SubmitArgs::new().timespec(&limit);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(e),
            },
        }
    }
}

fn entry(flight: &Flight) -> Entry {
    let pieces = flight.pieces();
    // At most `MAX_PIECES`.
    let count = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
    // What the page cache holds is copied by whoever submits, who holds up conversions: one of the kernel's threads for
    // what is large.
    let is_large = flight.front(PIECE_BYTES as u64).len() < pieces.len();
    let flags = if is_large { Flags::ASYNC } else { Flags::empty() };
    let entry = match flight.work() {
        Work::Read { offset } => opcode::Readv::new(DISK, pieces.as_ptr(), count)
            .offset(offset)
            .build(),
        Work::Write { offset, flags } => opcode::Writev::new(DISK, pieces.as_ptr(), count)
            .offset(offset)
            .rw_flags(flags)
            .build(),
        Work::Flush => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        Work::Allocate {
            offset, bytes, mode, ..
        } => opcode::Fallocate::new(DISK, bytes)
            .offset(offset)
            .mode(mode)
            .build(),
    };
    entry.flags(flags)
}

impl Engine for Uring {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        if self.in_flight() >= self.depth {
            return Err(Refused::Full);
        }
        let flight = Some(Flight::new(mem, tag, action)?);
        let number = match self.free.pop() {
            Some(number) => {
                if let Some(slot) = self.flights.get_mut(number as usize) {
                    *slot = flight;
                }
                number
            }
            None => {
                self.flights.push(flight);
                // At most `depth`, which is 16 bits.
                u32::try_from(self.flights.len().saturating_sub(1)).unwrap_or(u32::MAX)
            }
        };
        self.issue(number);
        Ok(())
    }

    fn run(&mut self, done: &mut Vec<Done>, _copies: &mut u64) -> io::Result<bool> {
        // What completes during the submission is taken right here and needs no wake-up.
        self.ring.completion().disable_eventfd();
        let mut result = self.start();
        while self.harvest(done) && result.is_ok() {
            result = self.start();
        }
        self.ring.completion().enable_eventfd();
        // Either the kernel saw the flag, or this sees the completion.
        fence(Ordering::SeqCst);
        if self.harvest(done) {
            result = result.and(self.start());
        }
        result.map(|()| false)
    }

    fn in_flight(&self) -> usize {
        self.flights.len().saturating_sub(self.free.len())
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        let until = Instant::now().checked_add(limit);
        let mut forgotten = Vec::new();
        loop {
            // What came short, or was never begun, would not end by itself.
            let begun = self.run(&mut forgotten, &mut 0);
            forgotten.clear();
            if self.in_flight() == 0 {
                return true;
            }
            let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() || begun.and_then(|_| self.wait(left)).is_err() {
                return false;
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if !self.quiesce(DROP_LIMIT) {
            log::warn!("the host has not finished {} disk operations", self.in_flight());
            // The kernel may still write to their memory: it stays mapped and pinned for ever.
            std::mem::forget(std::mem::take(&mut self.flights));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn the_ring_serves_its_disk_and_nothing_else() {
        let file = File::open("/proc/self/exe").unwrap();
        let notify = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut uring = match Uring::new(&file, notify, 4) {
            Ok(uring) => uring,
            Err(e) => {
                eprintln!("SKIPPED: io_uring is not available here: {e}");
                return;
            }
        };
        let fd = io_uring::types::Fd(file.as_raw_fd());
        let entries = [
            (opcode::Fsync::new(DISK).build(), 0),
            (opcode::Fsync::new(fd).build(), -libc::EACCES),
            (opcode::Nop::new().build(), -libc::EACCES),
            (opcode::Close::new(fd).build(), -libc::EACCES),
        ];
        for (entry, expected) in entries {
            // SAFETY: none of the entries names memory.
            unsafe { uring.ring.submission().push(&entry) }.unwrap();
            uring.ring.submit_and_wait(1).unwrap();
            let result = uring.ring.completion().next().unwrap().result();
            assert_eq!(result, expected, "{entry:?}");
        }
        let files = uring.ring.submitter().register_files_update(0, &[0]);
        assert_eq!(files.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
