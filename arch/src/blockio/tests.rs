//! Every engine runs the same tables, on real files.

mod rest;

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::addr::PageRange;
use crate::mem::{Visibility, VisibilityMap};

const RAM_BYTES: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(20);

type Make = fn(&Disk) -> io::Result<Box<dyn Engine>>;

const ENGINES: [(&str, Make); 3] = [
    ("io_uring", |disk| disk.uring_engine(8)),
    ("threads", |disk| Ok(disk.thread_engine(8, &free()))),
    ("caller", |disk| Ok(disk.inline_engine(8))),
];

/// Threads that give up nothing.
fn free() -> Enter {
    Arc::new(|| Ok(()))
}

/// Runs `test` for each engine that this host has.
fn each(disk_bytes: u64, test: impl Fn(&str, &mut Rig)) {
    for (name, make) in ENGINES {
        let file = temp_file(0).unwrap();
        file.set_len(disk_bytes).unwrap();
        match Rig::new(&file, make) {
            Ok(mut rig) => test(name, &mut rig),
            Err(e) if name == "io_uring" => eprintln!("SKIPPED: io_uring is not available here: {e}"),
            Err(e) => panic!("{name}: {e}"),
        }
    }
}

/// A file without a name, which nobody needs to remove.
fn temp_file(flags: i32) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let options = options.read(true).write(true);
    options
        .custom_flags(libc::O_TMPFILE | flags)
        .open(std::env::temp_dir())
}

struct Rig {
    disk: Disk,
    engine: Box<dyn Engine>,
    mem: SharedMem,
    visible: Arc<VisibilityMap>,
    file: File,
}

impl Rig {
    fn new(file: &File, make: Make) -> io::Result<Self> {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap();
        let ram = [PageRange::new(Gpa(0), RAM_BYTES).unwrap()];
        let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Shared));
        let disk = Disk::open(file.try_clone()?)?;
        Ok(Self {
            engine: make(&disk)?,
            disk,
            mem: SharedMem::new(Arc::new(map), visible.clone()),
            visible,
            file: file.try_clone()?,
        })
    }

    /// Runs one action to its end; the error kind, if any.
    fn run(&mut self, action: Action<'_>) -> Result<(), ErrorKind> {
        self.engine.submit(&self.mem, 7, action).expect("refused");
        let mut done = self.collect(1);
        let done = done.pop().unwrap();
        assert_eq!(done.tag, 7);
        done.result.map_err(|e| e.kind())
    }

    /// Waits for `count` completions, the way an event loop does.
    fn collect(&mut self, count: usize) -> Vec<Done> {
        let mut done = vec![];
        let until = Instant::now() + LONG;
        loop {
            let more = self.engine.run(&mut done, &mut { COPIES }).unwrap();
            if done.len() >= count {
                return done;
            }
            assert!(Instant::now() < until, "only {} of {count}", done.len());
            if !more {
                wait_readable(&self.disk, 5000);
                self.disk.acknowledge();
            }
        }
    }
}

/// Waits for the notifier and fails if it stays silent.
fn wait_readable(disk: &Disk, ms: i32) {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    let mut poll = EpollEvent::default();
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, disk.notifier().as_raw_fd(), event)
        .unwrap();
    let count = loop {
        // The kernel finishes operations of this thread by interrupting it.
        match epoll.wait(ms, std::slice::from_mut(&mut poll)) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => break other.unwrap(),
        }
    };
    assert_eq!(count, 1, "no completion was announced within {ms} ms");
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn scattered_reads_and_writes_land_in_order() {
    each(64 << 10, |name, rig| {
        let data = pattern(10_000, 3);
        rig.file.write_all_at(&data, 512).unwrap();
        let segments = [(Gpa(0x8000), 1), (Gpa(0x1ffff), 4999), (Gpa(0x3000), 5000)];
        let read = Action::Read {
            offset: 512,
            segments: &segments,
        };
        rig.run(read).unwrap();
        let mut seen = vec![];
        for (start, bytes) in segments {
            let mut part = vec![0; bytes as usize];
            rig.mem.read_slice(&mut part, GuestAddress(start.0)).unwrap();
            seen.extend(part);
        }
        assert!(seen == data, "{name}");
        for durable in [false, true] {
            let offset = 30_000 + u64::from(durable);
            let write = Action::Write {
                offset,
                segments: &segments,
                durable,
            };
            rig.run(write).unwrap();
            let mut stored = vec![0; data.len()];
            rig.file.read_exact_at(&mut stored, offset).unwrap();
            assert!(stored == data, "{name} durable {durable}");
        }
        rig.run(Action::Flush).unwrap();
        assert_eq!(rig.engine.in_flight(), 0, "{name}");
    });
}

