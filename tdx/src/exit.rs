//! The exits that only TDs make: calls of the guest-hypervisor interface, and its report of a fatal error
//! (Linux 7.2, include/uapi/linux/kvm.h; Guest-Hypervisor Communication Interface for Intel TDX 1.5,
//! "TDG.VP.VMCALL<GetTdVmCallInfo>", "<SetupEventNotifyInterrupt>", "<ReportFatalError>", "<GetQuote>").

use std::fmt;

use arch::exit::PlatformExit;

use crate::get_quote::ReplyCode;

const EXIT_SYSTEM_EVENT: u32 = 24;
const EXIT_TDX: u32 = 40;
const SYSTEM_EVENT_TDX_FATAL: u32 = 7;
const GET_TD_VM_CALL_INFO: u64 = 0x1_0000;
const GET_QUOTE: u64 = 0x1_0002;
const SETUP_EVENT_NOTIFY_INTERRUPT: u64 = 0x1_0004;

/// Offsets in the union of `kvm_run`.
const NUMBER: usize = 8;
const RETURN: usize = 16;
const ARGUMENT: usize = 24;
const ARGUMENT_2: usize = 32;

/// Words for an error code of the measured firmware; `None` if it is none of its codes.
pub type OwnReasons = fn(u32) -> Option<String>;

/// An exit of a TD.
#[derive(Debug)]
pub enum TdxExit<'a> {
    /// The guest has given up.
    Fatal(Fatal),
    /// The guest wants a quote for the report in `bytes` bytes at `gpa`. Both are the guest's own choice, but that the
    /// shared bit is gone.
    GetQuote {
        /// Start of the buffer.
        gpa: u64,
        /// Its length.
        bytes: u64,
        /// The call.
        call: Call<'a>,
    },
    /// The guest asks which calls there are, beyond those that every hypervisor has.
    GetInfo {
        /// Which part of the answer.
        leaf: u64,
        /// The call.
        call: Call<'a>,
    },
    /// The guest wants to be told of events by this interrupt.
    SetupNotify {
        /// The vector.
        vector: u64,
        /// The call.
        call: Call<'a>,
    },
    /// A call that this version does not know. KVM has put down the answer that says so.
    Unknown {
        /// Its number.
        number: u64,
    },
}

/// A call that waits for its answer.
#[derive(Debug)]
pub struct Call<'a> {
    body: &'a mut [u8; 256],
}

fn le32(body: &[u8; 256], at: usize) -> u32 {
    let bytes = body.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn le64(body: &[u8; 256], at: usize) -> u64 {
    let bytes = body.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn put(body: &mut [u8; 256], at: usize, value: u64) {
    if let Some(field) = body.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *field = value.to_ne_bytes();
    }
}

impl Call<'_> {
    /// Answers.
    pub fn answer(self, status: ReplyCode) {
        put(self.body, RETURN, status as u64);
    }

    /// Answers [`TdxExit::GetInfo`]: `calls` has a bit for each optional call that is served.
    pub fn answer_info(self, calls: u64) {
        put(self.body, ARGUMENT_2, calls);
        self.answer(ReplyCode::Success);
    }
}

impl<'a> TdxExit<'a> {
    /// Decodes `exit`; `None` if it is none of a TD's.
    pub fn decode(exit: PlatformExit<'a>) -> Option<Self> {
        let body = exit.body;
        match exit.reason {
            EXIT_SYSTEM_EVENT if le32(body, 0) == SYSTEM_EVENT_TDX_FATAL => {
                Some(Self::Fatal(Fatal::decode(body)))
            }
            EXIT_TDX => Some(Self::decode_call(body)),
            _ => None,
        }
    }

    fn decode_call(body: &'a mut [u8; 256]) -> Self {
        let (number, first, second) = (le64(body, NUMBER), le64(body, ARGUMENT), le64(body, ARGUMENT_2));
        let call = Call { body };
        match number {
            GET_QUOTE => Self::GetQuote {
                gpa: first,
                bytes: second,
                call,
            },
            GET_TD_VM_CALL_INFO => Self::GetInfo { leaf: first, call },
            SETUP_EVENT_NOTIFY_INTERRUPT => Self::SetupNotify { vector: first, call },
            number => Self::Unknown { number },
        }
    }
}

