//! The console on a socket, with a client that comes and goes.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use devices::console::{Console, ConsoleSpec};
use devices::virtio::console::VirtioConsole;

use super::{Chain, Host, Outside};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

struct Client {
    console: Console,
    path: PathBuf,
    socket: Option<UnixStream>,
}

impl Outside for Client {
    fn act(&mut self, input: &mut Input<'_>) {
        match (input.u8() & 3, &mut self.socket) {
            (0, Some(socket)) => {
                let count = usize::from(input.u8());
                let _ = socket.write(input.take(count));
            }
            (1, Some(socket)) => {
                let mut bytes = [0; 4096];
                let _ = socket.read(&mut bytes);
            }
            (2, socket) => *socket = None,
            (_, socket) => {
                *socket = UnixStream::connect(&self.path).ok();
                if let Some(socket) = socket {
                    socket.set_nonblocking(true).unwrap();
                }
            }
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.console.descriptor().as_fd().as_raw_fd())
    }

    fn service(&mut self) {
        self.console.service();
    }
}

/// A console.
pub fn console() -> Host {
    let path = super::socket("console");
    let console = Console::open(&ConsoleSpec::Socket(path.clone())).unwrap();
    let device = VirtioConsole::new(console.clone());
    let mut client = Client {
        console,
        path,
        socket: None,
    };
    client.act(&mut Input::new(&[3]));
    Host {
        device: Some(Box::new(device)),
        outside: Box::new(client),
        typical,
        probe,
    }
}

fn typical(input: &mut Input<'_>) -> Chain {
    let (how, len) = (input.u8(), input.u16() & 0x3fff);
    if how & 1 == 0 {
        return (0, vec![Buffer::Writable(u32::from(len) + 1)]);
    }
    let mut bytes = input.take(usize::from(how >> 3)).to_vec();
    bytes.resize(usize::from(len) + 1, b'\n');
    (1, vec![Buffer::Readable(bytes)])
}

fn probe(run: &mut Run) {
    run.guest
        .send(&run.machine, 1, &[Buffer::Readable(b"alive\n".to_vec())], false);
    run.guest.kick(&run.machine, 1);
    run.machine.settle();
    assert_eq!(
        run.guest.recycle(&run.machine, 1),
        1,
        "the console takes no output"
    );
}
