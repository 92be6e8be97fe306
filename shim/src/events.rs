//! What the shim measures at run time in a TD, and the log that explains it.
//!
//! Three events, always in this order, made of the CONFIG page alone; an absent initrd has an event as well:
//!
//! | register | tag | data | digest |
//! |---|---|---|---|
//! | RTMR1 | [`TAG_KERNEL`] | the kernel's entry in CONFIG: length (8 bytes) and SHA-256 of the file | SHA-384 of the data |
//! | RTMR1 | [`TAG_INITRD`] | the initrd's entry in CONFIG, the same way | SHA-384 of the data |
//! | RTMR2 | [`TAG_CMDLINE`] | the owner's command line, without terminator and without the shim's addition | SHA-384 of the data |
//!
//! The shim extends the first two after it compared the files with CONFIG, so each file is hashed once, by the
//! fast SHA-256, and an event still says which file runs. RTMR0 and RTMR3 stay zero.
//!
//! The log follows "TCG PC Client Platform Firmware Profile", family 2.0, revision 1.06, "Event Logging", with
//! the numbers that "Guest-Hypervisor Communication Interface for TDX", "Confidential Computing Event Log",
//! gives to the registers. Each event is an EV_EVENT_TAG, whose field is {tag, length, data}.

use crate::bytes::put;
use crate::config::{AT_INITRD, AT_KERNEL, BLOB_LEN, CONFIG_LEN, Config, ConfigError};
use crate::reason::Reason;
use crate::sha384::{self, Digest};

/// Tag of the kernel's event.
pub const TAG_KERNEL: u32 = 0x6376_6d01;
/// Tag of the initrd's event.
pub const TAG_INITRD: u32 = 0x6376_6d02;
/// Tag of the command line's event.
pub const TAG_CMDLINE: u32 = 0x6376_6d03;

/// EV_NO_ACTION, the type of the log's first record.
const NO_ACTION: u32 = 3;
/// EV_EVENT_TAG.
const EVENT_TAG: u32 = 6;
/// TPM_ALG_SHA384.
const ALGORITHM: u16 = 0x000c;
/// The specification's signature, platform class 0, version 2.0 errata 0, 64-bit integers; one algorithm with
/// its length; no vendor data.
const SPECIFICATION: [u8; 33] = *b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0c\0\x30\0\0";
/// What fills the log behind its last record.
const UNUSED: u8 = 0xff;

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// Number of the register that is extended, 1 or 2.
    pub register: u8,
    /// What is measured, one of the `TAG_` numbers.
    pub tag: u32,
    /// What the digest is made of.
    pub data: &'a [u8],
}

impl Event<'_> {
    /// What the register is extended with.
    #[must_use]
    pub fn digest(&self) -> Digest {
        sha384::digest(self.data)
    }
}

/// The events of a boot with this CONFIG page, in order.
///
/// # Errors
/// Any [`ConfigError`] of [`Config::decode`].
pub fn of(page: &[u8; CONFIG_LEN]) -> Result<[Event<'_>; 3], ConfigError> {
    let cmdline = Config::decode(page)?.cmdline;
    let blob = |at: usize| {
        let end = at.saturating_add(BLOB_LEN);
        page.get(at..end).ok_or(ConfigError::Unknown)
    };
    let event = |register, tag, data| Event { register, tag, data };
    Ok([
        event(1, TAG_KERNEL, blob(AT_KERNEL)?),
        event(1, TAG_INITRD, blob(AT_INITRD)?),
        event(2, TAG_CMDLINE, cmdline),
    ])
}

/// Writes the log of `events` to `area`, all of it.
///
/// # Errors
/// [`Reason::TablesFull`] when `area` is too short.
pub fn write_log(area: &mut [u8], events: &[Event<'_>]) -> Result<(), Reason> {
    area.fill(UNUSED);
    let mut log = Log { area, used: 0 };
    log.fill(events).ok_or(Reason::TablesFull)
}

/// A log that grows.
struct Log<'a> {
    area: &'a mut [u8],
    used: usize,
}

