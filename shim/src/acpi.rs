//! The ACPI tables of machine v2 (ACPI 6.5): few, fixed, and made inside the measured image.

use crate::bytes::put;
use crate::layout::{
    AP_RESET_VECTOR, ECAM, LAPIC, MAILBOX, PORT_RESET, PORT_SLEEP_CONTROL, PORT_SLEEP_STATUS, RESET_VALUE,
    S5_SLEEP_TYPE,
};
use crate::reason::Reason;
use core::ops::Range;

/// Compiled from `dsdt.asl`.
const DSDT: &[u8] = include_bytes!("dsdt.aml");
const HEADER_LEN: usize = 36;
const AT_CHECKSUM: usize = 9;
const RSDP_LEN: usize = 36;
/// The part of the RSDP that its first checksum covers.
const RSDP_V1_LEN: usize = 20;
const FADT_LEN: usize = 276;
const MADT_FIXED_LEN: usize = 8;
const WAKEUP_LEN: usize = 24;
const MCFG_LEN: usize = 60;
const CCEL_LEN: usize = 56;
/// APIC ids from here on need an x2APIC entry.
const X2APIC_FROM: u32 = 255;
/// Table alignment.
const ALIGN: usize = 16;

/// FADT flags: WBINVD works, C1 on all processors, no fixed power or sleep button, reset register,
/// hardware-reduced.
const FADT_FLAGS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20;
/// FADT boot architecture flags: no VGA, no CMOS RTC; and neither legacy devices nor an 8042.
const FADT_BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Tables appended to an area whose first byte has the address `base`.
struct Area<'a> {
    bytes: &'a mut [u8],
    base: u64,
    used: usize,
}

/// Writes all tables for `vcpus` processors to `area`, which lies at `base` and is zero; the RSDP comes
/// first, so `base` is its address. A TD has a log of measurements, at `log`, and a mailbox to wake processors.
///
/// # Errors
/// [`Reason::TablesFull`] when `area` is too short.
pub fn write(area: &mut [u8], base: u64, vcpus: u32, log: Option<Range<u64>>) -> Result<(), Reason> {
    let mut area = Area {
        bytes: area,
        base,
        used: RSDP_LEN.next_multiple_of(ALIGN),
    };
    write_all(&mut area, vcpus, log).ok_or(Reason::TablesFull)
}

fn write_all(area: &mut Area<'_>, vcpus: u32, log: Option<Range<u64>>) -> Option<()> {
    let dsdt = area.reserve(DSDT.len())?;
    put(area.bytes, dsdt.at, DSDT)?;
    let listed = [
        area.fadt(dsdt.gpa)?,
        area.madt(vcpus, log.is_some())?,
        area.mcfg()?,
    ];
    let ccel = match log {
        Some(log) => Some(area.ccel(&log)?),
        None => None,
    };
    let listed = listed.into_iter().chain(ccel);
    let body = listed.clone().count().checked_mul(8)?;
    let xsdt = area.table(*b"XSDT", 1, HEADER_LEN.checked_add(body)?)?;
    for (slot, gpa) in (xsdt.at.checked_add(HEADER_LEN)?..).step_by(8).zip(listed) {
        put(area.bytes, slot, &gpa.to_le_bytes())?;
    }
    area.seal(&xsdt)?;
    area.rsdp(xsdt.gpa)
}

/// A table's place.
struct Place {
    at: usize,
    len: usize,
    gpa: u64,
}