/// The vector of an interrupt that a guest may ask for: the first 32 are exceptions.
pub fn notify_vector(vector: u64) -> Option<u8> {
    u8::try_from(vector).ok().filter(|vector| *vector >= 32)
}

/// A guest's last words. All of it is the guest's own choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fatal {
    /// R12.
    pub code: u64,
    /// R13; with bit 63 of the code, the address of a page with more.
    pub gpa: u64,
    /// The text, as the guest gave it.
    text: [u8; TEXT_BYTES],
}

const TEXT_BYTES: usize = 64;
/// Set in the code if R13 is an address.
const HAS_GPA: u64 = 1 << 63;
/// Registers that carry the text, in its order, by number in instruction encoding: R14, R15, RBX, RDI, RSI, R8, R9,
/// RDX.
const TEXT_REGISTERS: [usize; 8] = [14, 15, 3, 7, 6, 8, 9, 2];

impl Fatal {
    fn decode(body: &[u8; 256]) -> Self {
        let count = usize::try_from(le32(body, 4)).unwrap_or(0);
        let register = |number: usize| {
            let at = number.saturating_mul(8).saturating_add(8);
            if number < count { le64(body, at) } else { 0 }
        };
        let mut text = [0; TEXT_BYTES];
        for (part, number) in text.chunks_exact_mut(8).zip(TEXT_REGISTERS) {
            part.copy_from_slice(&register(number).to_le_bytes());
        }
        Self {
            code: register(12),
            gpa: register(13),
            text,
        }
    }

    /// The text up to its first zero, each byte that is no printable ASCII as an escape.
    pub fn text(&self) -> String {
        let end = self.text.iter().position(|byte| *byte == 0).unwrap_or(TEXT_BYTES);
        self.text
            .get(..end)
            .unwrap_or_default()
            .escape_ascii()
            .to_string()
    }

    /// What it means; `own` knows the codes of the measured firmware.
    pub fn words(&self, own: OwnReasons) -> String {
        let known = u32::try_from(self.code).ok().and_then(own);
        known.map_or_else(
            || self.to_string(),
            |words| format!("the boot shim stopped: {words}"),
        )
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            // What Linux reports when it panics as a TD.
            0 => f.write_str("the guest panicked")?,
            code => write!(f, "the guest reports fatal error {:#x}", code & !HAS_GPA)?,
        }
        if self.code & HAS_GPA != 0 {
            write!(f, ", with more at {:#x}", self.gpa)?;
        }
        let text = self.text();
        if text.is_empty() {
            Ok(())
        } else {
            write!(f, ": \"{text}\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fatal(code: u64, gpa: u64, text: &[u8]) -> Fatal {
        let mut body = [0; 256];
        body[..4].copy_from_slice(&SYSTEM_EVENT_TDX_FATAL.to_le_bytes());
        body[4..8].copy_from_slice(&16_u32.to_le_bytes());
        put(&mut body, 8 + 12 * 8, code);
        put(&mut body, 8 + 13 * 8, gpa);
        let mut padded = [0; TEXT_BYTES];
        padded[..text.len()].copy_from_slice(text);
        for (part, number) in padded.chunks(8).zip(TEXT_REGISTERS) {
            body[8 + number * 8..][..8].copy_from_slice(part);
        }
        let exit = PlatformExit {
            vcpu: 0,
            reason: EXIT_SYSTEM_EVENT,
            body: &mut body,
        };
        match TdxExit::decode(exit) {
            Some(TdxExit::Fatal(fatal)) => fatal,
            other => panic!("{other:?}"),
        }
    }

    fn call(number: u64, arguments: [u64; 2]) -> [u8; 256] {
        let mut body = [0; 256];
        put(&mut body, NUMBER, number);
        put(&mut body, RETURN, 7);
        put(&mut body, ARGUMENT, arguments[0]);
        put(&mut body, ARGUMENT_2, arguments[1]);
        body
    }

    fn decode(body: &mut [u8; 256]) -> TdxExit<'_> {
        TdxExit::decode(PlatformExit {
            vcpu: 0,
            reason: EXIT_TDX,
            body,
        })
        .unwrap()
    }