#[test]
fn a_file_that_shrank_gives_an_error_not_stale_data() {
    each(8192, |name, rig| {
        rig.file.set_len(4096).unwrap();
        let segments = [(Gpa(0), 4096), (Gpa(0x2000), 4096)];
        let read = Action::Read {
            offset: 0,
            segments: &segments,
        };
        assert_eq!(rig.run(read), Err(ErrorKind::UnexpectedEof), "{name}");
        let read = Action::Read {
            offset: 1 << 40,
            segments: &segments,
        };
        assert_eq!(rig.run(read), Err(ErrorKind::UnexpectedEof), "{name}");
        let read = Action::Read {
            offset: u64::MAX - 4096,
            segments: &segments,
        };
        assert_eq!(rig.run(read), Err(ErrorKind::InvalidInput), "{name}");
    });
}

#[test]
fn freed_and_zeroed_ranges_read_as_zeros() {
    each(1 << 20, |name, rig| {
        rig.file.write_all_at(&vec![0xee; 1 << 20], 0).unwrap();
        let actions = [
            Action::Discard {
                offset: 0x10000,
                bytes: 0x10000,
            },
            Action::Zero {
                offset: 0x30000,
                bytes: 0x10000,
                unmap: false,
                durable: true,
            },
            Action::Zero {
                offset: 0x50000,
                bytes: 0x10200,
                unmap: true,
                durable: false,
            },
        ];
        for action in actions {
            rig.run(action)
                .unwrap_or_else(|e| panic!("{name} {action:?}: {e}"));
        }
        let mut all = vec![0; 1 << 20];
        rig.file.read_exact_at(&mut all, 0).unwrap();
        let zeros = all.iter().filter(|b| **b == 0).count();
        assert_eq!(zeros, 0x30200, "{name}");
        assert!(all[0x50000..0x60200].iter().all(|b| *b == 0), "{name}");
        let empty = Action::Discard { offset: 0, bytes: 0 };
        assert_eq!(rig.run(empty), Err(ErrorKind::InvalidInput), "{name}");
    });
}

#[test]
fn memory_that_is_not_shared_is_refused_before_anything_begins() {
    each(8192, |name, rig| {
        let private = PageRange::new(Gpa(0x2000), 0x1000).unwrap();
        rig.visible.set(private, Visibility::Private);
        for (start, bytes) in [
            (0x2000, 1),
            (0x1fff, 2),
            (RAM_BYTES - 1, 2),
            (u64::MAX, 2),
            (1 << 40, 512),
        ] {
            let segments = [(Gpa(0), 512), (Gpa(start), bytes)];
            let read = Action::Read {
                offset: 0,
                segments: &segments,
            };
            let refused = Refused::NotShared { start, bytes };
            assert_eq!(rig.engine.submit(&rig.mem, 1, read), Err(refused), "{name}");
        }
        assert_eq!(rig.engine.in_flight(), 0, "{name}");
        // No pin is left behind.
        assert!(
            rig.visible
                .drain(PageRange::new(Gpa(0), RAM_BYTES).unwrap(), Duration::ZERO),
            "{name}"
        );
    });
}

/// 40 bytes for each: where it is, and the pin that keeps its page.
#[test]
fn an_operation_has_at_most_1024_pieces() {
    each(1 << 20, |name, rig| {
        let segments = [(Gpa(0x1000), 512); 1025];
        let read = |count| Action::Read {
            offset: 0,
            segments: &segments[..count],
        };
        let refused = rig.engine.submit(&rig.mem, 1, read(1025));
        assert_eq!(refused, Err(Refused::TooManySegments), "{name}");
        assert_eq!(rig.run(read(1024)), Ok(()), "{name}");
    });
    assert_eq!(size_of::<libc::iovec>() + size_of::<crate::mem::Pin>(), 40);
}

#[test]
fn no_more_operations_than_the_depth_and_all_of_them_finish() {
    each(1 << 20, |name, rig| {
        for round in 0..50_u64 {
            let segments: Vec<_> = (0..8).map(|i| [(Gpa(i * 0x4000), 0x4000)]).collect();
            for (tag, segments) in segments.iter().enumerate() {
                let offset = tag as u64 * 0x4000;
                let action = match round % 2 {
                    0 => Action::Write {
                        offset,
                        segments,
                        durable: false,
                    },
                    _ => Action::Read { offset, segments },
                };
                rig.engine.submit(&rig.mem, tag as u64, action).unwrap();
            }
            assert_eq!(
                rig.engine.submit(&rig.mem, 9, Action::Flush),
                Err(Refused::Full),
                "{name}"
            );
            let mut tags: Vec<_> = rig.collect(8).iter().map(|done| done.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, (0..8).collect::<Vec<_>>(), "{name}");
        }
    });
}

