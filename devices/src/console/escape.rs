//! The escape sequence of an interactive console.

const CTRL_A: u8 = 1;

/// Looks for Ctrl-A x in the input, across reads.
#[derive(Debug, Default)]
pub(super) struct Escape {
    armed: bool,
}

impl Escape {
    /// Appends to `guest` what is for the guest. True if the user asks to quit; the rest is then dropped.
    /// Ctrl-A Ctrl-A gives one Ctrl-A; Ctrl-A before any other byte is passed on with it.
    pub(super) fn filter(&mut self, input: &[u8], guest: &mut Vec<u8>) -> bool {
        for &byte in input {
            match (std::mem::take(&mut self.armed), byte) {
                (true, b'x') => return true,
                (true, CTRL_A) => guest.push(CTRL_A),
                (true, _) => guest.extend([CTRL_A, byte]),
                (false, CTRL_A) => self.armed = true,
                (false, _) => guest.push(byte),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ctrl_a_x_is_taken_from_the_guest() {
        let cases: [(&[&str], &str, bool); 7] = [
            (&["plain x"], "plain x", false),
            (&["a\x01xb"], "a", true),
            (&["a\x01", "x"], "a", true),
            (&["\x01\x01x"], "\x01x", false),
            (&["\x01y"], "\x01y", false),
            (&["\x01"], "", false),
            (&["\x03\x1a\x1d"], "\x03\x1a\x1d", false),
        ];
        for (reads, guest, quit) in cases {
            let mut escape = Escape::default();
            let mut got = vec![];
            let asked = reads.iter().any(|r| escape.filter(r.as_bytes(), &mut got));
            assert_eq!((got.as_slice(), asked), (guest.as_bytes(), quit), "{reads:?}");
        }
    }
}
