//! Requests in memory that lies.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::virtio::lies::{Lie, Memory, Outside, Subject, check};
use crate::virtio::mock::INDIRECT;

const BYTES: usize = 8 << 10;

/// An engine that says how much is in flight.
#[derive(Debug)]
struct Counted(Box<dyn Engine>, Arc<AtomicUsize>);

impl Engine for Counted {
    fn submit(&mut self, mem: &SharedMem, tag: u64, action: Action<'_>) -> Result<(), Refused> {
        let result = self.0.submit(mem, tag, action);
        self.1.store(self.0.in_flight(), Ordering::SeqCst);
        result
    }
    fn run(&mut self, done: &mut Vec<Done>, copies: &mut u64) -> io::Result<bool> {
        let result = self.0.run(done, copies);
        self.1.store(self.0.in_flight(), Ordering::SeqCst);
        result
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn quiesce(&mut self, limit: Duration) -> bool {
        self.0.quiesce(limit)
    }
}

struct Wires {
    mem: SharedMem,
    block: Block,
    in_flight: Arc<AtomicUsize>,
    file: File,
}

fn work(running: &mut dyn Running, outside: &Outside) -> Result<(), QueueBroken> {
    let wires: &Wires = outside.downcast_ref().unwrap();
    {
        let _batch = wires.mem.batch();
        running.on_kick(0)?;
    }
    let until = Instant::now() + LONG;
    while wires.in_flight.load(Ordering::SeqCst) != 0 {
        assert!(Instant::now() < until, "the disk does not answer");
        if !readable(&wires.block, 100) {
            continue;
        }
        let _batch = wires.mem.batch();
        running.on_backend()?;
    }
    Ok(())
}

fn effect(outside: &mut Outside) -> Vec<u8> {
    let wires: &Wires = outside.downcast_ref().unwrap();
    let mut bytes = vec![0; BYTES];
    wires.file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

struct Shape {
    kind: u32,
    data: Vec<u8>,
    room: u32,
    indirect: bool,
}

fn subject(memory: &Memory, make: Make, shape: &Shape) -> (Subject, Vec<Lie>) {
    let file = disk_file(BYTES);
    let disk = Disk::open(file.try_clone().unwrap()).unwrap();
    let in_flight = Arc::new(AtomicUsize::new(0));
    let engine = Counted(make(&disk).unwrap(), Arc::clone(&in_flight));
    let mut block = Block::new(disk, vec![Box::new(engine)], false, ID).unwrap();
    let mut ring = MockRing::new(&memory.driver, RING, 16);
    let (with, _) = activation(&memory.device, &[&ring], ALL);
    let running = block.activate(with).unwrap();
    let header = header(shape.kind, 2);
    let readable: Vec<&[u8]> = [&header[..], &shape.data]
        .into_iter()
        .filter(|b| !b.is_empty())
        .collect();
    let writable: Vec<u32> = [shape.room, 1].into_iter().filter(|len| *len != 0).collect();
    let (_, at) = ring.send(&readable, &writable);
    let mut lies = vec![
        Lie::new("type", at[0], &u32::to_le_bytes(u32::from(shape.kind == IN))),
        Lie::new("type", at[0], &77_u32.to_le_bytes()),
        Lie::new("sector", at[0] + 8, &4_u64.to_le_bytes()),
        Lie::new("sector", at[0] + 8, &u64::MAX.to_le_bytes()),
    ];
    if shape.data.len() == 16 {
        lies.push(Lie::new("first sector of the range", at[1], &1_u64.to_le_bytes()));
        lies.push(Lie::new(
            "sectors of the range",
            at[1] + 8,
            &9999_u32.to_le_bytes(),
        ));
    }
    if shape.indirect {
        let table = ring.buffer(16 * at.len());
        let raw = ring.read(ring.table(), 16 * at.len());
        memory.driver.write_slice(&raw, GuestAddress(table)).unwrap();
        for index in 1..at.len() as u16 {
            ring.descriptor(index, 0, 0, 0, 0);
        }
        ring.descriptor(0, table, 16 * at.len() as u32, INDIRECT, 0);
        for (index, last) in (0..).zip(1..=at.len() as u64) {
            let entry = table + index * 16;
            lies.push(Lie::new(
                "length in the table",
                entry + 8,
                &2048_u32.to_le_bytes(),
            ));
            lies.push(Lie::new("address in the table", entry, &LOW_END.to_le_bytes()));
            lies.push(Lie::new(
                "flags in the table",
                entry + 12,
                &INDIRECT.to_le_bytes(),
            ));
            lies.push(Lie::new(
                "next in the table",
                entry + 14,
                &(last as u16 ^ 2).to_le_bytes(),
            ));
        }
    }
    let buffers = writable.iter().rev().zip(at.iter().rev());
    let subject = Subject {
        buffers: buffers.map(|(len, at)| (*at, *len as usize)).collect(),
        rings: vec![ring],
        running: Some(running),
        work,
        outside: Box::new(Wires {
            mem: memory.driver.clone(),
            block,
            in_flight,
            file,
        }),
        effect,
    };
    (subject, lies)
}

fn shapes(indirect: bool) -> Vec<Shape> {
    let cases: [(u32, Vec<u8>, u32); 6] = [
        (IN, vec![], 1024),
        (OUT, vec![0x77; 1024], 0),
        (FLUSH, vec![], 0),
        (GET_ID, vec![], 20),
        (DISCARD, range(3, 4, 0), 0),
        (WRITE_ZEROES, range(3, 4, 1), 0),
    ];
    let shape = |(kind, data, room)| Shape {
        kind,
        data,
        room,
        indirect,
    };
    cases.map(shape).into()
}

#[test]
fn requests_withstand_memory_that_lies() {
    let (_, make) = ENGINES[2];
    for indirect in [false, true] {
        for shape in shapes(indirect) {
            let name = format!("kind {}, indirect {indirect}", shape.kind);
            check(&name, &move |memory: &Memory| subject(memory, make, &shape));
        }
    }
}

#[test]
fn requests_in_flight_withstand_memory_that_lies() {
    let here = Disk::open(disk_file(BYTES)).unwrap();
    for (engine, make) in ENGINES.into_iter().take(2) {
        if make(&here).is_err() {
            eprintln!("SKIPPED: {engine} is not available here");
            continue;
        }
        for shape in shapes(false).into_iter().take(1) {
            check(engine, &move |memory: &Memory| subject(memory, make, &shape));
        }
    }
}
