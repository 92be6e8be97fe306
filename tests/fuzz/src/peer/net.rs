//! A network device on a stream, with the far end of the stream.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use devices::virtio::net::{Backend, MacAddress, Net};

use super::{Chain, Host, Outside};
use crate::guest::Buffer;
use crate::input::Input;
use crate::program::Run;

/// Bytes of the header in front of a frame.
const HEADER: usize = 12;

struct Passt(Option<UnixStream>);

impl Outside for Passt {
    fn act(&mut self, input: &mut Input<'_>) {
        let Some(stream) = &mut self.0 else { return };
        match input.u8() & 7 {
            0..=3 => {
                let (len, literal) = (usize::from(input.u16()), usize::from(input.u8()));
                let mut bytes = (len as u32).to_be_bytes().to_vec();
                bytes.extend(input.take(literal.min(len)));
                bytes.resize(len + 4, 0x5a);
                let _ = stream.write(&bytes);
            }
            4 => {
                let count = usize::from(input.u8());
                let _ = stream.write(input.take(count));
            }
            5 | 6 => {
                let mut bytes = vec![0; 1 << usize::from(input.u8() & 15)];
                let _ = stream.read(&mut bytes);
            }
            _ => self.0 = None,
        }
    }
}

/// A network device with one pair of queues.
pub fn passt() -> Host {
    let path = super::socket("passt");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let net = Net::open(Backend::Passt(path.clone()), MacAddress::of_device(1), 1).unwrap();
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    std::fs::remove_file(path).unwrap();
    Host {
        device: Some(Box::new(net)),
        outside: Box::new(Passt(Some(stream))),
        typical,
        probe,
    }
}

fn typical(input: &mut Input<'_>) -> Chain {
    let (how, len) = (input.u8(), input.u16() & 0x3fff);
    if how & 1 == 0 {
        let pieces = (how >> 1) & 3;
        return (
            0,
            (0..=pieces)
                .map(|_| Buffer::Writable(u32::from(len) + 1))
                .collect(),
        );
    }
    let mut header = [0; HEADER];
    if how & 2 != 0 {
        let fields = input.take(HEADER);
        header[..fields.len()].copy_from_slice(fields);
    }
    let mut frame = input.take(usize::from(how >> 4)).to_vec();
    frame.resize(usize::from(len), 0xa5);
    match how & 12 {
        0 => (
            1,
            vec![Buffer::Readable(header.to_vec()), Buffer::Readable(frame)],
        ),
        4 => {
            let pieces = frame.chunks(64).take(100);
            let pieces = pieces.map(|piece| Buffer::Readable(piece.to_vec()));
            let header = Buffer::Readable(header.to_vec());
            (1, std::iter::once(header).chain(pieces).collect())
        }
        _ => (1, vec![Buffer::Readable([&header[..], &frame].concat())]),
    }
}

fn probe(run: &mut Run) {
    let frame = Buffer::Readable(vec![0; HEADER + 60]);
    run.guest.send(&run.machine, 1, &[frame], false);
    run.guest.kick(&run.machine, 1);
    // The far end takes what waits, so that there is room.
    for _ in 0..64 {
        run.machine.settle();
        run.machine.host.outside.act(&mut Input::new(&[5, 15]));
    }
    run.machine.settle();
    assert_eq!(run.guest.recycle(&run.machine, 1), 1, "a good frame is not taken");
}
