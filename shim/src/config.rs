//! The CONFIG page: what the owner fixes, part of the launch digest.
//!
//! One page, little-endian; every byte that carries no field is zero and checked. The page itself is
//! trusted by the shim (the digest covers it), yet decoding is strict so that one machine has one page.

use crate::bytes::{get, get_u32, get_u64, put, zero_between};
use core::fmt;

/// Length of the page.
pub const CONFIG_LEN: usize = 4096;
/// Longest command line in bytes, without a terminator.
pub const CMDLINE_MAX: usize = 2047;
/// "cvmmcfg1" as bytes.
const MAGIC: [u8; 8] = *b"cvmmcfg1";
const VERSION: u32 = 1;
/// Hash algorithm number of SHA-256, the only one.
const SHA_256: u32 = 1;

const AT_VERSION: usize = 0x08;
const AT_FLAGS: usize = 0x0c;
const AT_HASH: usize = 0x10;
const AT_MAX_VCPUS: usize = 0x14;
const AT_RAM_MIN: usize = 0x18;
const AT_RAM_MAX: usize = 0x20;
/// Offset of the kernel's [`Blob`]: its length, then its digest.
pub const AT_KERNEL: usize = 0x28;
/// Offset of the initrd's [`Blob`].
pub const AT_INITRD: usize = 0x50;
/// Length of a [`Blob`] in the page.
pub const BLOB_LEN: usize = 40;
const AT_CMDLINE_LEN: usize = 0x78;
const END_OF_FIELDS: usize = 0x7c;
const AT_CMDLINE: usize = 0x800;

/// Flag: leave memory that the boot does not need to the kernel to validate.
pub const FLAG_LAZY_ACCEPT: u32 = 1;
/// Flags that this version knows.
const FLAGS_KNOWN: u32 = FLAG_LAZY_ACCEPT;

/// A file named by length and SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Length in bytes; an absent file has length 0.
    pub len: u64,
    /// SHA-256 of exactly those bytes.
    pub sha256: [u8; 32],
}

/// The fields of a CONFIG page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config<'a> {
    /// `FLAG_` bits.
    pub flags: u32,
    /// The kernel, a bzImage, never empty.
    pub kernel: Blob,
    /// The initrd; length 0 when there is none.
    pub initrd: Blob,
    /// Least and most RAM in bytes, both inclusive.
    pub ram: (u64, u64),
    /// Most vCPUs.
    pub max_vcpus: u32,
    /// Kernel command line without terminator, at most [`CMDLINE_MAX`] bytes, no NUL.
    pub cmdline: &'a [u8],
}

/// Why a CONFIG page cannot be written or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// The command line is longer than [`CMDLINE_MAX`] or contains a NUL.
    Cmdline,
    /// A bound is empty or the kernel has no length.
    Bounds,
    /// Not a CONFIG page, or one of another version, hash or with unknown flags.
    Unknown,
    /// A byte that carries no field is not zero.
    Padding,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConfigError::Cmdline => "kernel command line is longer than 2047 bytes or contains a NUL",
            ConfigError::Bounds => "kernel is empty, or a bound for memory or vCPUs leaves nothing",
            ConfigError::Unknown => "not a parameter page that this shim understands",
            ConfigError::Padding => "parameter page has bytes outside its fields",
        })
    }
}

impl core::error::Error for ConfigError {}

impl<'a> Config<'a> {
    /// The page that decodes to `self`.
    ///
    /// # Errors
    /// [`ConfigError::Cmdline`], [`ConfigError::Bounds`] or [`ConfigError::Unknown`] (flags) when the
    /// fields themselves are not acceptable to a shim.
    pub fn encode(&self) -> Result<[u8; CONFIG_LEN], ConfigError> {
        self.check()?;
        let cmdline_len = u32::try_from(self.cmdline.len()).map_err(|_| ConfigError::Cmdline)?;
        let mut page = [0; CONFIG_LEN];
        let fields: [(usize, &[u8]); 13] = [
            (0, &MAGIC),
            (AT_VERSION, &VERSION.to_le_bytes()),
            (AT_FLAGS, &self.flags.to_le_bytes()),
            (AT_HASH, &SHA_256.to_le_bytes()),
            (AT_MAX_VCPUS, &self.max_vcpus.to_le_bytes()),
            (AT_RAM_MIN, &self.ram.0.to_le_bytes()),
            (AT_RAM_MAX, &self.ram.1.to_le_bytes()),
            (AT_KERNEL, &self.kernel.len.to_le_bytes()),
            (AT_KERNEL + 8, &self.kernel.sha256),
            (AT_INITRD, &self.initrd.len.to_le_bytes()),
            (AT_INITRD + 8, &self.initrd.sha256),
            (AT_CMDLINE_LEN, &cmdline_len.to_le_bytes()),
            (AT_CMDLINE, self.cmdline),
        ];
        for (at, bytes) in fields {
            put(&mut page, at, bytes).ok_or(ConfigError::Cmdline)?;
        }
        Ok(page)
    }