#[test]
fn what_the_calling_thread_does_is_bounded_and_the_rest_is_done_later() {
    let file = temp_file(0).unwrap();
    file.set_len(256 << 20).unwrap();
    let mut rig = Rig::new(&file, |disk| Ok(disk.inline_engine(8))).unwrap();
    let megabytes = [(Gpa(0), 1 << 20); 10];
    let read = Action::Read {
        offset: 512,
        segments: &megabytes,
    };
    let free = Action::Discard {
        offset: 512,
        bytes: 130 << 20,
    };
    let write = Action::Write {
        offset: 0,
        segments: &megabytes[..1],
        durable: true,
    };
    for (actions, expected) in [
        (vec![read, write], [false, false, true].as_slice()),
        (vec![free], &[false, false, true]),
        (vec![write; 4], &[true]),
        (vec![write; 5], &[false, true]),
    ] {
        for (tag, action) in (0..).zip(&actions) {
            rig.engine.submit(&rig.mem, tag, *action).unwrap();
        }
        let mut done = vec![];
        for last in expected {
            assert_eq!(
                rig.engine.run(&mut done, &mut { COPIES }).unwrap(),
                !last,
                "{actions:?}"
            );
        }
        assert_eq!(done.len(), actions.len());
        assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
        assert_eq!(rig.engine.in_flight(), 0);
    }
}

#[test]
fn a_large_read_is_not_copied_by_the_thread_that_begins_it() {
    let file = temp_file(0).unwrap();
    file.write_all_at(&vec![1; 16 << 20], 0).unwrap();
    for (name, make) in &ENGINES[..2] {
        let mut rig = match Rig::new(&file, *make) {
            Ok(rig) => rig,
            Err(e) => {
                eprintln!("SKIPPED: {name} is not available here: {e}");
                continue;
            }
        };
        let segments = [(Gpa(0), 1 << 20); 16];
        let read = Action::Read {
            offset: 0,
            segments: &segments,
        };
        // Another thread may be very fast, but not each time.
        let returned_early = (0..20).any(|_| {
            rig.engine.submit(&rig.mem, 1, read).unwrap();
            let mut done = vec![];
            rig.engine.run(&mut done, &mut { COPIES }).unwrap();
            let early = done.is_empty();
            assert!(!early || rig.collect(1)[0].result.is_ok());
            early
        });
        assert!(returned_early, "{name}");
    }
}

#[test]
fn what_the_host_refuses_is_an_error_of_that_operation_only() {
    for (name, make) in ENGINES {
        let mut rig = match Rig::new(&File::open("/proc/self/exe").unwrap(), make) {
            Ok(rig) => rig,
            Err(e) => {
                eprintln!("SKIPPED: {name} is not available here: {e}");
                continue;
            }
        };
        let segments = [(Gpa(0), 4096)];
        let write = Action::Write {
            offset: 0,
            segments: &segments,
            durable: false,
        };
        let zero = Action::Zero {
            offset: 0,
            bytes: 512,
            unmap: false,
            durable: true,
        };
        for action in [write, zero] {
            rig.engine.submit(&rig.mem, 1, action).unwrap();
            let error = rig.collect(1).pop().unwrap().result.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{name}");
        }
        rig.run(Action::Read {
            offset: 0,
            segments: &segments,
        })
        .unwrap();
    }
    each(8192, |name, rig| {
        let segments = [(Gpa(0), 4096)];
        let write = Action::Write {
            offset: 1 << 62,
            segments: &segments,
            durable: false,
        };
        assert_eq!(rig.run(write), Err(ErrorKind::FileTooLarge), "{name}");
        rig.run(Action::Flush).unwrap();
    });
}

#[test]
fn only_files_and_block_devices_are_disks() {
    for path in ["/", "/dev/null", "/dev/full"] {
        let error = Disk::open(File::open(path).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}");
    }
    let file = temp_file(0).unwrap();
    file.set_len(1234).unwrap();
    assert_eq!(Disk::open(file).unwrap().geometry().bytes, 1234);
}

#[test]
fn a_disk_has_four_threads_however_many_queues_and_operations() {
    let entered = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&entered);
    let enter: Enter = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let file = temp_file(0).unwrap();
    file.set_len(1 << 20).unwrap();
    let disk = Disk::open(file).unwrap();
    let engines: Vec<_> = (0..16).map(|_| disk.thread_engine(8, &enter)).collect();
    let until = Instant::now() + LONG;
    while entered.load(Ordering::SeqCst) < 4 {
        assert!(Instant::now() < until, "too few threads");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(entered.load(Ordering::SeqCst), 4);
    drop(engines);
}

/// A disk works although none of its threads may.
#[test]
fn threads_that_cannot_be_confined_do_not_work() {
    let file = temp_file(0).unwrap();
    file.set_len(8192).unwrap();
    let refused: Enter = Arc::new(|| Err(io::Error::other("no seccomp")));
    let mut rig = Rig::new(&file, |disk| Ok(disk.inline_engine(8))).unwrap();
    rig.engine = rig.disk.thread_engine(8, &refused);
    let segments = [(Gpa(0), 4096)];
    let read = Action::Read {
        offset: 0,
        segments: &segments,
    };
    rig.run(read).unwrap();
}
