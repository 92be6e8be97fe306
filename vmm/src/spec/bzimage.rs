//! The header of a Linux kernel image (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"),
//! read only to refuse what cannot boot; the shim parses the measured bytes again for itself.

/// Bytes at the start of the file that hold the whole header.
pub const HEAD_BYTES: usize = 0x268;

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const SIGNATURE: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const INIT_SIZE: usize = 0x260;

/// Protocol 2.12 brought `xloadflags`.
const MIN_VERSION: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;

/// What the machine needs to know of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Boot protocol: major in the high byte, minor in the low one.
    pub version: u16,
    /// Most bytes that its command line may have, without the final NUL.
    pub cmdline_bytes: u32,
    /// Contiguous memory that it needs at its load address before it can look at the memory map, in bytes.
    pub init_bytes: u32,
    /// Offset in the file of what is loaded there.
    pub payload_offset: u64,
}

/// Why a file is no kernel that cvmm can boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKernel {
    /// Shorter than the header, or without its signature.
    #[error(
        "not a bzImage (no `HdrS` signature); give the distribution's vmlinuz, not vmlinux or an EFI program"
    )]
    NotBzImage,
    /// Too old for the 64-bit boot protocol.
    #[error("boot protocol {}.{:02} is older than 2.12; give a kernel of Linux 3.8 or newer", version >> 8, version & 0xff)]
    Old {
        /// Protocol found.
        version: u16,
    },
    /// A 32-bit kernel.
    #[error("has no 64-bit entry point; give an x86-64 kernel")]
    Not64Bit,
    /// The file ends before what its header promises.
    #[error("is truncated at {bytes} bytes; copy it again")]
    Truncated {
        /// Length of the file.
        bytes: u64,
    },
}

impl Header {
    /// Parses the first [`HEAD_BYTES`] (or fewer) of a file that is `file_bytes` long.
    ///
    /// # Errors
    /// See [`BadKernel`].
    pub fn parse(head: &[u8], file_bytes: u64) -> Result<Self, BadKernel> {
        let signed = bytes(head, SIGNATURE) == Some(*b"HdrS") && bytes(head, BOOT_FLAG) == Some([0x55, 0xaa]);
        if !signed {
            return Err(BadKernel::NotBzImage);
        }
        let truncated = BadKernel::Truncated { bytes: file_bytes };
        let version = bytes(head, VERSION).map(u16::from_le_bytes).ok_or(truncated)?;
        if version < MIN_VERSION {
            return Err(BadKernel::Old { version });
        }
        let [loadflags] = bytes(head, LOADFLAGS).ok_or(truncated)?;
        let xloadflags = bytes(head, XLOADFLAGS).map(u16::from_le_bytes).ok_or(truncated)?;
        if loadflags & LOADED_HIGH == 0 || xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BadKernel::Not64Bit);
        }
        let [setup_sects] = bytes(head, SETUP_SECTS).ok_or(truncated)?;
        // Zero means four, for the sake of very old loaders.
        let setup_sects = if setup_sects == 0 {
            4
        } else {
            u64::from(setup_sects)
        };
        let header = Self {
            version,
            cmdline_bytes: bytes(head, CMDLINE_SIZE)
                .map(u32::from_le_bytes)
                .ok_or(truncated)?,
            init_bytes: bytes(head, INIT_SIZE).map(u32::from_le_bytes).ok_or(truncated)?,
            payload_offset: setup_sects.saturating_add(1).saturating_mul(SECTOR),
        };
        if file_bytes <= header.payload_offset {
            return Err(truncated);
        }
        Ok(header)
    }
}

fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file that passes: header, setup sectors and one sector of payload.
    pub(crate) fn kernel() -> Vec<u8> {
        let mut file = vec![0; 6 * 512];
        file[SETUP_SECTS] = 4;
        file[BOOT_FLAG..][..2].copy_from_slice(&[0x55, 0xaa]);
        file[SIGNATURE..][..4].copy_from_slice(b"HdrS");
        file[VERSION..][..2].copy_from_slice(&0x20f_u16.to_le_bytes());
        file[LOADFLAGS] = LOADED_HIGH;
        file[XLOADFLAGS] = 0x7f;
        file[CMDLINE_SIZE..][..4].copy_from_slice(&2047_u32.to_le_bytes());
        file[INIT_SIZE..][..4].copy_from_slice(&(40_u32 << 20).to_le_bytes());
        file
    }

    #[test]
    fn a_stock_kernel_is_understood() {
        let file = kernel();
        assert_eq!(
            Header::parse(&file, file.len() as u64),
            Ok(Header {
                version: 0x20f,
                cmdline_bytes: 2047,
                init_bytes: 40 << 20,
                payload_offset: 5 * 512,
            })
        );
    }

    #[test]
    fn what_cannot_boot_is_refused() {
        type Edit = fn(&mut Vec<u8>);
        let cases: &[(&str, Edit, BadKernel)] = &[
            ("empty", |f| f.clear(), BadKernel::NotBzImage),
            ("ELF vmlinux", |f| f[SIGNATURE] = 0, BadKernel::NotBzImage),
            ("no boot flag", |f| f[BOOT_FLAG] = 0, BadKernel::NotBzImage),
            ("old", |f| f[VERSION] = 0x0b, BadKernel::Old { version: 0x20b }),
            ("32-bit", |f| f[XLOADFLAGS] = 0x7e, BadKernel::Not64Bit),
            ("zImage", |f| f[LOADFLAGS] = 0, BadKernel::Not64Bit),
            (
                "header cut",
                |f| f.truncate(INIT_SIZE + 3),
                BadKernel::Truncated { bytes: 0x263 },
            ),
            (
                "no payload",
                |f| f.truncate(5 * 512),
                BadKernel::Truncated { bytes: 2560 },
            ),
        ];
        for (name, edit, expected) in cases {
            let mut file = kernel();
            edit(&mut file);
            assert_eq!(Header::parse(&file, file.len() as u64), Err(*expected), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0_usize..HEAD_BYTES, value: u8, len in 0_usize..3000) {
            let mut file = kernel();
            file[at] = value;
            file.truncate(len);
            let _ = Header::parse(&file, len as u64).is_ok();
        }
    }
}
