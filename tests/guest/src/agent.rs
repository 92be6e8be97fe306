//! Runs commands in L1 for `scripts/rig`: one session at a time on each virtio-serial port named `rig.N`.
//!
//! Ports are opened without blocking: a write to a port whose host has gone would otherwise wait for the next one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;

use crate::frame;
use crate::process::{Request, Running};

/// Longest time without looking whether a host has connected, in milliseconds.
const IDLE: u16 = 2000;
const RETRY: Duration = Duration::from_secs(1);
/// Bytes held for a slow reader before the other side is left to wait.
const BACKLOG: usize = 256 << 10;
const CHUNK: usize = 32 << 10;

/// Serves all ports for ever.
pub(crate) fn run() -> io::Result<()> {
    let ports = ports()?;
    if ports.is_empty() {
        return Err(io::Error::other("no virtio-serial port named rig.N"));
    }
    let threads: Vec<_> = ports
        .into_iter()
        .map(|port| thread::spawn(move || serve(&port)))
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn ports() -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.starts_with("rig.") {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    Ok(found)
}

fn serve(port: &Path) {
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(port);
        let outcome = opened.and_then(|file| Session::new(file)?.run());
        if let Err(error) = outcome {
            println!("rig agent: {}: {error}", port.display());
        }
        thread::sleep(RETRY);
    }
}

struct Session {
    port: File,
    /// Edge-triggered: a port without a host is always ready, which poll would report at once and for ever.
    changes: Epoll,
    from_host: Vec<u8>,
    to_host: Vec<u8>,
}

