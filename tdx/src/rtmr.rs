//! RTMRs: four registers that a running TD extends, `RTMR = SHA384(RTMR ∥ digest)` (Intel TDX Module ABI
//! Specification, "TDG.MR.RTMR.EXTEND").

use crate::measure::{Measurement, sha384};

/// A register; SHA-384 of something becomes part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which register, 0 to 3.
    pub register: u8,
    /// What is measured, for people.
    pub name: &'static str,
    /// Its digest.
    pub digest: Measurement,
}

/// All four registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtmrs(pub [Measurement; 4]);

impl Default for Rtmrs {
    fn default() -> Self {
        Self([Measurement::ZERO; 4])
    }
}

impl Rtmrs {
    /// The registers after `events`.
    pub fn after(events: &[Event]) -> Self {
        let mut registers = Self::default();
        for event in events {
            registers.extend(event);
        }
        registers
    }

    /// Extends the register of `event` and returns its new value; `None` if there is no such register.
    pub fn extend(&mut self, event: &Event) -> Option<Measurement> {
        let register = self.0.get_mut(usize::from(event.register))?;
        *register = sha384(&[&register.0, &event.digest.0]);
        Some(*register)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(register: u8, digest: Measurement) -> Event {
        let name = "test";
        Event {
            register,
            name,
            digest,
        }
    }

    /// What the emulated TDX host reported for RTMR2 extended once by the bytes 0 to 47
    /// (`rig/examples/payload.S`), computed by Python's hashlib.
    #[test]
    fn one_extension_has_the_known_value() {
        let digest = Measurement(std::array::from_fn(|i| i as u8));
        let registers = Rtmrs::after(&[event(2, digest)]);
        assert_eq!(
            registers.0[2].to_string(),
            "fe83f742d1cab5c709a0c424729831fbff9b5bb9748a618f0b6ea04fe1fde4d546f4040e7fc9587b2e6badada6c941b0"
        );
        assert_eq!([0, 1, 3].map(|i| registers.0[i]), [Measurement::ZERO; 3]);
    }

    #[test]
    fn order_and_register_count() {
        let (a, b) = (sha384(&[b"a"]), sha384(&[b"b"]));
        let ab = Rtmrs::after(&[event(1, a), event(1, b)]);
        assert_eq!(ab.0[1], sha384(&[&sha384(&[&[0; 48], &a.0]).0, &b.0]));
        assert_ne!(ab, Rtmrs::after(&[event(1, b), event(1, a)]));
        assert_eq!(
            Rtmrs::after(&[event(1, a), event(2, b)]),
            Rtmrs::after(&[event(2, b), event(1, a)])
        );
        assert_eq!(Rtmrs::default().extend(&event(4, a)), None);
    }
}
