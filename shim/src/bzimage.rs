//! The header of a bzImage (Linux, `Documentation/arch/x86/boot.rst`, protocol 2.12 and later).
//!
//! Parsed only after the whole file was found to be the one that the owner named.

use crate::bytes::{get, get_u32};
use crate::layout::KERNEL;
use crate::reason::Reason;
use core::ops::Range;

/// Bytes of the file that hold the header, and of the zero page that take it.
pub const HEADER_END: usize = 0x290;
/// First byte of the header in the file and in the zero page.
pub const HEADER_START: usize = 0x1f1;
const AT_BOOT_FLAG: usize = 0x1fe;
const AT_JUMP: usize = 0x201;
const AT_MAGIC: usize = 0x202;
const AT_VERSION: usize = 0x206;
const AT_ALIGNMENT: usize = 0x230;
const AT_RELOCATABLE: usize = 0x234;
const AT_XLOADFLAGS: usize = 0x236;
const AT_CMDLINE_SIZE: usize = 0x238;
const AT_INIT_SIZE: usize = 0x260;
const VERSION_MIN: u16 = 0x20c;
/// xloadflags: entry point for 64-bit mode at 0x200.
const ENTRY_64: u16 = 1;
/// Distance of the 64-bit entry point from the start of the protected-mode part.
pub const ENTRY_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;
const SETUP_SECTORS_DEFAULT: u8 = 4;

/// What the shim needs to know of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Where the protected-mode part starts in the file.
    pub setup_len: u64,
    /// Memory that the kernel needs from its load address on, in bytes.
    pub init_size: u64,
    /// Longest command line that it reads, without terminator.
    pub cmdline_max: usize,
    /// The header's bytes, for the zero page.
    pub header: Range<usize>,
}

impl Kernel {
    /// Reads the header at the start of a file of `len` bytes.
    ///
    /// # Errors
    /// [`Reason::BadKernel`] when the kernel cannot be entered in 64-bit mode at [`KERNEL`], or takes no
    /// command line of `cmdline_len` bytes.
    pub fn parse(file: &[u8], len: u64, cmdline_len: usize) -> Result<Self, Reason> {
        Self::read(file, len, cmdline_len).ok_or(Reason::BadKernel)
    }

    fn read(file: &[u8], len: u64, cmdline_len: usize) -> Option<Self> {
        let word = |at| get(file, at).map(u16::from_le_bytes);
        let magic = get(file, AT_MAGIC)? == *b"HdrS" && word(AT_BOOT_FLAG)? == 0xaa55;
        let relocatable = get(file, AT_RELOCATABLE)? == [1] && word(AT_XLOADFLAGS)? & ENTRY_64 != 0;
        let alignment = u64::from(get_u32(file, AT_ALIGNMENT)?);
        let placeable = alignment.is_power_of_two() && KERNEL.is_multiple_of(alignment);
        let cmdline_max = usize::try_from(get_u32(file, AT_CMDLINE_SIZE)?).ok()?;
        if !magic
            || word(AT_VERSION)? < VERSION_MIN
            || !relocatable
            || !placeable
            || cmdline_len > cmdline_max
        {
            return None;
        }
        let sectors = match get(file, HEADER_START)? {
            [0] => SETUP_SECTORS_DEFAULT,
            [sectors] => sectors,
        };
        let setup_len = u64::from(sectors).checked_add(1)?.checked_mul(SECTOR)?;
        let [jump] = get(file, AT_JUMP)?;
        let header_end = AT_MAGIC.checked_add(jump.into())?.min(HEADER_END);
        let init_size = u64::from(get_u32(file, AT_INIT_SIZE)?);
        let image_len = len.checked_sub(setup_len)?;
        (image_len > ENTRY_OFFSET && init_size >= image_len).then_some(Kernel {
            setup_len,
            init_size,
            cmdline_max,
            header: HEADER_START..header_end,
        })
    }
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]
pub(crate) mod tests {
    use super::*;
    use std::vec::Vec;

