//! Where everything goes: checks what the host says about the machine against what the owner fixed.

use crate::config::{Blob, Config};
use crate::descriptor::{Descriptor, Staged};
use crate::layout::{
    HIGH_RAM, HIGH_RAM_MAX, KERNEL, LOW_RAM_MAX, LOW_RAM_MIN, PAGE, STAGING_END, STAGING_KERNEL, UNIT,
    VCPUS_MAX,
};
use crate::reason::Reason;
use core::ops::Range;

/// The RAM of a checked machine: `0..low_top` (with the hole below 1 MiB) and `4 GiB..high_top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    low_top: u64,
    high_top: u64,
}

impl Ram {
    /// RAM with these tops, or `None` when no machine has such RAM.
    #[must_use]
    pub fn new(low_top: u64, high_top: u64) -> Option<Self> {
        let low = (LOW_RAM_MIN..=LOW_RAM_MAX).contains(&low_top);
        let high = high_top == 0 || (high_top > HIGH_RAM && high_top <= HIGH_RAM_MAX);
        let aligned = low_top.is_multiple_of(UNIT) && high_top.is_multiple_of(UNIT);
        (low && high && aligned).then_some(Ram { low_top, high_top })
    }

    /// RAM below 4 GiB, from address 0.
    #[must_use]
    pub fn low(&self) -> Range<u64> {
        0..self.low_top
    }

    /// RAM above 4 GiB; empty when there is none.
    #[must_use]
    pub fn high(&self) -> Range<u64> {
        HIGH_RAM..self.high_top.max(HIGH_RAM)
    }

    /// Bytes of RAM in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.low_top
            .saturating_add(self.high_top.saturating_sub(HIGH_RAM))
    }

    /// Whether there is no RAM, which never holds.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first address above all RAM.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.low_top.max(self.high_top)
    }
}

/// A checked machine and the places of its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// RAM.
    pub ram: Ram,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// The staged kernel file.
    pub kernel: Staged,
    /// The staged initrd; length 0 when there is none.
    pub initrd: Staged,
    /// Where the initrd goes: a multiple of [`UNIT`], as high in low RAM as it fits.
    pub initrd_to: u64,
}

impl Plan {
    /// Checks `descriptor` and places the payload.
    ///
    /// # Errors
    /// [`Reason::BadRam`], [`Reason::BadVcpus`], [`Reason::BadStaging`] or [`Reason::NoRoom`].
    pub fn new(config: &Config<'_>, descriptor: &Descriptor) -> Result<Self, Reason> {
        let ram = Ram::new(descriptor.low_ram_top, descriptor.high_ram_top).ok_or(Reason::BadRam)?;
        if ram.len() < config.ram.0 || ram.len() > config.ram.1 {
            return Err(Reason::BadRam);
        }
        if descriptor.vcpus == 0 || descriptor.vcpus > config.max_vcpus.min(VCPUS_MAX) {
            return Err(Reason::BadVcpus);
        }
        let kernel = staged(descriptor.kernel, &config.kernel)?;
        let initrd = staged(descriptor.initrd, &config.initrd)?;
        let initrd_to = place_initrd(&ram, initrd.len).ok_or(Reason::NoRoom)?;
        let plan = Plan {
            ram,
            vcpus: descriptor.vcpus,
            kernel,
            initrd,
            initrd_to,
        };
        plan.kernel_range(kernel.len)?;
        Ok(plan)
    }

    /// The units for a kernel that needs `len` bytes from [`KERNEL`] on.
    ///
    /// # Errors
    /// [`Reason::NoRoom`] when they reach the initrd or the end of low RAM.
    pub fn kernel_range(&self, len: u64) -> Result<Range<u64>, Reason> {
        let end = KERNEL
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(UNIT));
        match end {
            Some(end) if end <= self.initrd_to => Ok(KERNEL..end),
            _ => Err(Reason::NoRoom),
        }
    }

    /// The units that hold the initrd, up to the end of low RAM.
    #[must_use]
    pub fn initrd_range(&self) -> Range<u64> {
        self.initrd_to..self.ram.low_top
    }
}

/// `at` when it names a file of the right length inside the staging area.
fn staged(at: Staged, blob: &Blob) -> Result<Staged, Reason> {
    let end = at.gpa.checked_add(at.len);
    let inside = at.gpa >= STAGING_KERNEL && end.is_some_and(|end| end <= STAGING_END);
    let aligned = at.gpa.is_multiple_of(PAGE);
    match blob.len {
        0 if at.len == 0 => Ok(Staged::default()),
        len if len == at.len && inside && aligned => Ok(at),
        _ => Err(Reason::BadStaging),
    }
}

