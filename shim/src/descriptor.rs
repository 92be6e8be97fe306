//! The machine descriptor: the first page of the staging area, written by the host and trusted by nobody.
//!
//! The shim copies it once into private memory, then parses the copy; the planner checks the numbers.

use crate::bytes::{get, get_u32, get_u64, put, zero_between};

/// Bytes of the page that the shim reads; all others are ignored.
pub const DESCRIPTOR_LEN: usize = 0x48;
const MAGIC: [u8; 8] = *b"cvmmdsc1";
const VERSION: u32 = 1;
const AT_VERSION: usize = 0x08;
const AT_VCPUS: usize = 0x0c;
const AT_LOW_RAM_TOP: usize = 0x10;
const AT_HIGH_RAM_TOP: usize = 0x18;
const AT_KERNEL: usize = 0x20;
const AT_INITRD: usize = 0x30;
const END_OF_FIELDS: usize = 0x40;

/// Where a file lies in the staging area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staged {
    /// Guest-physical address, a multiple of 4 KiB.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What the host says about the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Number of vCPUs, with APIC ids 0 to n-1.
    pub vcpus: u32,
    /// End of RAM below 4 GiB, a multiple of 2 MiB.
    pub low_ram_top: u64,
    /// End of RAM above 4 GiB, a multiple of 2 MiB; 0 when there is none.
    pub high_ram_top: u64,
    /// The kernel file.
    pub kernel: Staged,
    /// The initrd; length 0 when there is none.
    pub initrd: Staged,
}

impl Descriptor {
    /// The bytes at the start of the descriptor page.
    #[must_use]
    pub fn encode(&self) -> [u8; DESCRIPTOR_LEN] {
        let mut page = [0; DESCRIPTOR_LEN];
        let fields: [(usize, &[u8]); 9] = [
            (0, &MAGIC),
            (AT_VERSION, &VERSION.to_le_bytes()),
            (AT_VCPUS, &self.vcpus.to_le_bytes()),
            (AT_LOW_RAM_TOP, &self.low_ram_top.to_le_bytes()),
            (AT_HIGH_RAM_TOP, &self.high_ram_top.to_le_bytes()),
            (AT_KERNEL, &self.kernel.gpa.to_le_bytes()),
            (AT_KERNEL + 8, &self.kernel.len.to_le_bytes()),
            (AT_INITRD, &self.initrd.gpa.to_le_bytes()),
            (AT_INITRD + 8, &self.initrd.len.to_le_bytes()),
        ];
        // Every field lies inside the fixed length, which `fields_stand_in_the_page` checks.
        for (at, bytes) in fields {
            let fits = put(&mut page, at, bytes);
            debug_assert!(fits.is_some());
        }
        page
    }

    /// The fields of a private copy, or `None` when it is no descriptor of this version.
    #[must_use]
    pub fn decode(copy: &[u8; DESCRIPTOR_LEN]) -> Option<Self> {
        let known = get(copy, 0)? == MAGIC && get_u32(copy, AT_VERSION)? == VERSION;
        if !known || !zero_between(copy, END_OF_FIELDS, DESCRIPTOR_LEN) {
            return None;
        }
        Some(Descriptor {
            vcpus: get_u32(copy, AT_VCPUS)?,
            low_ram_top: get_u64(copy, AT_LOW_RAM_TOP)?,
            high_ram_top: get_u64(copy, AT_HIGH_RAM_TOP)?,
            kernel: staged_at(copy, AT_KERNEL)?,
            initrd: staged_at(copy, AT_INITRD)?,
        })
    }
}

fn staged_at(copy: &[u8], at: usize) -> Option<Staged> {
    Some(Staged {
        gpa: get_u64(copy, at)?,
        len: get_u64(copy, at.checked_add(8)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Descriptor {
        Descriptor {
            vcpus: 4,
            low_ram_top: 0xc000_0000,
            high_ram_top: 0x1_4000_0000,
            kernel: Staged {
                gpa: 0x70_0020_0000,
                len: 14_000_000,
            },
            initrd: Staged {
                gpa: 0x70_0100_0000,
                len: 40_000_001,
            },
        }
    }

    #[test]
    fn fields_stand_in_the_page() {
        let page = sample().encode();
        assert_eq!(&page[..8], b"cvmmdsc1");
        assert_eq!(page[8..16], [1, 0, 0, 0, 4, 0, 0, 0]);
        let words: std::vec::Vec<u64> = (0x10..0x48)
            .step_by(8)
            .map(|at| get_u64(&page, at).unwrap())
            .collect();
        assert_eq!(
            words,
            [
                0xc000_0000,
                0x1_4000_0000,
                0x70_0020_0000,
                14_000_000,
                0x70_0100_0000,
                40_000_001,
                0
            ]
        );
        assert_eq!(Descriptor::decode(&page), Some(sample()));
    }

    #[test]
    fn another_magic_version_or_reserved_byte_is_refused() {
        for at in [0, 7, 8, 11, 0x40, 0x47] {
            let mut page = sample().encode();
            page[at] ^= 1;
            assert_eq!(Descriptor::decode(&page), None, "byte {at:#x}");
        }
    }
}
