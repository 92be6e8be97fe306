//! A traced program: it stops at a few system calls, which can then be changed, answered or watched.
//!
//! A seccomp filter names the calls, so that all others run at full speed; ptrace needs neither a dynamic loader nor
//! the program's help, so static binaries work too. The thread that starts a program must be the one that serves it.
// UNSAFETY: ptrace, wait and the filter, which exist as C calls only.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

/// Thread id.
pub(crate) type Tid = libc::pid_t;
/// A thread's registers.
pub(crate) type Regs = libc::user_regs_struct;

/// System calls at which the program stops.
pub(crate) const CALLS: [i64; 4] = [libc::SYS_ioctl, libc::SYS_open, libc::SYS_openat, libc::SYS_mmap];

/// What a wait has found.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread is about to make one of [`CALLS`].
    Entry(Tid),
    /// A thread that was let go with [`Program::watch`] has come back from its call.
    Exit(Tid),
    /// A thread stopped for another reason; it goes on with this signal (0: none).
    Stop(Tid, i32),
    /// A thread has ended; for the first thread that is the program.
    Gone(Tid, Ended),
}

/// How a thread ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// The program under trace. It is killed when its tracer ends.
#[derive(Debug)]
pub(crate) struct Program {
    first: Tid,
    memory: File,
}

fn check(rc: libc::c_long) -> io::Result<libc::c_long> {
    if rc == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(rc)
    }
}

/// `SECCOMP_RET_TRACE` for [`CALLS`], `SECCOMP_RET_ALLOW` for the rest.
fn filter() -> Vec<libc::sock_filter> {
    const LOAD_NUMBER: (u16, u32) = (0x20, 0);
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let line = |code, k, jt| libc::sock_filter { code, jt, jf: 0, k };
    let mut program = vec![line(LOAD_NUMBER.0, LOAD_NUMBER.1, 0)];
    for (index, call) in CALLS.iter().enumerate() {
        let to_trace = u8::try_from(CALLS.len() - index).expect("a few calls");
        program.push(line(
            JUMP_IF_EQUAL,
            u32::try_from(*call).expect("a number"),
            to_trace,
        ));
    }
    program.push(line(RETURN, libc::SECCOMP_RET_ALLOW, 0));
    program.push(line(RETURN, libc::SECCOMP_RET_TRACE, 0));
    program
}

impl Program {
    /// Starts `command`, stopped before its first instruction.
    ///
    /// # Errors
    /// It cannot be started or traced.
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        let rules = filter();
        let before = move || {
            // SAFETY: neither call takes a pointer that is used.
            check(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) })?;
            // SAFETY: as above.
            check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
            let program = libc::sock_fprog {
                len: u16::try_from(rules.len()).unwrap_or(0),
                filter: rules.as_ptr().cast_mut(),
            };
            // SAFETY: `program` points at `rules`, which live through the call; the kernel copies them.
            check(unsafe {
                libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    0,
                    &raw const program,
                )
            })?;
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it neither allocates nor takes locks after the fork.
        unsafe { command.pre_exec(before) };
        let child = command.spawn()?;
        let first = Tid::try_from(child.id()).map_err(io::Error::other)?;
        let mut status = 0;
        // SAFETY: `status` is a live int that only this call writes.
        check(unsafe { libc::waitpid(first, &raw mut status, libc::__WALL) }.into())?;
        let options = libc::PTRACE_O_TRACESECCOMP
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_EXITKILL;
        request(libc::PTRACE_SETOPTIONS, first, options as usize)?;
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{first}/mem"))?;
        let program = Self { first, memory };
        program.resume(first, 0);
        Ok(program)
    }

    /// The first thread's id, which is the process's.
    pub(crate) fn first(&self) -> Tid {
        self.first
    }

    /// Waits for a thread, or for this one only.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn wait(&self, only: Option<Tid>) -> io::Result<Event> {
        let mut status = 0;
        let flags = libc::__WALL | libc::__WNOTHREAD;
        // SAFETY: `status` is a live int that only this call writes.
        let rc = unsafe { libc::waitpid(only.unwrap_or(-1), &raw mut status, flags) };
        let tid = Tid::try_from(check(rc.into())?).map_err(io::Error::other)?;
        if libc::WIFEXITED(status) {
            return Ok(Event::Gone(tid, Ended::Code(libc::WEXITSTATUS(status))));
        }
        if libc::WIFSIGNALED(status) {
            return Ok(Event::Gone(tid, Ended::Signal(libc::WTERMSIG(status))));
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        Ok(match (signal, event) {
            (_, libc::PTRACE_EVENT_SECCOMP) => Event::Entry(tid),
            (_, event) if event != 0 => Event::Stop(tid, 0),
            (signal, _) if signal == libc::SIGTRAP | 0x80 => Event::Exit(tid),
            // A new thread begins with a stop of the tracer's own making.
            (libc::SIGSTOP | libc::SIGTRAP, _) => Event::Stop(tid, 0),
            (signal, _) => Event::Stop(tid, signal),
        })
    }

    /// Lets a thread go on, with a signal unless it is 0. A thread that has been killed meanwhile is no matter.
    pub(crate) fn resume(&self, tid: Tid, signal: i32) {
        let _ = request(libc::PTRACE_CONT, tid, usize::try_from(signal).unwrap_or(0));
    }

    /// Lets a thread make its call, and stops it again behind it.
    pub(crate) fn watch(&self, tid: Tid, signal: i32) {
        let _ = request(libc::PTRACE_SYSCALL, tid, usize::try_from(signal).unwrap_or(0));
    }

    /// Registers of a stopped thread.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn regs(&self, tid: Tid) -> io::Result<Regs> {
        // SAFETY: all-zero bytes are valid registers.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        request(libc::PTRACE_GETREGS, tid, (&raw mut regs) as usize)?;
        Ok(regs)
    }

    /// Changes them.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn set_regs(&self, tid: Tid, regs: &Regs) -> io::Result<()> {
        request(libc::PTRACE_SETREGS, tid, ptr::from_ref(regs) as usize)
    }

    /// Sends a signal to the whole program.
    pub(crate) fn kill(first: Tid, signal: i32) {
        // SAFETY: no pointers.
        unsafe { libc::kill(first, signal) };
    }

    /// Fills `buffer` from the program's memory.
    ///
    /// # Errors
    /// Nothing is mapped there.
    pub(crate) fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(buffer, at)
    }

    /// Writes into the program's memory, even where the program itself may not.
    ///
    /// # Errors
    /// Nothing is mapped there.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, at)
    }
}

/// A ptrace request on a stopped thread; `data` is a number, or the address of what the request names.
fn request(what: libc::c_uint, tid: Tid, data: usize) -> io::Result<()> {
    // SAFETY: callers pass a number, or the address of a live struct of the type that `what` reads or writes, which
    // nothing else uses during the call.
    check(unsafe { libc::ptrace(what, tid, 0_usize, data) }).map(|_| ())
}
