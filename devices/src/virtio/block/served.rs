//! Requests on each engine, with a driver that does what Linux does (drivers/block/virtio_blk.c).

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use super::super::mock::memory;
use super::super::served::{Lines, Outside, REST, Ring, Schedule, Wired, pattern, search};
use super::*;

const SLOT: u64 = 8192;
/// Status, header and data in the buffer of a chain's first descriptor.
const STATUS: u64 = 16;
const DATA: u64 = 512;
/// Where large requests read and write: one piece of memory, again and again.
const LARGE: u64 = 0xc0_0000;
const PIECE: u32 = 1 << 20;
/// Bytes of the disk.
const DISK: u64 = 8 << 20;
/// Bytes per second where there is a limit.
const RATE: u64 = 100_000_000;

/// A request that is under way, by its head.
#[derive(Clone, Copy, Debug)]
struct Asked {
    kind: u32,
    sector: u64,
    bytes: u32,
}

/// A driver of a disk. It writes what is there already, so that it knows what it will read.
struct Driver {
    rings: Vec<Ring>,
    asked: Vec<Vec<Option<Asked>>>,
}

impl Driver {
    /// `virtio_queue_rq`; kicks if it is the last one of a batch, or if there is no room.
    fn ask(&mut self, queue: usize, asked: Asked, more: bool) -> bool {
        let ring = &mut self.rings[queue];
        let Some(head) = ring.next() else {
            ring.kick();
            return false;
        };
        let at = ring.at(head);
        let mut header = [0; 17];
        header[..4].copy_from_slice(&asked.kind.to_le_bytes());
        header[8..16].copy_from_slice(&asked.sector.to_le_bytes());
        header[16] = 0xee;
        ring.write(at, &header);
        let reads = asked.kind == 0;
        let mut parts = vec![(at, 16, false)];
        match asked.bytes {
            0 => {}
            bytes if bytes > PIECE => {
                parts.extend((0..bytes / PIECE).map(|_| (LARGE, PIECE, reads)));
            }
            bytes => {
                let data = if reads {
                    vec![0; bytes as usize]
                } else {
                    pattern(asked.sector * 512, bytes as usize)
                };
                ring.write(at + DATA, &data);
                parts.push((at + DATA, bytes, reads));
            }
        }
        parts.push((at + STATUS, 1, true));
        let added = ring.add(&parts);
        if added {
            self.asked[queue][usize::from(head)] = Some(asked);
        }
        if !more || !added {
            ring.kick();
        }
        added
    }

    /// `virtblk_done`.
    fn complete(&mut self, queue: usize, with: &Schedule) {
        loop {
            self.rings[queue].disable();
            while let Some((head, _)) = self.rings[queue].get() {
                self.check(queue, head, with);
            }
            if self.rings[queue].enable() {
                return;
            }
        }
    }

    fn check(&mut self, queue: usize, head: u16, with: &Schedule) {
        let ring = &self.rings[queue];
        let at = ring.at(head);
        let Some(asked) = self.asked[queue][usize::from(head)].take() else {
            return with.wrong(|| format!("nobody asked for {head} on {queue}"));
        };
        if ring.read(at + STATUS, 1) != [0] {
            with.wrong(|| format!("{asked:?} fails"));
        }
        let small = asked.kind == 0 && asked.bytes <= PIECE;
        if small
            && ring.read(at + DATA, asked.bytes as usize) != pattern(asked.sector * 512, asked.bytes as usize)
        {
            with.wrong(|| format!("{asked:?} reads other bytes"));
        }
    }
}

impl Outside for Driver {
    fn rings(&mut self) -> &mut Vec<Ring> {
        &mut self.rings
    }

    fn begin(&mut self, _: &Schedule) {
        for (ring, asked) in self.rings.iter().zip(&mut self.asked) {
            *asked = vec![None; usize::from(ring.size())];
        }
    }

    fn drive(&mut self, with: &Schedule) {
        let queue = with.pick(self.rings.len());
        let kind = with.one(&[0, 0, 1, 1, 4]);
        let bytes = match kind {
            4 => 0,
            1 => with.one(&[512, 4096]),
            _ => with.one(&[512, 512, 4096, 4096, 4096, 6 * PIECE]),
        };
        let count = with.one(&[1, 1, 3, 20, 200]);
        with.tell(|| format!("guest asks {count} times for {kind} of {bytes} on {queue}"));
        for left in (0..if bytes > PIECE { 1 } else { count }).rev() {
            let sector = if bytes > PIECE {
                0
            } else {
                with.pick(256) as u64 * 8
            };
            if !self.ask(queue, Asked { kind, sector, bytes }, left != 0) {
                break;
            }
        }
    }

    fn interrupt(&mut self, queue: usize, with: &Schedule) {
        self.complete(queue, with);
    }

    fn host(&mut self, _: &Schedule) {}

    fn answer(&mut self, _: &Schedule) -> bool {
        false
    }

    fn left(&mut self) -> Option<String> {
        let queue = self.rings.iter().position(|ring| ring.outstanding() != 0)?;
        let (outstanding, unused) = (self.rings[queue].outstanding(), self.rings[queue].unused());
        Some(format!(
            "{outstanding} requests of queue {queue}, {unused} not answered"
        ))
    }

    fn end(&mut self, _: &Schedule) {}
}

/// A file without a name, the same for all.
fn disk_file() -> &'static File {
    static FILE: OnceLock<File> = OnceLock::new();
    FILE.get_or_init(|| {
        let mut options = File::options();
        let options = options.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let file = options.open(std::env::temp_dir()).unwrap();
        file.write_all_at(&pattern(0, DISK as usize), 0).unwrap();
        file
    })
}

fn wired(with: &Schedule) -> Wired {
    let disk = Disk::open(disk_file().try_clone().unwrap()).unwrap();
    let queues = with.one(&[1, 2, 3]);
    // Where the calling thread does the work nothing depends on how fast others are.
    let engine = with.one(&["caller", "caller", "caller", "caller", "threads", "io_uring"]);
    let enter: Enter = Arc::new(|| Ok(()));
    let make = || match engine {
        "io_uring" => disk
            .uring_engine(QUEUE_SIZE)
            .unwrap_or_else(|_| disk.inline_engine(QUEUE_SIZE)),
        "threads" => disk.thread_engine(QUEUE_SIZE, &enter),
        _ => disk.inline_engine(QUEUE_SIZE),
    };
    let engines = (0..queues).map(|_| make()).collect();
    let block = Block::new(disk, engines, false, [0; 20]).unwrap();
    let bytes = with.one(&[None, None, Some(RATE)]);
    let block = block
        .limit(Rates {
            bytes,
            operations: None,
        })
        .unwrap();
    // Nothing is left of the first second.
    block.limit.take(RATE);
    let (mem, lines) = (memory().0, Arc::new(Lines::default()));
    let size = with.one(&[8, 16, 128]);
    let ring = |queue: u16| {
        let base = 0x10_0000 + u64::from(queue) * 0x20_0000;
        Ring::new(&mem, &lines, queue, base, size, SLOT)
    };
    let rings: Vec<_> = (0..queues).map(ring).collect();
    let driver = Driver {
        asked: vec![vec![]; rings.len()],
        rings,
    };
    Wired {
        device: Box::new(block),
        outside: Box::new(driver),
        mem,
        lines,
        features: feature::FLUSH,
        console: None,
        // The host's disk takes its time.
        rest: if engine == "caller" { REST } else { 10_000 },
    }
}

#[test]
fn no_request_is_forgotten() {
    search("block", 1000, &wired);
}
