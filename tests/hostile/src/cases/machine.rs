//! C61 to C63: everything in the address spaces that is not a virtio ring.

use super::Case;
use crate::machine::{Mode, input, mmio_read, mmio_write, mode, out, out_many};
use crate::ram_end;
use crate::stage::{BUFFER, ENTROPY, Verdict};

pub(super) const CASES: &[Case] = &[
    Case {
        id: "C61",
        name: "every function and register of the bus",
        on: &[ENTROPY],
        play: |s| {
            let ecam = s.device.function.0 & !0xf_ffff;
            for function in 0..256_u64 {
                for at in [0, 1, 4, 6, 0x10, 0x34, 0x3e, 0x7f, 0xff, 0x100, 0xffe, 0xfff] {
                    let place = ecam + (function << 12) + at;
                    let value: u32 = mmio_read(place);
                    mmio_write(place, value);
                    let value: u8 = mmio_read(place);
                    mmio_write(place, value);
                }
            }
            Verdict::Pass
        },
    },
    Case {
        id: "C62",
        name: "string output of 100,000 bytes",
        on: &[ENTROPY],
        play: |_| {
            if mode() == Mode::Snp {
                return Verdict::Absent;
            }
            out_many(0x80, BUFFER, 100_000);
            Verdict::Pass
        },
    },
    Case {
        id: "C63",
        name: "every port but those that end the machine",
        on: &[ENTROPY],
        play: |_| {
            let step = if mode() == Mode::Snp { 257 } else { 7 };
            // Below 0x80 lie DMA, interrupt and keyboard controllers, one of which resets other machines.
            for port in (0x80..=0xffff_u16).step_by(step).filter(|port| !matches!(port, 0x92 | 0x3f8..=0x3ff | 0x500..=0x6ff | 0xb000..=0xb0ff | 0xcf0..=0xcff)) {
            let value = input(port);
            out(port, value);
        }
            Verdict::Pass
        },
    },
    Case {
        id: "C63b",
        name: "device memory where no device is",
        on: &[ENTROPY],
        play: |_| {
            for place in (0..2000_u64).map(|n| 0xd000_0000 + n * 0x1004).chain([
                ram_end().max(0xbff0_0000),
                0xfec0_0000,
                0xfed0_0000,
            ]) {
                mmio_write::<u32>(place, 0xffff_ffff);
                let _: u32 = mmio_read(place);
            }
            Verdict::Pass
        },
    },
];
