//! Every address at every width.

use super::*;
use crate::pci::root::BAR_BYTES;

const LENGTHS: [usize; 7] = [1, 2, 3, 4, 5, 8, 16];
/// Registers of the common configuration: offset and width.
const REGISTERS: [(u64, usize); 18] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (0x14, 1),
    (0x15, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1e, 2),
    (0x20, 8),
    (0x28, 8),
    (0x30, 8),
    (0x38, 2),
    (0x3a, 2),
];

/// True if an access is one that a driver may make to some structure.
fn is_defined(offset: u64, len: usize) -> bool {
    let aligned = offset.is_multiple_of(len as u64);
    match offset {
        0..0x1000 => REGISTERS.into_iter().any(|(at, width)| {
            (at, width) == (offset, len) || width == 8 && len == 4 && offset & !4 == at && aligned
        }),
        0x2000 => len == 1,
        0x3000..0x4000 => aligned && matches!(len, 1 | 2 | 4 | 8),
        0x4000..0x4030 | 0x5000..0x6000 => aligned && matches!(len, 4 | 8),
        _ => false,
    }
}

#[test]
fn c25_undefined_reads_of_the_bar_are_ones_and_defined_ones_are_not() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_common(0x16, 2, 1);
    bench.set_common(0x10, 2, 0);
    for offset in 0..u64::from(BAR_BYTES) {
        for len in LENGTHS {
            let mut data = vec![0x5a; len];
            bench.mmio.read(BAR + offset, &mut data);
            let ones = data.iter().all(|byte| *byte == 0xff);
            assert_eq!(ones, !is_defined(offset, len), "{offset:#x} {len}: {data:x?}");
        }
    }
    assert!(bench.answers());
}

#[test]
fn c25_undefined_writes_to_the_bar_change_nothing() {
    let mut bench = Bench::new();
    bench.start();
    let snapshot = |bench: &Bench| -> Vec<u64> {
        let registers = REGISTERS.map(|(at, len)| bench.common(at, len)).into_iter();
        let vectors = (0x4000..0x4030).step_by(4).map(|at| bench.get(BAR + at, 4));
        let device = (0x3000..0x3010).map(|at| bench.get(BAR + at, 1));
        registers.chain(vectors).chain(device).collect()
    };
    let before = snapshot(&bench);
    for pattern in [0x00, 0x01, 0x5a, 0xff] {
        for offset in 0..u64::from(BAR_BYTES) {
            for len in LENGTHS.into_iter().filter(|len| !is_defined(offset, *len)) {
                bench.mmio.write(BAR + offset, &vec![pattern; len]);
            }
        }
    }
    assert_eq!(snapshot(&bench), before);
    assert!(bench.answers());
}

#[test]
fn c25_any_write_anywhere_leaves_a_device_that_a_good_driver_can_use() {
    for pattern in [0x00, 0x01, 0x0f, 0x80, 0xff] {
        let mut bench = Bench::new();
        bench.start();
        for len in LENGTHS {
            for offset in 0..u64::from(BAR_BYTES) {
                bench.mmio.write(BAR + offset, &vec![pattern; len]);
            }
            for offset in 0..0x1000 {
                bench
                    .mmio
                    .write(ECAM_START + 0x8000 + offset, &vec![pattern; len]);
            }
        }
        bench.start();
        assert!(bench.answers(), "{pattern:#x}");
    }
}

#[test]
fn c26_queues_that_do_not_exist_read_as_absent_and_take_nothing() {
    let bench = Bench::new();
    for queue in [2, 3, 0x7fff, 0xffff] {
        bench.set_common(0x16, 2, queue);
        for (at, len) in [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)] {
            bench.set_common(at, len, 1);
        }
        let fields = [0x18, 0x1a, 0x1c, 0x1e].map(|at| bench.common(at, 2));
        assert_eq!(fields, [0, 0xffff, 0, 0], "queue {queue}");
        assert_eq!([0x20, 0x28, 0x30].map(|at| bench.common(at, 8)), [0; 3]);
    }
    assert_eq!(bench.common(0x12, 2), 2);
    for (queue, size) in (0..).zip(QUEUES) {
        bench.set_common(0x16, 2, queue);
        let fields = [0x18, 0x1a, 0x1c, 0x1e].map(|at| bench.common(at, 2));
        assert_eq!(fields, [u64::from(size), 0xffff, 0, queue]);
        assert_eq!([0x20, 0x28, 0x30].map(|at| bench.common(at, 8)), [0; 3]);
    }
}

#[test]
fn the_bar_answers_only_while_memory_decoding_is_on() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_config(4, 2, 4);
    assert_eq!(bench.status(), 0xff);
    bench.set_common(0x14, 1, 0);
    bench.set_config(4, 2, 6);
    assert_eq!(bench.status(), 15);
    assert!(bench.answers());
}

#[test]
fn the_device_configuration_is_read_and_written_and_changes_its_generation() {
    let bench = Bench::new();
    assert_eq!(bench.get(BAR + 0x3000, 4), 0x0403_0201);
    assert_eq!(bench.get(BAR + 0x3004, 8) & 0xff, 0xff, "not aligned");
    assert_eq!(bench.get(BAR + 0x3008, 8), 0);
    assert_eq!(bench.get(BAR + 0x3ff8, 8), 0);
    let before = bench.common(0x15, 1);
    bench.set(BAR + 0x3001, 1, 0xaa);
    assert_eq!(bench.get(BAR + 0x3000, 4), 0x0403_aa01);
    assert_ne!(bench.common(0x15, 1), before);
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let mut bench = Bench::new();
    bench.start();
    let window = bench.capability(9, Some(5));
    let select = |bench: &Bench, bar: u64, offset: u64, len: u64| {
        bench.set_config(window + 4, 1, bar);
        bench.set_config(window + 8, 4, offset);
        bench.set_config(window + 12, 4, len);
    };
    select(&bench, 0, 0x14, 1);
    assert_eq!(bench.config(window + 16, 1), 15);
    select(&bench, 0, 0x12, 2);
    assert_eq!(bench.config(window + 16, 4), 2);
    select(&bench, 0, 0x20, 4);
    assert_eq!(bench.config(window + 16, 4), bench.common(0x20, 4));
    // Windows that a driver may not set do nothing, whatever they hold.
    for (bar, offset, len) in [
        (1, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x14, 8),
        (0, 0x15, 2),
        (0, 0xffff_ffff, 1),
        (0, 0xffff_fffc, 4),
        (0, 0x14, 0xffff_ffff),
    ] {
        select(&bench, bar, offset, len);
        bench.config(window + 16, 4);
        bench.set_config(window + 16, 4, 0);
        assert_eq!(bench.status(), 15, "{bar} {offset:#x} {len}");
    }
    select(&bench, 0, 0x14, 1);
    bench.set_config(window + 16, 1, 0);
    assert_eq!(bench.status(), 0);
}

proptest::proptest! {
    /// No sequence of register writes panics or leaves a device that a good driver cannot use.
    #[test]
    fn any_sequence_of_writes_is_survived(writes in proptest::collection::vec(
        (proptest::sample::select(REGISTERS.to_vec()), proptest::sample::select(
            vec![0_u64, 1, 2, 3, 8, 11, 15, 0x40, 0x80, 0xffff, 0x10_0000, u64::MAX])), 1..60)) {
        let mut bench = Bench::new();
        for ((at, len), value) in writes {
            bench.set_common(at, len, value);
            bench.pci.on_event(0);
            bench.pci.on_event(BACKEND);
        }
        bench.start();
        assert!(bench.answers());
    }
}
