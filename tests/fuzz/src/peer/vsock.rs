//! The socket device, with clients and services on the host.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use devices::virtio::vsock::Vsock;

use super::{Chain, Host, Outside};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

const CID: u64 = 42;
/// Ports on which services listen.
const PORTS: [u32; 2] = [1, 2];
const CLIENTS: usize = 8;

struct Outer {
    path: PathBuf,
    services: Vec<UnixListener>,
    streams: Vec<UnixStream>,
}

impl Outer {
    fn service_path(&self, port: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!("_{port}"));
        name.into()
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        if self.streams.len() == CLIENTS {
            self.streams.remove(0);
        }
        self.streams.push(stream);
    }
}

impl Outside for Outer {
    fn act(&mut self, input: &mut Input<'_>) {
        let how = input.u8();
        let chosen = usize::from(how >> 4) % self.streams.len().max(1);
        match how & 7 {
            0 => {
                if let Ok(mut stream) = UnixStream::connect(&self.path) {
                    let port = input.u8();
                    let _ = stream.write(format!("CONNECT {port}\n").as_bytes());
                    self.keep(stream);
                }
            }
            1 => {
                let accepted = self.services[usize::from(how >> 7)].accept();
                if let Ok((stream, _)) = accepted {
                    self.keep(stream);
                }
            }
            2 | 3 => {
                let (len, literal) = (usize::from(input.u16()), usize::from(input.u8()));
                let mut bytes = input.take(literal).to_vec();
                bytes.resize(len, 0x5a);
                if let Some(stream) = self.streams.get_mut(chosen) {
                    let _ = stream.write(&bytes);
                }
            }
            4 | 5 => {
                let mut bytes = vec![0; 1 << usize::from(input.u8() & 15)];
                if let Some(stream) = self.streams.get_mut(chosen) {
                    let _ = stream.read(&mut bytes);
                }
            }
            6 => {
                if let Some(stream) = self.streams.get(chosen) {
                    let side = [Shutdown::Read, Shutdown::Write][usize::from(how >> 7)];
                    let _ = stream.shutdown(side);
                }
            }
            _ => {
                if !self.streams.is_empty() {
                    self.streams.remove(chosen);
                }
            }
        }
    }
}

impl Drop for Outer {
    fn drop(&mut self) {
        for port in PORTS {
            let _ = std::fs::remove_file(self.service_path(port));
        }
    }
}

/// A socket device.
pub fn vsock() -> Host {
    let path = super::socket("vsock");
    let vsock = Vsock::open(CID, &path).unwrap();
    let mut outer = Outer {
        path,
        services: vec![],
        streams: vec![],
    };
    for port in PORTS {
        let path = outer.service_path(port);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        outer.services.push(listener);
    }
    Host {
        device: Some(Box::new(vsock)),
        outside: Box::new(outer),
        typical,
        probe,
    }
}

/// A packet: most fields right, each wrong if a bit says so.
struct Packet {
    ports: (u32, u32),
    op: u16,
    flags: u32,
    credit: (u32, u32),
    len: u32,
    wrong: u8,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let cid = if self.wrong & 1 == 0 { CID } else { 43 };
        let host = if self.wrong & 2 == 0 { 2_u64 } else { 3 };
        let kind = if self.wrong & 4 == 0 { 1_u16 } else { 2 };
        [
            &cid.to_le_bytes()[..],
            &host.to_le_bytes(),
            &self.ports.0.to_le_bytes(),
            &self.ports.1.to_le_bytes(),
            &self.len.to_le_bytes(),
            &kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.credit.0.to_le_bytes(),
            &self.credit.1.to_le_bytes(),
        ]
        .concat()
    }
}

fn typical(input: &mut Input<'_>) -> Chain {
    let op = input.u8();
    if op & 15 == 0 {
        return (0, vec![Buffer::Writable(44 + u32::from(input.u16() & 0x1fff))]);
    }
    let ports = input.u8();
    // The host gives itself ports from 2^30 on for the connections that its clients begin.
    let host = match ports >> 4 {
        few @ 0..=3 => u32::from(few),
        more => (1 << 30) + u32::from(more & 7),
    };
    let (flags, wrong) = (input.u8(), input.u8());
    let len = if op & 15 == 5 {
        u32::from(input.u16() & 0x1fff)
    } else {
        0
    };
    let packet = Packet {
        ports: (u32::from(ports & 7), host),
        op: u16::from(op & 15),
        flags: u32::from(flags & 7),
        credit: match flags >> 6 {
            0 => (1 << 16, 0),
            1 => (input.u32(), input.u32()),
            _ => (u32::from(input.u16()), u32::from(input.u16())),
        },
        len: len.wrapping_add(if wrong & 8 == 0 {
            0
        } else {
            1 + u32::from(wrong >> 4)
        }),
        wrong,
    };
    let mut buffers = vec![Buffer::Readable(packet.bytes())];
    if len != 0 {
        buffers.push(Buffer::Readable(vec![op; len as usize]));
    }
    (1, buffers)
}

fn probe(run: &mut Run) {
    run.guest.send(&run.machine, 0, &[Buffer::Writable(4096)], false);
    run.guest.kick(&run.machine, 0);
    let request = Packet {
        ports: (9, 77),
        op: 1,
        flags: 0,
        credit: (4096, 0),
        len: 0,
        wrong: 0,
    };
    run.guest
        .send(&run.machine, 1, &[Buffer::Readable(request.bytes())], false);
    run.guest.kick(&run.machine, 1);
    run.machine.settle();
    assert_eq!(
        run.guest.recycle(&run.machine, 1),
        1,
        "a good packet is not taken"
    );
    // Nobody listens there; another answer may come first.
    assert_eq!(run.guest.recycle(&run.machine, 0), 1, "a request is not answered");
}
