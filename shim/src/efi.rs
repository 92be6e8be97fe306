//! The EFI tables by which Linux learns of unaccepted memory and of the confidential-computing blob.
//!
//! Tables only: no boot or run-time services exist (UEFI 2.10, "EFI System Table"; Linux,
//! `include/linux/efi.h`). Used under protection alone.

use crate::bytes::put;
use crate::reason::Reason;
use crate::zero_page::{Kind, MemoryMap};

const SYSTEM_TABLE_LEN: usize = 120;
/// The system table's signature, "IBI SYST".
const SIGNATURE: [u8; 8] = *b"IBI SYST";
const REVISION: u32 = 0x2_000a;
const AT_REVISION: usize = 8;
const AT_HEADER_LEN: usize = 12;
const AT_VENDOR: usize = 24;
const AT_TABLE_COUNT: usize = 104;
const AT_TABLES: usize = 112;

/// Offsets of the parts in the area.
const AT_VENDOR_NAME: usize = 0x80;
const AT_CONFIG_TABLES: usize = 0x100;
const AT_MEMORY_MAP: usize = 0x200;
/// "cvmm" in UTF-16.
const VENDOR_NAME: [u8; 10] = *b"c\0v\0m\0m\0\0\0";

/// Length of a memory descriptor.
pub const MEMORY_ENTRY_LEN: u32 = 40;
/// Write-back cacheable.
const ATTRIBUTE_WB: u64 = 8;

/// ACPI 2.0 RSDP (8868e871-e4f1-11d3-bc22-0080c73c8881).
const GUID_ACPI_20: [u8; 16] = guid(0x8868_e871, 0xe4f1, 0x11d3, 0xbc22_0080_c73c_8881);
/// LINUX_EFI_UNACCEPTED_MEM_TABLE (d5d1de3c-105c-44f9-9ea9-bcef98120031).
const GUID_UNACCEPTED: [u8; 16] = guid(0xd5d1_de3c, 0x105c, 0x44f9, 0x9ea9_bcef_9812_0031);
/// Confidential-computing blob (067b1f5f-cf26-44c5-8554-93d777912d42).
const GUID_CC_BLOB: [u8; 16] = guid(0x067b_1f5f, 0xcf26, 0x44c5, 0x8554_93d7_7791_2d42);

/// Mixed-endian bytes of a GUID written in its usual order.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let ([a0, a1, a2, a3], [b0, b1], [c0, c1]) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    let [d0, d1, d2, d3, d4, d5, d6, d7] = d.to_be_bytes();
    [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7]
}

/// What the configuration tables point at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// ACPI RSDP.
    pub rsdp: u64,
    /// Unaccepted-memory table ([`crate::unaccepted`]).
    pub unaccepted: u64,
    /// Confidential-computing blob, on SNP.
    pub cc_blob: Option<u64>,
}

/// Where the parts of the written tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// System table.
    pub system_table: u64,
    /// Memory map.
    pub map: u64,
    /// Length of the memory map in bytes.
    pub map_len: u32,
}

/// Writes the tables to `area`, which lies at `base` and is zero.
///
/// RAM appears as conventional memory whether accepted or not: Linux asks the unaccepted-memory table.
///
/// # Errors
/// [`Reason::TablesFull`] when `area` is too short.
pub fn write(area: &mut [u8], base: u64, map: &MemoryMap, targets: &Targets) -> Result<Tables, Reason> {
    fill(area, base, map, targets).ok_or(Reason::TablesFull)
}

