//! The last bytes of a stream.

use std::collections::VecDeque;
use std::io::IoSlice;

/// A queue of bytes that forgets the oldest ones beyond a bound. Grows only as needed.
#[derive(Debug)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    bound: usize,
}

impl Tail {
    pub(super) fn new(bound: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            bound,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn room(&self) -> usize {
        self.bound.saturating_sub(self.bytes.len())
    }

    /// Appends; returns how many of the oldest bytes were lost.
    pub(super) fn push(&mut self, new: &[u8]) -> usize {
        let skipped = new.len().saturating_sub(self.bound);
        let kept = new.get(skipped..).unwrap_or_default();
        let lost = kept.len().saturating_sub(self.room());
        self.bytes.drain(..lost.min(self.bytes.len()));
        self.bytes.extend(kept);
        skipped.saturating_add(lost)
    }

    /// Moves bytes to `buf`; returns how many.
    pub(super) fn pop(&mut self, buf: &mut [u8]) -> usize {
        let count = buf.len().min(self.bytes.len());
        for (to, from) in buf.iter_mut().zip(self.bytes.drain(..count)) {
            *to = from;
        }
        count
    }

    /// All bytes, oldest first, for one vectored write.
    pub(super) fn slices(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.bytes.as_slices();
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// Forgets the `count` oldest bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_stay_and_the_loss_is_exact() {
        // Bound, pieces, lost, left.
        let cases: [(usize, &[&str], usize, &str); 5] = [
            (4, &["ab", "cd"], 0, "abcd"),
            (4, &["abc", "de"], 1, "bcde"),
            (4, &["ab", "cdefghij"], 6, "ghij"),
            (4, &["abcdefghij"], 6, "ghij"),
            (4, &[""], 0, ""),
        ];
        for (bound, pieces, lost, left) in cases {
            let mut tail = Tail::new(bound);
            let total: usize = pieces.iter().map(|p| tail.push(p.as_bytes())).sum();
            let mut buf = [0; 16];
            let count = tail.pop(&mut buf);
            assert_eq!((total, &buf[..count]), (lost, left.as_bytes()), "{pieces:?}");
            assert_eq!(tail.len(), 0);
        }
    }
}
