//! Transfers that are checked at both ends.
//!
//! The side that starts sends two numbers (bytes that it will send, bytes that it wants), then its bytes, and gets
//! back the SHA-256 that the other computed of them; then the same the other way round.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

use crate::endpoint::Stream;

const BLOCK: usize = 64 << 10;
const MIB: u64 = 1 << 20;

/// Bytes that anyone can make again: a block of pseudo-random bytes, each time with its number at the front.
pub(crate) struct Pattern {
    block: Vec<u8>,
    number: u64,
}

impl Pattern {
    pub(crate) fn new() -> Pattern {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let words = (0..BLOCK / 8).flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        Pattern {
            block: words.collect(),
            number: 0,
        }
    }

    /// The next block.
    pub(crate) fn next(&mut self) -> &[u8] {
        if let Some(front) = self.block.first_chunk_mut() {
            *front = self.number.to_le_bytes();
        }
        self.number += 1;
        &self.block
    }
}

/// Starts a transfer of `out` MiB to the other side and `back` MiB from it; says what went well.
pub(crate) fn start(mut stream: Stream, out: u32, back: u32) -> io::Result<String> {
    let (out, back) = (u64::from(out) * MIB, u64::from(back) * MIB);
    stream.write_all(&[out.to_le_bytes(), back.to_le_bytes()].concat())?;
    let sent = send(&mut stream, out)?;
    let received = receive(&mut stream, back)?;
    Ok(summary(out, &sent, back, &received))
}

/// Answers a transfer that the other side starts.
pub(crate) fn answer(mut stream: Stream) -> io::Result<String> {
    let mut sizes = [[0_u8; 8]; 2];
    for size in &mut sizes {
        stream.read_exact(size)?;
    }
    let [incoming, outgoing] = sizes.map(u64::from_le_bytes);
    let received = receive(&mut stream, incoming)?;
    let sent = send(&mut stream, outgoing)?;
    Ok(summary(outgoing, &sent, incoming, &received))
}

fn send(stream: &mut Stream, bytes: u64) -> io::Result<String> {
    let mut pattern = Pattern::new();
    let mut hash = Sha256::new();
    for _ in 0..bytes / BLOCK as u64 {
        let block = pattern.next();
        hash.update(block);
        stream.write_all(block)?;
    }
    let mut theirs = [0_u8; 32];
    stream.read_exact(&mut theirs)?;
    let ours = hash.finalize();
    if *ours != theirs {
        return Err(io::Error::other(format!(
            "sent bytes arrived changed: {} there, {} here",
            hex(&theirs),
            hex(&ours)
        )));
    }
    Ok(hex(&ours))
}

fn receive(stream: &mut Stream, bytes: u64) -> io::Result<String> {
    let mut pattern = Pattern::new();
    let mut hash = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut wrong = None;
    for number in 0..bytes / BLOCK as u64 {
        stream.read_exact(&mut block)?;
        hash.update(&block);
        if block != pattern.next() && wrong.is_none() {
            wrong = Some(number);
        }
    }
    let ours = hash.finalize();
    stream.write_all(&ours)?;
    match wrong {
        Some(number) => Err(io::Error::other(format!(
            "received bytes differ from block {number} on"
        ))),
        None => Ok(hex(&ours)),
    }
}

fn summary(out: u64, sent: &str, back: u64, received: &str) -> String {
    format!(
        "sent {} MiB sha256 {sent}, received {} MiB sha256 {received}",
        out / MIB,
        back / MIB
    )
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn pair() -> (Stream, Stream) {
        let (a, b) = UnixStream::pair().expect("pair");
        (Stream::from(OwnedFd::from(a)), Stream::from(OwnedFd::from(b)))
    }

    #[test]
    fn both_directions_are_checked() {
        let (ours, theirs) = pair();
        let other = thread::spawn(move || answer(theirs));
        let here = start(ours, 2, 1).expect("transfer");
        let there = other.join().expect("thread").expect("answer");
        assert!(
            here.starts_with("sent 2 MiB sha256 ") && there.starts_with("sent 1 MiB sha256 "),
            "{here} {there}"
        );
    }

    #[test]
    fn changed_bytes_are_noticed_by_both_ends() {
        let (mut ours, theirs) = pair();
        let other = thread::spawn(move || answer(theirs));
        ours.write_all(&[(BLOCK as u64).to_le_bytes(), 0_u64.to_le_bytes()].concat())
            .expect("sizes");
        let mut block = Pattern::new().next().to_vec();
        block[100] ^= 1;
        ours.write_all(&block).expect("block");
        assert!(other.join().expect("thread").is_err());
    }
}