/// The highest multiple of [`UNIT`] from which `len` bytes fit in low RAM.
fn place_initrd(ram: &Ram, len: u64) -> Option<u64> {
    let start = ram.low_top.checked_sub(len)?;
    start.checked_sub(start % UNIT)
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn config(kernel: u64, initrd: u64) -> Config<'static> {
        let blob = |len| Blob { len, sha256: [0; 32] };
        Config {
            flags: 0,
            kernel: blob(kernel),
            initrd: blob(initrd),
            ram: (64 * MIB, 400 * GIB),
            max_vcpus: 8,
            cmdline: b"",
        }
    }

    fn machine() -> Descriptor {
        Descriptor {
            vcpus: 8,
            low_ram_top: GIB,
            high_ram_top: 0,
            kernel: Staged {
                gpa: STAGING_KERNEL,
                len: 14 * MIB,
            },
            initrd: Staged {
                gpa: STAGING_KERNEL + 14 * MIB,
                len: 5 * MIB + 1,
            },
        }
    }

    #[test]
    fn an_initrd_lies_as_high_as_it_fits() {
        let plan = Plan::new(&config(14 * MIB, 5 * MIB + 1), &machine()).unwrap();
        assert_eq!(plan.initrd_range(), GIB - 6 * MIB..GIB);
        assert_eq!(plan.kernel_range(61 * MIB), Ok(16 * MIB..78 * MIB));
    }

    type Change = fn(&mut Descriptor);

    #[test]
    fn each_bad_machine_has_its_reason() {
        let cases: [(&str, Change, Reason); 16] = [
            ("no low RAM", |d| d.low_ram_top = 0, Reason::BadRam),
            (
                "less than the owner's minimum",
                |d| d.low_ram_top = 62 * MIB,
                Reason::BadRam,
            ),
            (
                "low RAM over the PCI window",
                |d| d.low_ram_top = LOW_RAM_MAX + UNIT,
                Reason::BadRam,
            ),
            ("odd low top", |d| d.low_ram_top += PAGE, Reason::BadRam),
            (
                "high top below 4 GiB",
                |d| d.high_ram_top = HIGH_RAM,
                Reason::BadRam,
            ),
            (
                "odd high top",
                |d| d.high_ram_top = HIGH_RAM + PAGE,
                Reason::BadRam,
            ),
            (
                "more than the owner's maximum",
                |d| d.high_ram_top = HIGH_RAM + 400 * GIB,
                Reason::BadRam,
            ),
            (
                "high RAM over the staging area",
                |d| d.high_ram_top = HIGH_RAM_MAX + UNIT,
                Reason::BadRam,
            ),
            (
                "huge high top",
                |d| d.high_ram_top = u64::MAX - UNIT + 1,
                Reason::BadRam,
            ),
            ("no vCPU", |d| d.vcpus = 0, Reason::BadVcpus),
            ("too many vCPUs", |d| d.vcpus = 9, Reason::BadVcpus),
            ("longer kernel", |d| d.kernel.len += 1, Reason::BadStaging),
            ("shorter initrd", |d| d.initrd.len -= 1, Reason::BadStaging),
            ("kernel in RAM", |d| d.kernel.gpa = KERNEL, Reason::BadStaging),
            (
                "kernel over the descriptor",
                |d| d.kernel.gpa = STAGING_KERNEL - PAGE,
                Reason::BadStaging,
            ),
            (
                "initrd beyond the window",
                |d| d.initrd.gpa = STAGING_END - MIB,
                Reason::BadStaging,
            ),
        ];
        for (name, change, reason) in cases {
            let mut descriptor = machine();
            change(&mut descriptor);
            assert_eq!(
                Plan::new(&config(14 * MIB, 5 * MIB + 1), &descriptor),
                Err(reason),
                "{name}"
            );
        }
    }

    #[test]
    fn a_payload_larger_than_low_ram_has_no_room() {
        for (kernel, initrd) in [
            (GIB, 0),
            (14 * MIB, GIB),
            (14 * MIB, 1000 * MIB),
            (u64::MAX >> 30, 3 * GIB),
        ] {
            let mut descriptor = machine();
            descriptor.kernel.len = kernel;
            descriptor.initrd.len = initrd;
            assert_eq!(
                Plan::new(&config(kernel, initrd), &descriptor),
                Err(Reason::NoRoom),
                "{kernel} {initrd}"
            );
        }
    }

    proptest! {
        #[test]
        fn places_never_overlap_and_stay_in_ram(
            units in 32u64..1536, kernel in 1u64..(200 << 20), initrd in 0u64..(2 << 30), need in 0u64..u64::MAX,
        ) {
            let mut descriptor = machine();
            descriptor.low_ram_top = units * UNIT;
            descriptor.kernel.len = kernel;
            descriptor.initrd.len = initrd;
            if let Ok(plan) = Plan::new(&config(kernel, initrd), &descriptor) {
                let (image, disk) = (plan.kernel_range(kernel).unwrap(), plan.initrd_range());
                prop_assert!(image.end <= disk.start && disk.end == units * UNIT);
                prop_assert!(image.end - image.start >= kernel && disk.end - disk.start >= initrd);
                prop_assert!(disk.start % UNIT == 0 && image.end % UNIT == 0);
                if let Ok(range) = plan.kernel_range(need) {
                    prop_assert!(range.end <= disk.start && range.end - KERNEL >= need);
                }
            }
        }
    }
}