impl Area<'_> {
    fn reserve(&mut self, len: usize) -> Option<Place> {
        let at = self.used;
        let gpa = self.base.checked_add(u64::try_from(at).ok()?)?;
        self.used = at.checked_add(len)?.checked_next_multiple_of(ALIGN)?;
        (self.used <= self.bytes.len()).then_some(Place { at, len, gpa })
    }

    /// A table with its header, whose body is still zero.
    fn table(&mut self, signature: [u8; 4], revision: u8, len: usize) -> Option<Place> {
        let place = self.reserve(len)?;
        self.set(&place, 0, &signature)?;
        self.set(&place, 4, &u32::try_from(len).ok()?.to_le_bytes())?;
        self.set(&place, 8, &[revision])?;
        self.set(&place, 10, b"CVMM  CVMMV2  \x01\0\0\0CVMM\x01\0\0\0")?;
        Some(place)
    }

    fn set(&mut self, place: &Place, offset: usize, bytes: &[u8]) -> Option<()> {
        put(self.bytes, place.at.checked_add(offset)?, bytes)
    }

    fn seal(&mut self, place: &Place) -> Option<()> {
        let sum = self.sum(place.at, place.len)?;
        self.set(place, AT_CHECKSUM, &[sum])
    }

    /// The byte that makes `len` bytes from `at` sum to zero, as long as it itself is zero.
    fn sum(&self, at: usize, len: usize) -> Option<u8> {
        let bytes = self.bytes.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte)))
    }

    fn rsdp(&mut self, xsdt: u64) -> Option<()> {
        let place = Place {
            at: 0,
            len: RSDP_LEN,
            gpa: self.base,
        };
        self.set(&place, 0, b"RSD PTR \0CVMM  \x02")?;
        self.set(&place, 20, &u32::try_from(RSDP_LEN).ok()?.to_le_bytes())?;
        self.set(&place, 24, &xsdt.to_le_bytes())?;
        let first = self.sum(0, RSDP_V1_LEN)?;
        self.set(&place, 8, &[first])?;
        let extended = self.sum(0, RSDP_LEN)?;
        self.set(&place, 32, &[extended])
    }

    /// ACPI 6.5, "Fixed ACPI Description Table (FADT)", hardware-reduced.
    fn fadt(&mut self, dsdt: u64) -> Option<u64> {
        let table = self.table(*b"FACP", 6, FADT_LEN)?;
        self.set(&table, 40, &u32::try_from(dsdt).ok()?.to_le_bytes())?;
        self.set(&table, 109, &FADT_BOOT_ARCH.to_le_bytes())?;
        self.set(&table, 112, &FADT_FLAGS.to_le_bytes())?;
        self.set(&table, 116, &byte_port(PORT_RESET))?;
        self.set(&table, 128, &[RESET_VALUE])?;
        self.set(&table, 131, &[5])?;
        self.set(&table, 140, &dsdt.to_le_bytes())?;
        self.set(&table, 244, &byte_port(PORT_SLEEP_CONTROL))?;
        self.set(&table, 256, &byte_port(PORT_SLEEP_STATUS))?;
        self.set(&table, 268, b"cvmm")?;
        self.seal(&table)?;
        Some(table.gpa)
    }

    /// ACPI 6.5, "Multiple APIC Description Table (MADT)": one enabled processor per vCPU, no I/O APIC; and in
    /// a TD ACPI 6.6, "Multiprocessor Wakeup Structure", version 1.
    fn madt(&mut self, vcpus: u32, mailbox: bool) -> Option<u64> {
        let small = usize::try_from(vcpus.min(X2APIC_FROM)).ok()?.checked_mul(8)?;
        let large = usize::try_from(vcpus.saturating_sub(X2APIC_FROM))
            .ok()?
            .checked_mul(16)?;
        let fixed = HEADER_LEN.checked_add(MADT_FIXED_LEN)?;
        let wakeup = if mailbox { WAKEUP_LEN } else { 0 };
        let len = fixed
            .checked_add(small)?
            .checked_add(large)?
            .checked_add(wakeup)?;
        let table = self.table(*b"APIC", 5, len)?;
        self.set(&table, HEADER_LEN, &u32::try_from(LAPIC).ok()?.to_le_bytes())?;
        let mut offset = fixed;
        for id in 0..vcpus {
            if id < X2APIC_FROM {
                let short = u8::try_from(id).ok()?;
                self.set(&table, offset, &[0, 8, short, short, 1, 0, 0, 0])?;
                offset = offset.checked_add(8)?;
            } else {
                self.set(&table, offset, &[9, 16, 0, 0])?;
                self.set(&table, offset.checked_add(4)?, &id.to_le_bytes())?;
                self.set(&table, offset.checked_add(8)?, &1u32.to_le_bytes())?;
                self.set(&table, offset.checked_add(12)?, &id.to_le_bytes())?;
                offset = offset.checked_add(16)?;
            }
        }
        if mailbox {
            self.set(&table, offset, &[0x10, 24, 1, 0])?;
            self.set(&table, offset.checked_add(8)?, &MAILBOX.to_le_bytes())?;
            self.set(&table, offset.checked_add(16)?, &AP_RESET_VECTOR.to_le_bytes())?;
        }
        self.seal(&table)?;
        Some(table.gpa)
    }

    /// ACPI 6.6, "CC Event Log ACPI Table (CCEL)": type 2 is TDX.
    fn ccel(&mut self, log: &Range<u64>) -> Option<u64> {
        let table = self.table(*b"CCEL", 1, CCEL_LEN)?;
        self.set(&table, HEADER_LEN, &[2])?;
        self.set(&table, 40, &log.end.checked_sub(log.start)?.to_le_bytes())?;
        self.set(&table, 48, &log.start.to_le_bytes())?;
        self.seal(&table)?;
        Some(table.gpa)
    }

    /// PCI Firmware Specification 3.3, "MCFG Table Description": bus 0 of segment 0.
    fn mcfg(&mut self) -> Option<u64> {
        let table = self.table(*b"MCFG", 1, MCFG_LEN)?;
        self.set(&table, 44, &ECAM.to_le_bytes())?;
        self.seal(&table)?;
        Some(table.gpa)
    }
}

