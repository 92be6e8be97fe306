//! One system call of the program at which it has stopped.

use std::io;

use crate::trace::{Event, Program, Regs, Tid};

/// Below the stack, past what the ABI lets a function use there.
const SCRATCH_BELOW: u64 = 0x800;

/// A stopped call. It ends with [`Call::answer`], or goes on with [`Call::pass`].
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) program: &'a Program,
    pub(crate) tid: Tid,
    /// Registers as the program set them.
    pub(crate) regs: Regs,
    /// Another call was made in its place.
    ran: bool,
    changed: bool,
    /// Signals that arrived meanwhile.
    signals: Vec<i32>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(program: &'a Program, tid: Tid) -> io::Result<Self> {
        Ok(Self {
            program,
            tid,
            regs: program.regs(tid)?,
            ran: false,
            changed: false,
            signals: Vec::new(),
        })
    }

    /// A call that has been made: more can be made behind it.
    pub(crate) fn after(program: &'a Program, tid: Tid, regs: Regs) -> Self {
        Self {
            program,
            tid,
            regs,
            ran: true,
            changed: false,
            signals: Vec::new(),
        }
    }

    /// Its number.
    pub(crate) fn number(&self) -> i64 {
        self.regs.orig_rax.cast_signed()
    }

    /// Arguments as numbers.
    pub(crate) fn args(&self) -> [u64; 6] {
        let r = &self.regs;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
    }

    /// Reads an array from the program's memory.
    pub(crate) fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N], i32> {
        let mut buffer = [0; N];
        self.program.read(at, &mut buffer).map_err(|_| libc::EFAULT)?;
        Ok(buffer)
    }

    /// As far as it is mapped.
    pub(crate) fn vector(&self, at: u64, len: usize) -> Vec<u8> {
        let mut buffer = vec![0; len];
        while !buffer.is_empty() && self.program.read(at, &mut buffer).is_err() {
            let shorter = buffer.len().saturating_sub(1) & !0xfff;
            buffer.truncate(shorter);
        }
        buffer
    }

    pub(crate) fn u32(&self, at: u64) -> Result<u32, i32> {
        Ok(u32::from_ne_bytes(self.bytes(at)?))
    }

    pub(crate) fn u64(&self, at: u64) -> Result<u64, i32> {
        Ok(u64::from_ne_bytes(self.bytes(at)?))
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), i32> {
        self.program.write(at, bytes).map_err(|_| libc::EFAULT)
    }

    /// Puts `bytes` where the thread will not miss them, until its next call.
    pub(crate) fn scratch(&self, bytes: &[u8]) -> io::Result<u64> {
        let at = (self.regs.rsp - SCRATCH_BELOW - bytes.len() as u64) & !0xf;
        self.program.write(at, bytes)?;
        Ok(at)
    }

    /// Changes argument `index` (0 to 2) of what will be made.
    pub(crate) fn change(&mut self, index: usize, value: u64) -> io::Result<()> {
        let mut regs = self.regs;
        *[&mut regs.rdi, &mut regs.rsi, &mut regs.rdx][index] = value;
        self.changed = true;
        self.program.set_regs(self.tid, &regs)
    }

    /// Makes another call first, or instead; its result.
    pub(crate) fn run(&mut self, number: i64, args: [u64; 3]) -> io::Result<i64> {
        let mut regs = self.regs;
        [regs.rdi, regs.rsi, regs.rdx] = args;
        if self.ran {
            // Back onto the instruction, which stops at the filter once more.
            regs.rip -= 2;
            regs.rax = number.cast_unsigned();
            self.program.set_regs(self.tid, &regs)?;
            self.program.resume(self.tid, 0);
            self.until(|event| matches!(event, Event::Entry(_)))?;
        } else {
            regs.orig_rax = number.cast_unsigned();
            self.program.set_regs(self.tid, &regs)?;
        }
        self.program.watch(self.tid, 0);
        self.until(|event| matches!(event, Event::Exit(_)))?;
        self.ran = true;
        Ok(self.program.regs(self.tid)?.rax.cast_signed())
    }

    fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> io::Result<()> {
        loop {
            match self.program.wait(Some(self.tid))? {
                event if wanted(&event) => return Ok(()),
                Event::Stop(tid, signal) => {
                    if signal != 0 {
                        self.signals.push(signal);
                    }
                    self.program.watch(tid, 0);
                }
                event => return Err(io::Error::other(format!("{event:?} in the middle of a call"))),
            }
        }
    }

    /// Ends the call with this result without the kernel having seen it.
    pub(crate) fn answer(self, result: i64) -> io::Result<()> {
        let mut regs = self.regs;
        regs.orig_rax = u64::MAX;
        regs.rax = result.cast_unsigned();
        self.program.set_regs(self.tid, &regs)?;
        // At most one signal is pending in practice: a kick.
        self.program
            .resume(self.tid, self.signals.first().copied().unwrap_or(0));
        Ok(())
    }

    /// Lets the kernel have it. Registers that were changed must be put back: see [`Call::watch`].
    pub(crate) fn pass(self) {
        debug_assert!(!self.changed);
        self.program.resume(self.tid, 0);
    }

    /// The same, and the thread stops behind it.
    pub(crate) fn watch(self) {
        self.program.watch(self.tid, 0);
    }
}
