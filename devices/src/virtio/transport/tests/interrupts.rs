//! MSI-X as the guest programs it.

use super::*;

const TABLE: u64 = BAR + 0x4000;
const PENDING: u64 = BAR + 0x5000;

fn message(data: u32) -> MsiMessage {
    MsiMessage { address: MSI, data }
}

#[test]
fn masked_interrupts_become_pending_and_come_once_when_unmasked() {
    let mut bench = Bench::new();
    bench.start();
    // Masking by vector, then by function.
    let vector_mask = |bench: &Bench, on: u64| bench.set(TABLE + 16 + 12, 4, on);
    let function_mask = |bench: &Bench, on: u64| bench.set_msix(0x8000 | on << 14);
    type Mask<'a> = &'a dyn Fn(&Bench, u64);
    let masks: [(&str, Mask<'_>); 2] = [("vector", &vector_mask), ("function", &function_mask)];
    for (name, mask) in masks {
        mask(&bench, 1);
        assert!(bench.answers() && bench.answers());
        bench.pci.0.msix.raise(1, ISR_QUEUE);
        assert_eq!(bench.interrupts(1), 0, "{name}");
        assert_eq!(bench.get(PENDING, 8), 0b10, "{name}");
        mask(&bench, 0);
        assert_eq!((bench.interrupts(1), bench.interrupts(2)), (1, 0), "{name}");
        assert_eq!(bench.get(PENDING, 8), 0, "{name}");
        mask(&bench, 0);
        assert_eq!(bench.interrupts(1), 0, "{name}");
    }
}

#[test]
fn unmasking_a_vector_under_the_function_mask_delivers_nothing() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_msix(0xc000);
    bench.pci.0.msix.raise(2, ISR_QUEUE);
    bench.set(TABLE + 32 + 12, 4, 1);
    bench.set(TABLE + 32 + 12, 4, 0);
    assert_eq!((bench.interrupts(2), bench.get(PENDING, 4)), (0, 0b100));
    bench.set_msix(0x8000);
    assert_eq!(bench.interrupts(2), 1);
}

#[test]
fn the_host_is_asked_only_for_what_is_used_and_only_after_a_change() {
    let mut bench = Bench::new();
    bench.start();
    assert!(
        bench.lines.routes.lock().unwrap().is_empty(),
        "nothing was raised yet"
    );
    let routes = |bench: &Bench| std::mem::take(&mut *bench.lines.routes.lock().unwrap());
    for _ in 0..100 {
        bench.pci.0.msix.raise(1, ISR_QUEUE);
    }
    assert_eq!(routes(&bench), [(65, Some(message(0x31)))]);
    bench.set_vector(1, message(0x99), false);
    bench.set_vector(1, message(0x31), false);
    bench.pci.0.msix.raise(1, ISR_QUEUE);
    assert_eq!(routes(&bench), []);
    bench.set_vector(1, message(0x99), false);
    bench.pci.0.msix.raise(1, ISR_QUEUE);
    assert_eq!(routes(&bench), [(65, Some(message(0x99)))]);
    assert_eq!(bench.lines.events.lock().unwrap().len(), 1);
    assert_eq!(bench.interrupts(1), 102);
}

#[test]
fn c27_messages_outside_the_local_apics_go_nowhere() {
    let cases = [
        ("below", 0xfedf_fffc, false),
        ("first", 0xfee0_0000, true),
        ("last", 0xfeef_fffc, true),
        ("above", 0xfef0_0000, false),
        ("in RAM", 0x10_0000, false),
        ("zero", 0, false),
        ("high half set", 0x1_fee0_0000, false),
    ];
    for (name, address, delivered) in cases {
        let mut bench = Bench::new();
        bench.start();
        bench.set_vector(1, MsiMessage { address, data: 1 }, false);
        bench.pci.0.msix.raise(1, ISR_QUEUE);
        assert_eq!(bench.interrupts(1), u64::from(delivered), "{name}");
        assert_eq!(
            bench.lines.routes.lock().unwrap().len(),
            usize::from(delivered),
            "{name}"
        );
    }
}

#[test]
fn c27_vectors_that_do_not_exist_are_refused() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_status(0);
    for (vector, read) in [
        (0, 0),
        (2, 2),
        (3, 0xffff),
        (64, 0xffff),
        (0xfffe, 0xffff),
        (0xffff, 0xffff),
    ] {
        bench.set_common(0x10, 2, vector);
        assert_eq!(bench.common(0x10, 2), read);
        bench.set_common(0x16, 2, 1);
        bench.set_common(0x1a, 2, vector);
        assert_eq!(bench.common(0x1a, 2), read);
    }
    for vector in [3, 64, 0xfffe, 0xffff] {
        bench.pci.0.msix.raise(vector, ISR_QUEUE);
    }
    assert!(bench.lines.events.lock().unwrap().is_empty());
}

#[test]
fn c27_table_entries_are_written_by_words_and_double_words() {
    let bench = Bench::new();
    bench.set_config(4, 2, 6);
    bench.set(TABLE + 16, 8, 0xfee0_1000);
    bench.set(TABLE + 24, 8, 0x45);
    assert_eq!(bench.get(TABLE + 16, 8), 0xfee0_1000);
    assert_eq!(bench.get(TABLE + 24, 4), 0x45);
    assert_eq!(bench.get(TABLE + 28, 4), 0);
    bench.set(TABLE + 28, 4, 0xffff_ffff);
    assert_eq!(bench.get(TABLE + 28, 4), 1, "only the mask bit is there");
    bench.set(PENDING, 8, u64::MAX);
    assert_eq!(bench.get(PENDING, 8), 0);
    assert_eq!(bench.get(TABLE + 48, 4), 0xffff_ffff, "past the last entry");
}

#[test]
fn without_msix_causes_show_in_the_isr_register_and_a_read_clears_it() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_msix(0);
    assert!(bench.answers());
    bench.rings[0].set_available(0x8000);
    bench.pci.on_event(0);
    assert_eq!(bench.get(BAR + 0x2000, 1), 3);
    assert_eq!(bench.get(BAR + 0x2000, 1), 0);
    bench.set_msix(0x8000);
    assert_eq!(bench.interrupts(1), 0);
}

#[test]
fn a_reset_forgets_interrupts_that_were_not_delivered() {
    let mut bench = Bench::new();
    bench.start();
    bench.set_msix(0xc000);
    assert!(bench.answers());
    assert_eq!(bench.get(PENDING, 4), 0b10);
    bench.set_status(0);
    assert_eq!(bench.get(PENDING, 4), 0);
    bench.set_msix(0x8000);
    assert_eq!(bench.interrupts(1), 0);
}