/// A generic address structure for one byte at an I/O port.
fn byte_port(port: u16) -> [u8; 12] {
    let [low, high] = port.to_le_bytes();
    [1, 8, 0, 1, low, high, 0, 0, 0, 0, 0, 0]
}

/// The DSDT's `_S5` package starts with this sleep type; `dsdt.asl` names it again.
const _: () = assert!(S5_SLEEP_TYPE == 5);

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]
mod tests {
    use super::*;
    use crate::bytes::{get_u32, get_u64};
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const BASE: u64 = 0x13_0000;

    fn tables(vcpus: u32) -> BTreeMap<[u8; 4], Vec<u8>> {
        tables_with(vcpus, None)
    }

    fn tables_with(vcpus: u32, log: Option<Range<u64>>) -> BTreeMap<[u8; 4], Vec<u8>> {
        let mut area = std::vec![0; 0x1_0000];
        write(&mut area, BASE, vcpus, log).unwrap();
        let at = |gpa: u64| usize::try_from(gpa - BASE).unwrap();
        let table = |gpa: u64| {
            let start = at(gpa);
            let len = usize::try_from(get_u32(&area, start + 4).unwrap()).unwrap();
            let table = area[start..start + len].to_vec();
            assert_eq!(
                table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
                0,
                "{:?}",
                &table[..4]
            );
            (*table.first_chunk::<4>().unwrap(), table)
        };
        assert_eq!(
            area[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(
            area[..36].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        let (_, xsdt) = table(get_u64(&area, 24).unwrap());
        let listed = xsdt[36..]
            .as_chunks::<8>()
            .0
            .iter()
            .map(|gpa| table(u64::from_le_bytes(*gpa)));
        let mut found: BTreeMap<_, _> = listed.collect();
        let dsdt = get_u64(&found[b"FACP"], 140).unwrap();
        found.extend([table(dsdt)]);
        found
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        for vcpus in [1, 2, 255, 256, 1024] {
            let names: Vec<_> = tables(vcpus).into_keys().collect();
            assert_eq!(names, [*b"APIC", *b"DSDT", *b"FACP", *b"MCFG"]);
        }
    }

    #[test]
    fn processors_from_255_on_have_x2apic_entries() {
        for (vcpus, small, large) in [(1, 1, 0), (255, 255, 0), (256, 255, 1), (1024, 255, 769)] {
            let madt = &tables(vcpus)[b"APIC"];
            assert_eq!(madt.len(), 44 + 8 * small + 16 * large);
            let (mut at, mut ids) = (44, Vec::new());
            while at < madt.len() {
                match madt[at..at + 2] {
                    [0, 8] => ids.push(u32::from(madt[at + 3])),
                    [9, 16] => ids.push(get_u32(madt, at + 4).unwrap()),
                    _ => panic!("unknown entry at {at}"),
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_td_has_a_mailbox_and_a_log() {
        let tables = tables_with(1024, Some(0x12_4000..0x12_5000));
        let (madt, ccel) = (&tables[b"APIC"], &tables[b"CCEL"]);
        let wakeup = madt.len() - 24;
        assert_eq!(wakeup, 44 + 8 * 255 + 16 * 769);
        assert_eq!(madt[wakeup..wakeup + 8], [0x10, 24, 1, 0, 0, 0, 0, 0]);
        assert_eq!(
            [8, 16].map(|at| get_u64(madt, wakeup + at)),
            [0x10_f000, 0xffff_f000].map(Some)
        );
        assert_eq!(ccel.len(), 56);
        assert_eq!(ccel[36..40], [2, 0, 0, 0]);
        assert_eq!(
            [40, 48].map(|at| get_u64(ccel, at)),
            [0x1000, 0x12_4000].map(Some)
        );
    }

    #[test]
    fn an_area_that_is_too_short_is_refused() {
        assert_eq!(write(&mut [0; 512], BASE, 1, None), Err(Reason::TablesFull));
    }
}
