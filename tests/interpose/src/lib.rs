//! Runs an unmodified program, `cvmm`, on a host with SNP or TDX that is a model: its KVM ioctls are intercepted
//! and answered as `kernel-contract.md` says, by the models of the crates `snp` and `tdx`; an ordinary VM of the real
//! KVM stands behind, so that the guest's first instructions really run. Protects nothing; for tests only.
//!
//! Linux on x86-64 only. `/dev/kvm` must exist.

mod call;
mod host;
mod machine;
pub mod place;
mod scenario;
mod snp_vm;
mod state;
mod tables;
mod tdcall;
mod tdx_vm;
mod trace;
pub mod vm;

use std::fs::{self, File};
use std::io;
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

pub use machine::Ran;
pub use scenario::{Progress, Scenario};
pub use tdcall::{INFO, PAGE_ACCEPT, RTMR_EXTEND, TdCall};
pub use trace::Ended;

use host::Host;
use trace::{Event, Program};

/// How a run went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How the program ended; killed by SIGKILL if it was too slow.
    pub ended: Ended,
    /// What it printed.
    pub stdout: String,
    /// What it said went wrong.
    pub stderr: String,
    /// Launch commands in order, each with its errno or 0.
    pub commands: Vec<(String, i32)>,
    /// Returns of `KVM_RUN` in order.
    pub exits: Vec<Ran>,
    /// MRTD or SNP launch digest of the last VM.
    pub measurement: Option<[u8; 48]>,
    /// RTMRs of the last VM, if it is a TD.
    pub rtmrs: Option<[[u8; 48]; 4]>,
    /// TDCALLs of the last VM in order.
    pub tdcalls: Vec<TdCall>,
}

impl Outcome {
    /// The exit code.
    pub fn code(&self) -> Option<i32> {
        match self.ended {
            Ended::Code(code) => Some(code),
            Ended::Signal(_) => None,
        }
    }

    /// Names of the launch commands, without what they were given.
    pub fn command_names(&self) -> Vec<&str> {
        self.commands
            .iter()
            .filter_map(|(line, _)| line.split(' ').next())
            .collect()
    }
}

/// Runs `command` on the host of `scenario` until it ends.
///
/// # Errors
/// It cannot be started or traced.
pub fn run(mut command: Command, scenario: Scenario) -> io::Result<Outcome> {
    let (out, err) = (scenario.root.join("stdout"), scenario.root.join("stderr"));
    command.stdout(File::create(&out)?).stderr(File::create(&err)?);
    let limit = scenario.limit;
    let program = Program::start(&mut command)?;
    let first = program.first();
    let (done, waits) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if waits.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            Program::kill(first, libc::SIGKILL);
        }
    });
    let mut host = Host::new(scenario);
    let ended = serve(&program, &mut host);
    drop(done);
    let _ = watchdog.join();
    Ok(Outcome {
        ended: ended?,
        stdout: fs::read_to_string(out)?,
        stderr: fs::read_to_string(err)?,
        rtmrs: host.td().map(|td| td.rtmrs),
        tdcalls: host.td().map(|td| td.calls.clone()).unwrap_or_default(),
        measurement: host.machines.last().and_then(machine::Machine::measurement),
        commands: host.commands,
        exits: host.exits,
    })
}

fn serve(program: &Program, host: &mut Host) -> io::Result<Ended> {
    // A thread that is killed under our hands answers ESRCH; its end is reported next.
    let survive = |result: io::Result<()>| match result {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    };
    let mut asked = false;
    loop {
        match program.wait(None)? {
            Event::Entry(tid) => survive(host.enter(program, tid))?,
            Event::Exit(tid) => survive(host.leave(program, tid))?,
            Event::Stop(tid, signal) => host.stopped(program, tid, signal),
            Event::Gone(tid, ended) if tid == program.first() => return Ok(ended),
            Event::Gone(..) => {}
        }
        if !asked && host.enough() {
            asked = true;
            Program::kill(program.first(), libc::SIGKILL);
        }
    }
}