fn fill(area: &mut [u8], base: u64, map: &MemoryMap, targets: &Targets) -> Option<Tables> {
    let gpa = |at: usize| base.checked_add(u64::try_from(at).ok()?);
    let always = [
        (GUID_ACPI_20, targets.rsdp),
        (GUID_UNACCEPTED, targets.unaccepted),
    ];
    let configuration = always
        .into_iter()
        .chain(targets.cc_blob.map(|blob| (GUID_CC_BLOB, blob)));
    put(area, 0, &SIGNATURE)?;
    put(area, AT_REVISION, &REVISION.to_le_bytes())?;
    put(
        area,
        AT_HEADER_LEN,
        &u32::try_from(SYSTEM_TABLE_LEN).ok()?.to_le_bytes(),
    )?;
    put(area, AT_VENDOR, &gpa(AT_VENDOR_NAME)?.to_le_bytes())?;
    put(
        area,
        AT_TABLE_COUNT,
        &u64::try_from(configuration.clone().count()).ok()?.to_le_bytes(),
    )?;
    put(area, AT_TABLES, &gpa(AT_CONFIG_TABLES)?.to_le_bytes())?;
    put(area, AT_VENDOR_NAME, &VENDOR_NAME)?;
    for (at, (guid, target)) in (AT_CONFIG_TABLES..).step_by(24).zip(configuration) {
        put(area, at, &guid)?;
        put(area, at.checked_add(16)?, &target.to_le_bytes())?;
    }
    let mut map_len = 0u32;
    for (range, kind) in map {
        let pages = range.end.checked_sub(range.start)? >> 12;
        if pages != 0 {
            let at = AT_MEMORY_MAP.checked_add(usize::try_from(map_len).ok()?)?;
            let entry = [memory_type(*kind), range.start, 0, pages, ATTRIBUTE_WB].map(u64::to_le_bytes);
            put(area, at, entry.as_flattened())?;
            map_len = map_len.checked_add(MEMORY_ENTRY_LEN)?;
        }
    }
    Some(Tables {
        system_table: base,
        map: gpa(AT_MEMORY_MAP)?,
        map_len,
    })
}

/// UEFI 2.10, "Memory Type Usage after ExitBootServices()".
fn memory_type(kind: Kind) -> u64 {
    match kind {
        Kind::Ram => 7,
        Kind::Reserved => 0,
        Kind::Acpi => 9,
        Kind::Firmware => 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Mode;
    use crate::bytes::{get, get_u32, get_u64};
    use crate::plan::Ram;
    use crate::zero_page::memory_map;

    #[test]
    fn guids_are_mixed_endian() {
        let bytes = [
            0x3c, 0xde, 0xd1, 0xd5, 0x5c, 0x10, 0xf9, 0x44, 0x9e, 0xa9, 0xbc, 0xef, 0x98, 0x12, 0, 0x31,
        ];
        assert_eq!(GUID_UNACCEPTED, bytes);
    }

    #[test]
    fn tables_lead_to_their_targets_and_map_all_ram() {
        let ram = Ram::new(0x400_0000, 0x1_0060_0000).unwrap();
        let targets = Targets {
            rsdp: 0x13_0000,
            unaccepted: 0x14_0000,
            cc_blob: Some(0x12_2000),
        };
        let mut area = [0; 4096];
        let tables = write(&mut area, 0x12_3000, &memory_map(Mode::Snp, &ram), &targets).unwrap();
        assert_eq!(
            tables,
            Tables {
                system_table: 0x12_3000,
                map: 0x12_3200,
                map_len: 240
            }
        );
        assert_eq!(get(&area, 0), Some(*b"IBI SYST"));
        assert_eq!(get_u32(&area, 12), Some(120));
        assert_eq!(get_u64(&area, 24), Some(0x12_3080));
        assert_eq!(
            (get_u64(&area, 104), get_u64(&area, 112)),
            (Some(3), Some(0x12_3100))
        );
        for (at, guid, target) in [
            (0x100, GUID_ACPI_20, targets.rsdp),
            (0x118, GUID_UNACCEPTED, targets.unaccepted),
            (0x130, GUID_CC_BLOB, 0x12_2000),
        ] {
            assert_eq!(
                (get(&area, at), get_u64(&area, at + 16)),
                (Some(guid), Some(target))
            );
        }
        let ranges: std::vec::Vec<_> = (0x200..0x200 + 240)
            .step_by(40)
            .map(|at| [0, 8, 24, 32].map(|field| get_u64(&area, at + field).unwrap()))
            .collect();
        assert_eq!(
            ranges,
            [
                [7, 0, 0xa0, 8],
                [0, 0x10_0000, 0x20, 8],
                [9, 0x12_0000, 0xe0, 8],
                [7, 0x20_0000, 0x3e00, 8],
                [0, 0xe000_0000, 0x100, 8],
                [7, 0x1_0000_0000, 0x600, 8],
            ]
        );
    }
}