impl Log<'_> {
    fn fill(&mut self, events: &[Event<'_>]) -> Option<()> {
        // A TCG_PCR_EVENT of the old format: register 0 and a SHA-1 digest of zeros.
        self.word(0)?;
        self.word(NO_ACTION)?;
        self.push(&[0; 20])?;
        self.word(u32::try_from(SPECIFICATION.len()).ok()?)?;
        self.push(&SPECIFICATION)?;
        for event in events {
            let len = u32::try_from(event.data.len()).ok()?;
            // Number 0 is MRTD, the registers follow.
            self.word(u32::from(event.register).checked_add(1)?)?;
            self.word(EVENT_TAG)?;
            self.word(1)?;
            self.push(&ALGORITHM.to_le_bytes())?;
            self.push(&event.digest())?;
            self.word(len.checked_add(8)?)?;
            self.word(event.tag)?;
            self.word(len)?;
            self.push(event.data)?;
        }
        Some(())
    }

    fn word(&mut self, word: u32) -> Option<()> {
        self.push(&word.to_le_bytes())
    }

    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        put(self.area, self.used, bytes)?;
        self.used = self.used.checked_add(bytes.len())?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{get, get_u32};
    use crate::config::{Blob, FLAG_LAZY_ACCEPT};

    fn page(cmdline: &[u8]) -> [u8; CONFIG_LEN] {
        let config = Config {
            flags: FLAG_LAZY_ACCEPT,
            kernel: Blob {
                len: 14_000_000,
                sha256: [0x11; 32],
            },
            initrd: Blob {
                len: 0,
                sha256: [0; 32],
            },
            ram: (0, u64::MAX),
            max_vcpus: 8,
            cmdline,
        };
        config.encode().unwrap()
    }

    #[test]
    fn events_are_kernel_initrd_and_command_line() {
        let page = page(b"quiet");
        let [kernel, initrd, cmdline] = of(&page).unwrap();
        assert_eq!((kernel.register, kernel.tag), (1, TAG_KERNEL));
        assert_eq!((initrd.register, initrd.tag), (1, TAG_INITRD));
        assert_eq!((cmdline.register, cmdline.tag), (2, TAG_CMDLINE));
        assert_eq!(get(kernel.data, 0), Some(14_000_000_u64.to_le_bytes()));
        assert_eq!(get(kernel.data, 8), Some([0x11; 32]));
        assert_eq!(kernel.data.len(), 40);
        assert_eq!(initrd.data, [0; 40]);
        assert_eq!(cmdline.data, b"quiet");
        assert_eq!(of(&[0; CONFIG_LEN]), Err(ConfigError::Unknown));
    }

    #[test]
    fn the_log_begins_with_its_format_and_ends_unused() {
        let page = page(b"quiet");
        let mut area = [0; 4096];
        write_log(&mut area, &of(&page).unwrap()).unwrap();
        assert_eq!(get_u32(&area, 4), Some(3));
        assert_eq!(&area[32..47], b"Spec ID Event03");
        let second = 32 + 33;
        assert_eq!(
            [0, 4, 8].map(|at| get_u32(&area, second + at)),
            [2, 6, 1].map(Some)
        );
        let end = second + 2 * (74 + 40) + 74 + 5;
        assert_eq!(get(&area, end - 5), Some(*b"quiet"));
        assert!(area[end..].iter().all(|&byte| byte == 0xff));
    }

    #[test]
    fn a_log_that_does_not_fit_is_refused() {
        let page = page(&[b'x'; 2047]);
        let events = of(&page).unwrap();
        assert_eq!(write_log(&mut [0; 2000], &events), Err(Reason::TablesFull));
        assert_eq!(write_log(&mut [0; 4096], &events), Ok(()));
    }
}