    #[test]
    fn last_words_are_harmless_text_of_bounded_length() {
        let all = [b'x'; TEXT_BYTES];
        let cases: &[(u64, &[u8], &str)] = &[
            (
                0,
                b"VFS: Unable to mount root fs",
                "the guest panicked: \"VFS: Unable to mount root fs\"",
            ),
            (0, b"", "the guest panicked"),
            (5, b"a\0b", "the guest reports fatal error 0x5: \"a\""),
            (
                0,
                b"\x1b[2J\xff\xfe\r\n\"\xc3\xa4",
                "the guest panicked: \"\\x1b[2J\\xff\\xfe\\r\\n\\\"\\xc3\\xa4\"",
            ),
            (
                1 << 63 | 9,
                b"",
                "the guest reports fatal error 0x9, with more at 0x1000",
            ),
        ];
        for (code, text, words) in cases {
            assert_eq!(fatal(*code, 0x1000, text).words(|_| None), *words);
        }
        assert_eq!(fatal(0, 0, &all).text().len(), TEXT_BYTES);
        assert!(fatal(0, 0, &[0xff; TEXT_BYTES]).words(|_| None).len() < 5 * TEXT_BYTES);
    }

    #[test]
    fn the_shims_own_codes_are_put_in_words() {
        let own = |code| (code == 0x6376_6d08).then(|| "kernel mismatch".to_owned());
        let shim = fatal(0x6376_6d08, 0, b"cvmmshim: 0x08");
        assert_eq!(shim.words(own), "the boot shim stopped: kernel mismatch");
        let disguised = fatal(1 << 32 | 0x6376_6d08, 0, b"");
        assert_eq!(disguised.words(own), "the guest reports fatal error 0x163766d08");
    }

    #[test]
    fn registers_that_kvm_does_not_pass_on_are_zero() {
        let mut body = [0xff; 256];
        body[..8].copy_from_slice(&[7, 0, 0, 0, 3, 0, 0, 0]);
        let exit = PlatformExit {
            vcpu: 0,
            reason: EXIT_SYSTEM_EVENT,
            body: &mut body,
        };
        let Some(TdxExit::Fatal(fatal)) = TdxExit::decode(exit) else {
            panic!("not fatal");
        };
        assert_eq!((fatal.code, fatal.gpa), (0, 0));
        assert_eq!(fatal.text(), "");
    }

    #[test]
    fn calls_are_decoded_and_answered_in_place() {
        let mut quote = call(GET_QUOTE, [0x1234, 0x2000]);
        match decode(&mut quote) {
            TdxExit::GetQuote { gpa, bytes, call } => {
                assert_eq!((gpa, bytes), (0x1234, 0x2000));
                call.answer(ReplyCode::InvalidOperand);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(le64(&quote, RETURN), 1 << 63);

        let mut info = call(GET_TD_VM_CALL_INFO, [1, 0]);
        match decode(&mut info) {
            TdxExit::GetInfo { leaf: 1, call } => call.answer_info(2),
            other => panic!("{other:?}"),
        }
        assert_eq!((le64(&info, RETURN), le64(&info, ARGUMENT_2)), (0, 2));

        let mut unknown = call(0x1_0042, [0; 2]);
        assert!(matches!(
            decode(&mut unknown),
            TdxExit::Unknown { number: 0x1_0042 }
        ));
        assert_eq!(le64(&unknown, RETURN), 7, "KVM's answer stays");
    }

    #[test]
    fn only_vectors_of_interrupts_are_taken() {
        let cases = [
            (31, None),
            (32, Some(32)),
            (255, Some(255)),
            (256, None),
            (u64::MAX, None),
            (0, None),
        ];
        for (vector, expected) in cases {
            assert_eq!(notify_vector(vector), expected, "{vector}");
        }
    }
}