    /// The fields of `page`, which must be exactly what [`Config::encode`] makes of them.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn decode(page: &'a [u8; CONFIG_LEN]) -> Result<Self, ConfigError> {
        let (cmdline, rest) = Self::cmdline_of(page)?;
        if get(page, 0) != Some(MAGIC)
            || get_u32(page, AT_VERSION) != Some(VERSION)
            || get_u32(page, AT_HASH) != Some(SHA_256)
        {
            return Err(ConfigError::Unknown);
        }
        if !zero_between(page, END_OF_FIELDS, AT_CMDLINE) || rest.iter().any(|&byte| byte != 0) {
            return Err(ConfigError::Padding);
        }
        let config = Self::fields_of(page, cmdline).ok_or(ConfigError::Unknown)?;
        config.check()?;
        Ok(config)
    }

    fn cmdline_of(page: &[u8; CONFIG_LEN]) -> Result<(&[u8], &[u8]), ConfigError> {
        let len = get_u32(page, AT_CMDLINE_LEN).and_then(|len| usize::try_from(len).ok());
        let area = page.get(AT_CMDLINE..).ok_or(ConfigError::Cmdline)?;
        len.and_then(|len| area.split_at_checked(len))
            .ok_or(ConfigError::Cmdline)
    }

    fn fields_of(page: &[u8], cmdline: &'a [u8]) -> Option<Self> {
        Some(Config {
            flags: get_u32(page, AT_FLAGS)?,
            kernel: blob_of(page, AT_KERNEL)?,
            initrd: blob_of(page, AT_INITRD)?,
            ram: (get_u64(page, AT_RAM_MIN)?, get_u64(page, AT_RAM_MAX)?),
            max_vcpus: get_u32(page, AT_MAX_VCPUS)?,
            cmdline,
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.cmdline.len() > CMDLINE_MAX || self.cmdline.contains(&0) {
            return Err(ConfigError::Cmdline);
        }
        if self.flags & !FLAGS_KNOWN != 0 {
            return Err(ConfigError::Unknown);
        }
        if self.kernel.len == 0 || self.ram.0 > self.ram.1 || self.max_vcpus == 0 {
            return Err(ConfigError::Bounds);
        }
        Ok(())
    }
}

fn blob_of(page: &[u8], at: usize) -> Option<Blob> {
    Some(Blob {
        len: get_u64(page, at)?,
        sha256: get(page, at.checked_add(8)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Config<'static> {
        Config {
            flags: FLAG_LAZY_ACCEPT,
            kernel: Blob {
                len: 14_000_000,
                sha256: [0x11; 32],
            },
            initrd: Blob {
                len: 40_000_001,
                sha256: [0x22; 32],
            },
            ram: (64 << 20, 448 << 30),
            max_vcpus: 64,
            cmdline: b"console=ttyS0 quiet",
        }
    }

    #[test]
    fn a_page_decodes_to_what_was_encoded() {
        let longest = [b'x'; CMDLINE_MAX];
        for cmdline in [&b""[..], b"a", &longest] {
            let config = Config { cmdline, ..sample() };
            let page = config.encode().unwrap();
            assert_eq!(Config::decode(&page), Ok(config));
        }
    }

    #[test]
    fn fields_stand_where_machine_v1_puts_them() {
        let page = sample().encode().unwrap();
        assert_eq!(&page[..8], b"cvmmcfg1");
        assert_eq!(
            page[0x08..0x18],
            [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 64, 0, 0, 0]
        );
        assert_eq!(get_u64(&page, 0x28), Some(14_000_000));
        assert_eq!(page[0x30..0x50], [0x11; 32]);
        assert_eq!(get_u64(&page, 0x50), Some(40_000_001));
        assert_eq!(page[0x58..0x78], [0x22; 32]);
        assert_eq!(get_u32(&page, 0x78), Some(19));
        assert_eq!(&page[0x800..0x813], b"console=ttyS0 quiet");
    }

    #[test]
    fn no_two_pages_decode_to_the_same_fields() {
        let good = sample().encode().unwrap();
        for at in 0..CONFIG_LEN {
            let mut page = good;
            page[at] ^= 0x80;
            match Config::decode(&page) {
                Ok(config) => assert_eq!(config.encode(), Ok(page), "byte {at:#x}"),
                Err(_) => continue,
            }
        }
    }

    #[test]
    fn unacceptable_fields_are_refused_both_ways() {
        let too_long = [b'x'; CMDLINE_MAX + 1];
        let cases = [
            (
                Config {
                    cmdline: &too_long,
                    ..sample()
                },
                ConfigError::Cmdline,
            ),
            (
                Config {
                    cmdline: b"a\0b",
                    ..sample()
                },
                ConfigError::Cmdline,
            ),
            (Config { flags: 2, ..sample() }, ConfigError::Unknown),
            (
                Config {
                    max_vcpus: 0,
                    ..sample()
                },
                ConfigError::Bounds,
            ),
            (
                Config {
                    ram: (2, 1),
                    ..sample()
                },
                ConfigError::Bounds,
            ),
            (
                Config {
                    kernel: Blob {
                        len: 0,
                        sha256: [0; 32],
                    },
                    ..sample()
                },
                ConfigError::Bounds,
            ),
        ];
        for (config, error) in cases {
            assert_eq!(config.encode(), Err(error), "{config:?}");
        }
        let good = sample().encode().unwrap();
        for (at, byte, error) in [
            (0x00, b'C', ConfigError::Unknown),
            (0x08, 2, ConfigError::Unknown),
            (0x0c, 3, ConfigError::Unknown),
            (0x10, 2, ConfigError::Unknown),
            (0x7a, 1, ConfigError::Cmdline),
            (0x7c, 1, ConfigError::Padding),
            (0x813, 1, ConfigError::Padding),
            (0xfff, 1, ConfigError::Padding),
        ] {
            let mut page = good;
            page[at] = byte;
            assert_eq!(Config::decode(&page), Err(error), "byte {at:#x}");
        }
    }
}