impl Session {
    fn new(port: File) -> io::Result<Session> {
        let changes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        changes.add(
            &port,
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0),
        )?;
        Ok(Session {
            port,
            changes,
            from_host: Vec::new(),
            to_host: Vec::new(),
        })
    }

    /// Serves one host after the other.
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.serve_one()?;
        }
    }

    /// Waits for a host, runs its command, and waits until it has taken the result and gone.
    fn serve_one(&mut self) -> io::Result<()> {
        let nonce = self.await_start()?;
        self.to_host = nonce;
        let Some(request) = self.await_request()? else {
            return Ok(());
        };
        match Request::parse(&request)
            .ok_or_else(|| io::Error::other("malformed request"))
            .and_then(Running::start)
        {
            Ok(running) => self.attend(running)?,
            Err(error) => {
                frame::push(
                    &mut self.to_host,
                    b'W',
                    format!("rig agent: cannot run this: {error}\n").as_bytes(),
                );
                frame::push(&mut self.to_host, b'X', &127_i32.to_le_bytes());
            }
        }
        self.drain()
    }

    fn await_start(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(nonce) = frame::pop_start(&mut self.from_host) {
                return Ok(nonce);
            }
            if !self.fill()? {
                self.from_host.clear();
                let _ = self
                    .changes
                    .wait(&mut [EpollEvent::empty()], EpollTimeout::from(IDLE));
            }
        }
    }

    /// The request; `None` when the host has gone.
    fn await_request(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some((_, payload)) = frame::pop(&mut self.from_host)? {
                return Ok(Some(payload));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads what the host has sent, waiting for it; false when no host is connected.
    fn fill(&mut self) -> io::Result<bool> {
        wait(&mut [PollFd::new(self.port.as_fd(), PollFlags::POLLIN)], -1)?;
        match read_some(&mut self.port)? {
            Some(bytes) if bytes.is_empty() => Ok(false),
            Some(bytes) => {
                self.from_host.extend(bytes);
                Ok(true)
            }
            None => Ok(true),
        }
    }

    /// Moves bytes between the host and the command until the command has ended; kills it when the host goes away.
    fn attend(&mut self, mut running: Running) -> io::Result<()> {
        let mut to_child = Vec::new();
        let mut input_open = true;
        loop {
            let ready = self.poll(&running, &to_child)?;
            running.enforce();
            if ready.gone {
                running.signal(Signal::SIGKILL);
                return Ok(());
            }
            if ready.port_in && !self.take_frames(&running, &mut to_child, &mut input_open)? {
                running.signal(Signal::SIGKILL);
                return Ok(());
            }
            self.flush()?;
            feed(&mut running, &mut to_child, input_open);
            pump(&mut running.output, b'O', &mut self.to_host)?;
            pump(&mut running.errors, b'W', &mut self.to_host)?;
            if ready.ended && self.to_host.len() < BACKLOG {
                break;
            }
        }
        pump(&mut running.output, b'O', &mut self.to_host)?;
        pump(&mut running.errors, b'W', &mut self.to_host)?;
        frame::push(&mut self.to_host, b'X', &running.exit_code().to_le_bytes());
        Ok(())
    }

    fn poll(&self, running: &Running, to_child: &[u8]) -> io::Result<Ready> {
        let mut port_events = PollFlags::empty();
        port_events.set(PollFlags::POLLIN, to_child.len() < BACKLOG);
        port_events.set(PollFlags::POLLOUT, !self.to_host.is_empty());
        let mut fds = vec![
            PollFd::new(self.port.as_fd(), port_events),
            PollFd::new(running.ended.as_fd(), PollFlags::POLLIN),
        ];
        if self.to_host.len() < BACKLOG {
            fds.extend(
                running
                    .output
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
            );
            fds.extend(
                running
                    .errors
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
            );
        }
        if !to_child.is_empty() {
            fds.extend(
                running
                    .input
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
            );
        }
        wait(&mut fds, running.patience())?;
        let seen = |index: usize| {
            fds.get(index)
                .and_then(PollFd::revents)
                .unwrap_or(PollFlags::empty())
        };
        Ok(Ready {
            gone: seen(0).contains(PollFlags::POLLHUP),
            port_in: seen(0).contains(PollFlags::POLLIN),
            ended: !seen(1).is_empty(),
        })
    }

    /// Handles what the host has sent; false when it has gone.
    fn take_frames(
        &mut self,
        running: &Running,
        to_child: &mut Vec<u8>,
        input_open: &mut bool,
    ) -> io::Result<bool> {
        match read_some(&mut self.port)? {
            Some(bytes) if bytes.is_empty() => return Ok(false),
            Some(bytes) => self.from_host.extend(bytes),
            None => {}
        }
        loop {
            if self.next_host_waits() {
                return Ok(false);
            }
            let Some((kind, payload)) = frame::pop(&mut self.from_host)? else {
                return Ok(true);
            };
            match (kind, payload.as_slice()) {
                (b'I', bytes) => to_child.extend_from_slice(bytes),
                (b'E', _) => *input_open = false,
                (b'S', &[number]) => {
                    if let Ok(signal) = Signal::try_from(i32::from(number)) {
                        running.signal(signal);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether a new session begins: a host can go and the next one come before this side has looked.
    fn next_host_waits(&self) -> bool {
        self.from_host.starts_with(frame::MAGIC)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.to_host.is_empty() {
            let piece = self.to_host.get(..CHUNK).unwrap_or(&self.to_host);
            match self.port.write(piece) {
                Ok(written) => drop(self.to_host.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends the rest and waits for the host to close: closing first could lose what is still on its way.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            self.flush()?;
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !self.to_host.is_empty());
            let mut fds = [PollFd::new(self.port.as_fd(), events)];
            wait(&mut fds, -1)?;
            let [seen] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if seen.contains(PollFlags::POLLHUP) {
                return Ok(());
            }
            if seen.contains(PollFlags::POLLIN) {
                self.from_host
                    .extend(read_some(&mut self.port)?.unwrap_or_default());
                if self
                    .from_host
                    .windows(frame::MAGIC.len())
                    .any(|window| window == frame::MAGIC)
                {
                    return Ok(());
                }
            }
        }
    }
}

struct Ready {
    gone: bool,
    port_in: bool,
    ended: bool,
}

/// Writes pending input to the command, and closes its input once the host has and all is written.
fn feed(running: &mut Running, to_child: &mut Vec<u8>, input_open: bool) {
    if let Some(pipe) = running.input.as_mut().filter(|_| !to_child.is_empty()) {
        match pipe.write(to_child) {
            Ok(written) => drop(to_child.drain(..written)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => running.input = None,
        }
    }
    if running.input.is_none() {
        to_child.clear();
    }
    if !input_open && to_child.is_empty() {
        running.input = None;
    }
}

/// Frames what a pipe holds now, up to the backlog; a pipe at its end becomes `None`.
fn pump(pipe: &mut Option<impl Read>, kind: u8, out: &mut Vec<u8>) -> io::Result<()> {
    while let Some(open) = pipe.as_mut().filter(|_| out.len() < BACKLOG) {
        match read_some(open)? {
            Some(bytes) if bytes.is_empty() => *pipe = None,
            Some(bytes) => frame::push(out, kind, &bytes),
            None => break,
        }
    }
    Ok(())
}

/// One read: `None` when nothing is there yet, empty at the end.
fn read_some(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; CHUNK];
    match from.read(&mut bytes) {
        Ok(count) => {
            bytes.truncate(count);
            Ok(Some(bytes))
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn wait(fds: &mut [PollFd], milliseconds: i32) -> io::Result<()> {
    match poll(
        fds,
        PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::NONE),
    ) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
