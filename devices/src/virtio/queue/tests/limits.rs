//! Exactly at each limit of a queue, and one beyond. The numbers are those of THREAT_MODEL.md.

use super::*;
use crate::console::{Console, ConsoleSpec};
use crate::virtio::console::VirtioConsole;
use crate::virtio::device::VirtioDevice;
use crate::virtio::input::VirtioPowerButton;
use crate::virtio::rng::VirtioRng;
use crate::virtio::vsock::Vsock;

/// A chain of `direct` descriptors, the last of which leads to an indirect table of `entries` if there are any.
fn chain(direct: u16, entries: u16) -> Result<usize, String> {
    let mut list: Vec<Raw> = (1..=direct).map(|next| (BUFFER, 1, NEXT, next)).collect();
    list.last_mut().unwrap().2 = 0;
    if entries != 0 {
        *list.last_mut().unwrap() = (TABLE, u32::from(entries) * 16, INDIRECT, 0);
    }
    let mut table: Vec<Raw> = (1..=entries).map(|next| (BUFFER, 1, NEXT, next)).collect();
    if let Some(last) = table.last_mut() {
        last.2 = 0;
    }
    pop(feature::INDIRECT_DESC, &list, &table).map(|list| list.len())
}

#[test]
fn a_chain_has_at_most_1024_descriptors_and_those_of_the_queue() {
    let loops: Vec<Raw> = (0..SIZE).map(|i| (BUFFER, 1, NEXT, (i + 1) % SIZE)).collect();
    assert_eq!(pop(0, &loops, &[]), Err("Endless".into()));
    let cases = [
        (SIZE, 0, Ok(8)),
        (1, 1024, Ok(1024)),
        (1, 1025, Err("Indirect")),
        (SIZE, 1024, Ok(7 + 1024)),
        (SIZE, 1025, Err("Indirect")),
    ];
    for (direct, entries, expected) in cases {
        let expected = expected.map_err(str::to_owned);
        assert_eq!(chain(direct, entries), expected, "{direct} and {entries}");
    }
}

#[test]
fn sums_of_lengths_are_bounded() {
    // C07: each buffer is fine, all together are as much as a chain may describe, or a byte more.
    let direct = |entries: u32| [(TABLE, entries * 16, INDIRECT, 0)];
    let mut table: Vec<Raw> = (1..=256).map(|next| (0, 4 << 20, NEXT | WRITE, next)).collect();
    table.push((0, 1, WRITE, 0));
    assert_eq!(
        pop(feature::INDIRECT_DESC, &direct(257), &table),
        Err("TooLong".into())
    );
    table[255].2 = WRITE;
    let chain = pop(feature::INDIRECT_DESC, &direct(256), &table).unwrap();
    assert_eq!(
        chain.iter().map(|(_, len, _)| u64::from(*len)).sum::<u64>(),
        1 << 30
    );
}

#[test]
fn as_many_chains_are_in_flight_as_the_queue_has_descriptors() {
    let (mem, _) = memory();
    let mut ring = MockRing::new(&mem, RING, SIZE);
    let (mut queue, _) = ring.device_side(0, 0);
    for head in 0..SIZE {
        ring.descriptor(head, BUFFER, 16, 0, 0);
        ring.offer(head);
        assert!(queue.pop(&mem).unwrap().is_some());
    }
    assert_eq!(queue.in_flight(), 8);
    // Whatever comes next is one of them, or none that exists.
    for (head, refused) in (0..SIZE).map(|head| (head, "Twice")).chain([(SIZE, "Head")]) {
        ring.set_available(SIZE);
        ring.offer(head);
        assert_eq!(kind(&queue.pop(&mem).unwrap_err().source), refused, "{head}");
        assert_eq!(queue.in_flight(), 8);
    }
    ring.set_available(SIZE + SIZE + 1);
    let (mut fresh, _) = ring.device_side(0, 0);
    assert_eq!(kind(&fresh.pop(&mem).unwrap_err().source), "Ring");
    assert_eq!(size_of::<Segment>(), 16, "what a buffer costs");
}

/// A driver chooses fewer if it likes. Disks: `block/tests/limits.rs`; network cards: `net/tests/config.rs`.
#[test]
fn no_queue_is_longer_than_the_threat_model_says() {
    let path = std::env::temp_dir().join(format!("cvmm-longest-{}", std::process::id()));
    let vsock = Vsock::open(42, &path).unwrap();
    let console = VirtioConsole::new(Console::open(&ConsoleSpec::Null).unwrap());
    let cases: [(&dyn VirtioDevice, &[u16]); 4] = [
        (&vsock, &[256, 256, 16]),
        (&console, &[64, 64]),
        (&VirtioRng::new().unwrap(), &[64]),
        (&VirtioPowerButton::new().unwrap().0, &[16, 16]),
    ];
    for (device, sizes) in cases {
        assert_eq!(device.queue_sizes(), sizes, "device {}", device.id());
    }
}