    /// A file with a header that is acceptable, `len` bytes long, that needs `init_size` bytes.
    pub(crate) fn file(len: usize, init_size: u32) -> Vec<u8> {
        let mut file = std::vec![0x90; len];
        file[..HEADER_END].fill(0);
        for (at, bytes) in [
            (HEADER_START, &[3u8][..]),
            (AT_BOOT_FLAG, &[0x55, 0xaa]),
            (AT_JUMP, &[0x6a]),
            (AT_MAGIC, b"HdrS"),
            (AT_VERSION, &[0x0f, 0x02]),
            (AT_ALIGNMENT, &[0, 0, 0x20, 0]),
            (AT_RELOCATABLE, &[1]),
            (AT_XLOADFLAGS, &[0x7f]),
            (AT_CMDLINE_SIZE, &[0xff, 7]),
            (AT_INIT_SIZE, &init_size.to_le_bytes()),
        ] {
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    }

    #[test]
    fn a_kernel_like_debians_is_read() {
        let file = file(0x4000, 0x8000);
        let kernel = Kernel {
            setup_len: 0x800,
            init_size: 0x8000,
            cmdline_max: 2047,
            header: 0x1f1..0x26c,
        };
        assert_eq!(Kernel::parse(&file, 0x4000, 2047), Ok(kernel));
    }

    #[test]
    fn setup_sectors_of_zero_mean_four() {
        let mut file = file(0x4000, 0x8000);
        file[HEADER_START] = 0;
        assert_eq!(
            Kernel::parse(&file, 0x4000, 0).map(|kernel| kernel.setup_len),
            Ok(0xa00)
        );
    }

    #[test]
    fn a_header_never_reaches_beyond_its_place_in_the_zero_page() {
        let mut file = file(0x4000, 0x8000);
        file[AT_JUMP] = 0xff;
        assert_eq!(
            Kernel::parse(&file, 0x4000, 0).map(|kernel| kernel.header.end),
            Ok(0x290)
        );
    }

    #[test]
    fn other_files_are_refused() {
        let cases: [(&str, usize, u8); 10] = [
            ("magic", AT_MAGIC, b'h'),
            ("boot flag", AT_BOOT_FLAG, 0),
            ("old protocol", AT_VERSION, 0x0b),
            ("not relocatable", AT_RELOCATABLE, 0),
            ("no 64-bit entry", AT_XLOADFLAGS, 0x7e),
            ("odd alignment", AT_ALIGNMENT, 3),
            ("wide alignment", AT_ALIGNMENT + 3, 4),
            ("short command line", AT_CMDLINE_SIZE + 1, 0),
            ("setup part longer than the file", HEADER_START, 31),
            ("init size below the image", AT_INIT_SIZE + 1, 0x37),
        ];
        for (name, at, byte) in cases {
            let mut file = file(0x4000, 0x8000);
            file[at] = byte;
            assert_eq!(
                Kernel::parse(&file, 0x4000, 2047),
                Err(Reason::BadKernel),
                "{name}"
            );
        }
        assert_eq!(Kernel::parse(&[0; 16], 16, 0), Err(Reason::BadKernel));
    }

    proptest::proptest! {
        #[test]
        fn a_header_that_is_accepted_stays_in_bounds(
            header in proptest::collection::vec(proptest::num::u8::ANY, 0x1f1..0x290), len in 0u64..1 << 40,
        ) {
            let mut file = file(0x4000, 0x8000);
            file[HEADER_START..HEADER_START + 7].copy_from_slice(&header[..7]);
            file[AT_JUMP] = header[8];
            file[AT_INIT_SIZE..AT_INIT_SIZE + 4].copy_from_slice(&header[0x10..0x14]);
            if let Ok(kernel) = Kernel::parse(&file, len, 0) {
                proptest::prop_assert!(kernel.setup_len + ENTRY_OFFSET < len);
                proptest::prop_assert!(len - kernel.setup_len <= kernel.init_size);
                proptest::prop_assert!(kernel.header.end <= HEADER_END && kernel.header.start < kernel.header.end);
            }
            let _ = Kernel::parse(&header, len, 0);
        }
    }
}
