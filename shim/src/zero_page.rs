//! The zero page and memory map for Linux (`Documentation/arch/x86/zero-page.rst`).

use crate::boot::Mode;
use crate::bytes::put;
use crate::bzimage::{HEADER_START, Kernel};
use crate::layout::{ECAM, ECAM_LEN, HANDOVER, HIGH_RAM, LOW_END, LOW_HOLE, MAILBOX, PAGE, RESET_PAGE, TEXT};
use crate::plan::{Plan, Ram};
use crate::reason::Reason;
use core::ops::Range;

const AT_RSDP: usize = 0x070;
const AT_EFI_INFO: usize = 0x1c0;
const AT_E820_COUNT: usize = 0x1e8;
const AT_LOADER_TYPE: usize = 0x210;
const AT_LOAD_FLAGS: usize = 0x211;
const AT_RAMDISK: usize = 0x218;
const AT_CMDLINE: usize = 0x228;
const AT_SETUP_DATA: usize = 0x250;
const AT_E820: usize = 0x2d0;
const E820_ENTRY_LEN: usize = 20;
/// type_of_loader: none that has a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// loadflags: the protected-mode part lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// What a range of memory is to the kernel; the numbers are those of e820.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Usable RAM.
    Ram = 1,
    /// Never to be touched.
    Reserved = 2,
    /// Tables that the kernel reads and keeps.
    Acpi = 3,
    /// Private memory that the kernel shares with the shim's code: not [`Kind::Reserved`], which Linux may map
    /// as shared with the host.
    Firmware = 4,
}

/// The memory map of a machine: ascending, with empty ranges.
pub type MemoryMap = [(Range<u64>, Kind); 9];

/// The memory map for `ram`. On TDX the wake-up mailbox and the reset page stay what they are, for good.
#[must_use]
pub fn memory_map(mode: Mode, ram: &Ram) -> MemoryMap {
    let (mailbox, reset) = match mode {
        Mode::Soft | Mode::Snp => (HANDOVER..HANDOVER, HIGH_RAM..HIGH_RAM),
        Mode::Tdx => (MAILBOX..MAILBOX.wrapping_add(PAGE), RESET_PAGE..HIGH_RAM),
    };
    [
        (0..LOW_HOLE, Kind::Ram),
        (TEXT..mailbox.start, Kind::Reserved),
        (mailbox.clone(), Kind::Firmware),
        (mailbox.end..HANDOVER, Kind::Reserved),
        (HANDOVER..LOW_END, Kind::Acpi),
        (LOW_END..ram.low().end, Kind::Ram),
        (ECAM..ECAM.wrapping_add(ECAM_LEN), Kind::Reserved),
        (reset, Kind::Reserved),
        (ram.high(), Kind::Ram),
    ]
}

/// Addresses of what the zero page points at; 0 stands for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// ACPI RSDP.
    pub rsdp: u64,
    /// Command line, terminated by NUL.
    pub cmdline: u64,
    /// First node of the setup data list.
    pub setup_data: u64,
}

/// Fills the zero page `page`, which is all zero; `header` are the kernel file's first bytes.
///
/// # Errors
/// [`Reason::TablesFull`] when something does not fit, which the fixed layout excludes.
pub fn write(
    page: &mut [u8],
    mode: Mode,
    plan: &Plan,
    kernel: &Kernel,
    header: &[u8],
    links: &Links,
) -> Result<(), Reason> {
    let map = memory_map(mode, &plan.ram);
    fill(page, plan, kernel, header, links)
        .and_then(|()| fill_map(page, map))
        .ok_or(Reason::TablesFull)
}

