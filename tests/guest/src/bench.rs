//! Timings of the guest's disk and network for `scripts/bench`.
//!
//! Each prints a line before and a line after; between them the host counts its own CPU time and exits. What a
//! request costs in the guest's own time stands in the second line.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use nix::libc::O_DIRECT;

use crate::cmdline::CommandLine;
use crate::endpoint::Stream;

const DISK: &str = "/dev/vda";
/// The part of the disk that requests go to, in bytes.
const SPAN: u64 = 32 << 20;
/// Direct I/O wants buffers at such an address.
const ALIGN: usize = 4096;
/// Time for what a timing has stirred up to come to rest.
const PAUSE: Duration = Duration::from_millis(300);
const MIB: u64 = 1 << 20;
const HEAD: usize = 16;
/// Bytes of a request and of its answer when round trips are timed.
const SMALL: usize = 64;

/// Does nothing for `cvmm.idle` seconds, so that the host can look at its VMM.
pub(crate) fn idle(wanted: &CommandLine) -> io::Result<String> {
    println!("CVMM-BENCH idle");
    std::thread::sleep(Duration::from_secs(wanted.or("idle", 3)));
    Ok("idle".into())
}

/// Direct requests of 4 KiB and 1 MiB, one at a time.
pub(crate) fn disk(wanted: &CommandLine) -> io::Result<String> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(DISK)?;
    let sizes = [(ALIGN, wanted.or("ops_4k", 512_u32), "4k"), (1 << 20, wanted.or("ops_1m", 32), "1m")];
    for (bytes, count, name) in sizes {
        let mut memory = vec![0x5a_u8; bytes + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        let block = memory.get_mut(start..start + bytes).ok_or_else(|| io::Error::other("no aligned buffer"))?;
        let places = || (0..u64::from(count)).map(|number| number * bytes as u64 % SPAN);
        disk.read_exact_at(block, 0)?;
        timed(&format!("read-{name}"), count, || places().try_for_each(|at| disk.read_exact_at(block, at)))?;
        timed(&format!("write-{name}"), count, || places().try_for_each(|at| disk.write_all_at(block, at)))?;
    }
    Ok("done".into())
}

/// Round trips of 64 bytes, and `cvmm.net_mib` MiB each way, with a peer that runs [`serve`].
pub(crate) fn net(mut stream: Stream, wanted: &CommandLine) -> io::Result<String> {
    let (trips, mebibytes) = (wanted.or("trips", 200_u32), wanted.or("net_mib", 2_u32));
    let bytes = u64::from(mebibytes) * MIB;
    ask(&mut stream, SMALL as u64, SMALL as u64)?;
    timed("round-trip", trips, || (0..trips).try_for_each(|_| ask(&mut stream, SMALL as u64, SMALL as u64)))?;
    timed("send-mib", mebibytes, || ask(&mut stream, bytes, SMALL as u64))?;
    timed("receive-mib", mebibytes, || ask(&mut stream, SMALL as u64, bytes))?;
    Ok("done".into())
}

/// Answers [`net`] until it goes away.
pub(crate) fn serve(mut stream: Stream) -> io::Result<String> {
    let mut head = [[0_u8; 8]; 2];
    loop {
        for number in &mut head {
            if stream.read_exact(number).is_err() {
                return Ok("the peer is gone".into());
            }
        }
        let [incoming, outgoing] = head.map(u64::from_le_bytes);
        swallow(&mut stream, incoming.saturating_sub(HEAD as u64))?;
        produce(&mut stream, outgoing)?;
    }
}

/// Sends a message of `out` bytes (at least [`SMALL`]) and takes one of `back` bytes.
fn ask(stream: &mut Stream, out: u64, back: u64) -> io::Result<()> {
    let mut first = [out.to_le_bytes(), back.to_le_bytes()].concat();
    first.resize(SMALL, 0);
    stream.write_all(&first)?;
    produce(stream, out.saturating_sub(SMALL as u64))?;
    swallow(stream, back)
}

fn produce(stream: &mut Stream, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0x5a).take(bytes), stream).map(drop)
}

fn swallow(stream: &mut Stream, bytes: u64) -> io::Result<()> {
    let mut block = vec![0; 64 << 10];
    let mut left = bytes;
    while left != 0 {
        let most = usize::try_from(left).unwrap_or(block.len()).min(block.len());
        let part = block.get_mut(..most).unwrap_or_default();
        let taken = stream.read(part)?;
        if taken == 0 {
            return Err(io::Error::other("the peer ended the connection"));
        }
        left -= taken as u64;
    }
    Ok(())
}

fn timed(name: &str, count: u32, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    println!("CVMM-BENCH begin {name}");
    let began = Instant::now();
    work()?;
    println!("CVMM-BENCH end {name} {count} {}", began.elapsed().as_nanos());
    // What the kernel says at power-off goes to the same console, and would come between the words.
    std::thread::sleep(PAUSE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_peer_swallows_and_answers_as_many_bytes_as_it_is_asked() {
        let (here, there) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(|| serve(File::from(OwnedFd::from(there))));
        let mut here = File::from(OwnedFd::from(here));
        for (out, back) in [(64, 64), (3 << 20, 64), (64, 3 << 20), (65, 1)] {
            ask(&mut here, out, back).unwrap();
        }
        drop(here);
        assert_eq!(peer.join().unwrap().unwrap(), "the peer is gone");
    }
}
