//! One command that a session runs: its pipes, its process group, its end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Time between asking a command to end and ending it.
const GRACE: Duration = Duration::from_secs(5);
/// Exit code of a command that ran out of time, as in timeout(1).
const TIMED_OUT: i32 = 124;
const NOT_FOUND: i32 = 127;

/// What to run: fields separated by NUL are the time limit in seconds (0: none), the folder, the count of
/// environment settings, those settings, and the words of the command.
pub(crate) struct Request {
    limit: Option<Duration>,
    command: Command,
}

impl Request {
    /// Reads a request; `None` when it is malformed.
    pub(crate) fn parse(payload: &[u8]) -> Option<Request> {
        let text = std::str::from_utf8(payload).ok()?;
        let mut fields = text.split('\0');
        let seconds: f64 = fields.next()?.parse().ok()?;
        let folder = fields.next()?;
        let settings: usize = fields.next()?.parse().ok()?;
        let settings: Vec<&str> = fields.by_ref().take(settings).collect();
        let mut command = Command::new(fields.next()?);
        command.args(fields).current_dir(folder);
        command.envs(settings.iter().filter_map(|setting| setting.split_once('=')));
        let limit = (seconds > 0.0).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
        Some(Request { limit, command })
    }
}

/// A running command, leader of its own process group.
pub(crate) struct Running {
    pub(crate) input: Option<ChildStdin>,
    pub(crate) output: Option<ChildStdout>,
    pub(crate) errors: Option<ChildStderr>,
    /// Readable once the command has ended.
    pub(crate) ended: UnixStream,
    status: mpsc::Receiver<io::Result<ExitStatus>>,
    group: Pid,
    next_kill: Option<(Instant, Signal)>,
    timed_out: bool,
}

impl Running {
    /// Starts the command. Its pipes do not block on this side.
    pub(crate) fn start(mut request: Request) -> io::Result<Running> {
        request
            .command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = request.command.spawn()?;
        let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let pipes = [
            input.as_ref().map(AsFd::as_fd),
            output.as_ref().map(AsFd::as_fd),
            errors.as_ref().map(AsFd::as_fd),
        ];
        for pipe in pipes.into_iter().flatten() {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let (status, ended) = watch(child)?;
        let next_kill = request
            .limit
            .and_then(|limit| Instant::now().checked_add(limit))
            .map(|at| (at, Signal::SIGTERM));
        Ok(Running {
            input,
            output,
            errors,
            ended,
            status,
            group,
            next_kill,
            timed_out: false,
        })
    }

    /// Sends a signal to the whole group; one that has ended already is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = killpg(self.group, signal);
    }

    /// Milliseconds until [`Running::enforce`] must be called; -1: never.
    pub(crate) fn patience(&self) -> i32 {
        self.next_kill.map_or(-1, |(at, _)| {
            i32::try_from(at.saturating_duration_since(Instant::now()).as_millis())
                .unwrap_or(i32::MAX)
                .saturating_add(1)
        })
    }

    /// Ends a command that has used up its time: first SIGTERM, after five seconds SIGKILL.
    pub(crate) fn enforce(&mut self) {
        if let Some((_, signal)) = self.next_kill.filter(|(at, _)| *at <= Instant::now()) {
            self.timed_out = true;
            self.signal(signal);
            self.next_kill = Some((Instant::now() + GRACE, Signal::SIGKILL));
        }
    }

    /// The exit code as a shell would give it: 128 plus the signal that ended the command, 124 when its time was up.
    pub(crate) fn exit_code(&self) -> i32 {
        if self.timed_out {
            return TIMED_OUT;
        }
        match self.status.recv() {
            Ok(Ok(status)) => status
                .code()
                .or(status.signal().map(|signal| 128 + signal))
                .unwrap_or(NOT_FOUND),
            _ => NOT_FOUND,
        }
    }
}

type Status = mpsc::Receiver<io::Result<ExitStatus>>;

/// Waits for the child on a thread; the stream becomes readable when it has ended.
fn watch(mut child: Child) -> io::Result<(Status, UnixStream)> {
    let (here, there) = UnixStream::pair()?;
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = send.send(child.wait());
        drop(there);
    });
    Ok((receive, here))
}