fn fill(page: &mut [u8], plan: &Plan, kernel: &Kernel, header: &[u8], links: &Links) -> Option<()> {
    put(page, HEADER_START, header.get(kernel.header.clone())?)?;
    put(page, AT_LOADER_TYPE, &[LOADER_UNDEFINED])?;
    let flags = page.get_mut(AT_LOAD_FLAGS)?;
    *flags |= LOADED_HIGH;
    put(page, AT_RSDP, &links.rsdp.to_le_bytes())?;
    put(
        page,
        AT_CMDLINE,
        &u32::try_from(links.cmdline).ok()?.to_le_bytes(),
    )?;
    put(page, AT_SETUP_DATA, &links.setup_data.to_le_bytes())?;
    let initrd_at = if plan.initrd.len == 0 { 0 } else { plan.initrd_to };
    put(page, AT_RAMDISK, &u32::try_from(initrd_at).ok()?.to_le_bytes())?;
    put(
        page,
        AT_RAMDISK.checked_add(4)?,
        &u32::try_from(plan.initrd.len).ok()?.to_le_bytes(),
    )
}

fn fill_map(page: &mut [u8], map: MemoryMap) -> Option<()> {
    let mut count = 0u8;
    let mut slots = (AT_E820..).step_by(E820_ENTRY_LEN);
    for (range, kind) in map {
        let len = range.end.checked_sub(range.start)?;
        if len != 0 {
            put(page, slots.next()?, &e820_entry(range.start, len, kind))?;
            count = count.checked_add(1)?;
        }
    }
    put(page, AT_E820_COUNT, &[count])
}

fn e820_entry(start: u64, len: u64, kind: Kind) -> [u8; E820_ENTRY_LEN] {
    let mut entry = [0; E820_ENTRY_LEN];
    let fields = [start.to_le_bytes(), len.to_le_bytes()];
    let kind = (kind as u32).to_le_bytes();
    for (to, from) in entry.iter_mut().zip(fields.as_flattened().iter().chain(&kind)) {
        *to = *from;
    }
    entry
}

/// Points the zero page at EFI tables: a system table and `map_len` bytes of memory map with entries of
/// `entry_len` bytes. All addresses lie below 4 GiB.
///
/// # Errors
/// [`Reason::TablesFull`] when an address is too high, which the fixed layout excludes.
pub fn link_efi(
    page: &mut [u8],
    system_table: u64,
    map: u64,
    map_len: u32,
    entry_len: u32,
) -> Result<(), Reason> {
    let low = |gpa| u32::try_from(gpa).map_err(|_| Reason::TablesFull);
    let signature = u32::from_le_bytes(*b"EL64");
    let info = [
        signature,
        low(system_table)?,
        entry_len,
        1,
        low(map)?,
        map_len,
        0,
        0,
    ]
    .map(u32::to_le_bytes);
    put(page, AT_EFI_INFO, info.as_flattened()).ok_or(Reason::TablesFull)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_ascending_and_covers_all_ram() {
        for (low, high) in [
            (0x200_0000, 0),
            (0xc000_0000, 0x1_0020_0000),
            (0xc000_0000, 0x70_0000_0000),
        ] {
            let ram = Ram::new(low, high).unwrap();
            for mode in [Mode::Soft, Mode::Snp, Mode::Tdx] {
                let map = memory_map(mode, &ram);
                assert!(
                    map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start),
                    "{map:x?}"
                );
                let usable: u64 = map
                    .iter()
                    .filter(|(_, kind)| *kind == Kind::Ram)
                    .map(|(r, _)| r.end - r.start)
                    .sum();
                // The hole below 1 MiB and the MiB of the shim are not for the kernel.
                assert_eq!(usable, ram.len() - 0x6_0000 - 0x10_0000);
            }
        }
    }

    #[test]
    fn a_td_keeps_its_mailbox_and_its_reset_page() {
        let ram = Ram::new(0x200_0000, 0).unwrap();
        let map = memory_map(Mode::Tdx, &ram);
        assert_eq!(map[2], (0x10_f000..0x11_0000, Kind::Firmware));
        assert_eq!(map[7], (0xffff_f000..0x1_0000_0000, Kind::Reserved));
    }
}
