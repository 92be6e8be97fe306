use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;

use arch::mem::{Visibility, VisibilityMap};
use vm_memory::GuestMemoryMmap;

use super::*;

const BUFFER: u64 = 0x4000;
const SIZE: u64 = 0x4000;
const RAM: u64 = 0x40_0000;

/// A guest with a service at `address`.
struct Rig {
    shared: SharedMem,
    visible: Arc<VisibilityMap>,
    rings: Arc<AtomicUsize>,
    service: QuoteService,
}

impl Rig {
    fn new(address: Option<Address>) -> Self {
        Self::entering(address, Ok)
    }

    fn entering(address: Option<Address>, enter: fn(()) -> io::Result<()>) -> Self {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let ram = [PageRange::new(Gpa(0), RAM).unwrap()];
        let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Shared));
        let shared = SharedMem::new(Arc::new(map), Arc::clone(&visible));
        let enter: Enter = Arc::new(move || enter(()));
        let source = address.map(|address| Source { address, enter });
        let rings = Arc::new(AtomicUsize::new(0));
        let bell = Arc::clone(&rings);
        let notify = Box::new(move || {
            bell.fetch_add(1, Ordering::SeqCst);
        });
        let service = QuoteService::new(shared.clone(), source, notify).unwrap();
        let rig = Self {
            shared,
            visible,
            rings,
            service,
        };
        rig.ask(BUFFER, 7);
        rig
    }

    /// Prepares a request, as Linux does.
    fn ask(&self, gpa: u64, report: u8) {
        let mut bytes = vec![0; 24];
        bytes[0] = 1;
        bytes[16..20].copy_from_slice(&1024_u32.to_le_bytes());
        bytes.extend([report; 1024]);
        self.shared.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    fn status(&self, gpa: u64) -> u64 {
        self.shared
            .load(GuestAddress(gpa + 8), Ordering::Acquire)
            .unwrap()
    }

    fn bytes(&self, gpa: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.shared.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn wait(&self, gpa: u64) -> u64 {
        let end = Instant::now() + Duration::from_secs(10);
        while self.status(gpa) == Status::InFlight as u64 {
            assert!(Instant::now() < end, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.status(gpa)
    }

    fn hide(&self, gpa: u64) {
        self.visible
            .set(PageRange::new(Gpa(gpa), 0x1000).unwrap(), Visibility::Private);
    }
}

/// A service that answers a request when it is told to, with a quote that begins with the report's first byte.
pub(super) struct Gated {
    path: PathBuf,
    pub(super) go: mpsc::Sender<Vec<u8>>,
    pub(super) seen: mpsc::Receiver<u8>,
}

impl Gated {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cvmm-get-quote-{}-{name}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let (go, gate) = mpsc::channel::<Vec<u8>>();
        let (to_test, seen) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 4 + 24 + 1024];
                stream.read_exact(&mut request).unwrap();
                let _ = to_test.send(request[28]);
                let Ok(mut quote) = gate.recv() else { return };
                quote[0] = request[28];
                let size = 24 + quote.len() as u32;
                let mut answer = size.to_be_bytes().to_vec();
                for word in [0x1_0001, 1, size, 0, 0, quote.len() as u32] {
                    answer.extend(word.to_le_bytes());
                }
                answer.extend(quote);
                // The guest may be gone.
                let _ = stream.write_all(&answer);
            }
        });
        Self { path, go, seen }
    }

    pub(super) fn address(&self) -> Option<Address> {
        Some(Address::Unix(self.path.clone()))
    }
}

impl Drop for Gated {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn a_quote_comes_back_with_its_length_and_the_guest_is_told() {
    let qgs = Gated::new("whole");
    let rig = Rig::new(qgs.address());
    assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
    assert_eq!(qgs.seen.recv().unwrap(), 7);
    assert_eq!(rig.status(BUFFER), u64::MAX);
    assert_eq!(rig.rings.load(Ordering::SeqCst), 0);
    let quote: Vec<u8> = (0..200).collect();
    qgs.go.send(quote.clone()).unwrap();
    assert_eq!(rig.wait(BUFFER), 0);
    assert_eq!(rig.bytes(BUFFER + 20, 4), 200_u32.to_le_bytes());
    let got = rig.bytes(BUFFER + 24, 200);
    assert_eq!((got[0], &got[1..]), (7, &quote[1..]));
    drop(rig.service);
    assert_eq!(rig.rings.load(Ordering::SeqCst), 1);
}

#[test]
fn buffers_that_cannot_be_used_are_refused_untouched() {
    let rig = Rig::new(None);
    rig.hide(0x10000);
    rig.ask(0xf000, 1);
    rig.ask(0x20000, 1);
    let cases = [
        ("no size", BUFFER, 0),
        ("size of less than a request", BUFFER, 0x400),
        ("size in bytes", BUFFER, 0x1800),
        ("unaligned", BUFFER + 8, SIZE),
        ("longer than the limit", 0x20000, (128 << 10) + 0x1000),
        ("all memory", BUFFER, !0xfff),
        ("wraps", !0xfff, 0x2000),
        ("past the end of RAM", RAM - 0x1000, 0x2000),
        ("no RAM", RAM, 0x1000),
        ("private", 0x10000, 0x1000),
        ("private in part", 0xf000, 0x2000),
    ];
    for (what, gpa, size) in cases {
        let reply = rig.service.request(gpa, size);
        assert_eq!(reply, ReplyCode::InvalidOperand, "{what}");
    }
    assert_eq!((rig.status(BUFFER), rig.status(0xf000)), (0, 0));
    assert_eq!(rig.rings.load(Ordering::SeqCst), 0);
    assert_eq!(rig.service.request(0x20000, 128 << 10), ReplyCode::Success);
}

#[test]
fn headers_that_are_no_requests_are_refused_untouched() {
    let rig = Rig::new(None);
    let cases: [(u64, &[u8]); 6] = [
        (0, &0_u64.to_le_bytes()),
        (0, &2_u64.to_le_bytes()),
        (0, &(1_u64 << 32 | 1).to_le_bytes()),
        (16, &1023_u32.to_le_bytes()),
        (16, &1025_u32.to_le_bytes()),
        (16, &u32::MAX.to_le_bytes()),
    ];
    for (at, value) in cases {
        rig.ask(BUFFER, 1);
        rig.shared.write_slice(value, GuestAddress(BUFFER + at)).unwrap();
        let reply = rig.service.request(BUFFER, SIZE);
        assert_eq!(
            (reply, rig.status(BUFFER)),
            (ReplyCode::InvalidOperand, 0),
            "{at}: {value:?}"
        );
    }
    assert_eq!(Header::parse(&[1; 23]), Err(BadHeader::Short));
}

#[test]
fn without_a_service_the_guest_knows_at_once() {
    let rig = Rig::new(None);
    assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
    assert_eq!(rig.status(BUFFER), 0x8000_0000_0000_0001);
    assert_eq!(rig.rings.load(Ordering::SeqCst), 1);

    let gone = Rig::new(Some(Address::Unix("/nonexistent/qgs.socket".into())));
    let start = Instant::now();
    for _ in 0..20 {
        assert_eq!(gone.service.request(BUFFER, SIZE), ReplyCode::Success);
        assert_eq!(gone.wait(BUFFER), 0x8000_0000_0000_0001);
        gone.ask(BUFFER, 1);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn requests_in_flight_are_counted_and_none_shares_a_buffer() {
    let qgs = Gated::new("many");
    let rig = Rig::new(qgs.address());
    let buffer = |n: u64| 0x10_0000 + n * 0x2000;
    for n in 0..100 {
        rig.ask(buffer(n), n as u8);
        let expected = if n < 8 {
            ReplyCode::Success
        } else {
            ReplyCode::Retry
        };
        assert_eq!(rig.service.request(buffer(n), 0x2000), expected, "{n}");
    }
    assert_eq!(rig.service.request(buffer(3) + 0x1000, 0x1000), ReplyCode::Retry);
    assert_eq!(rig.status(buffer(8)), 0);
    for n in 0..8 {
        qgs.go.send(vec![0; 100]).unwrap();
        assert_eq!(rig.wait(buffer(n)), 0);
        assert_eq!(rig.bytes(buffer(n) + 24, 1), [n as u8]);
        // A guest that has seen an answer may ask again.
        if n == 0 {
            rig.ask(buffer(0), 50);
            assert_eq!(rig.service.request(buffer(0), 0x2000), ReplyCode::Success);
        }
    }
    qgs.go.send(vec![0; 100]).unwrap();
    assert_eq!(rig.wait(buffer(0)), 0);
    assert_eq!(rig.bytes(buffer(0) + 24, 1), [50]);
}

#[test]
fn a_request_has_25_seconds_and_linux_waits_for_30() {
    let mut rig = Rig::new(None);
    let (queue, jobs) = sync_channel(1);
    rig.service.worker = Some(Worker {
        queue: Some(queue),
        stop: Arc::new(Stop::new().unwrap()),
        thread: None,
    });
    let time = Duration::from_secs(25);
    let before = Instant::now();
    assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
    let until = jobs.recv().unwrap().until;
    assert!((before + time..=Instant::now() + time).contains(&until));
}

#[test]
fn failures_are_told_of_once_in_ten_seconds() {
    let (mut ration, start) = (Ration::default(), Instant::now());
    let told = (0..30_000).filter(|ms| ration.admits(start + Duration::from_millis(*ms)));
    assert_eq!(told.collect::<Vec<_>>(), [0, 10_000, 20_000]);
}

#[test]
fn the_report_is_read_once() {
    let qgs = Gated::new("once");
    let rig = Rig::new(qgs.address());
    assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
    rig.shared
        .write_slice(&[0xff; 4], GuestAddress(BUFFER + 16))
        .unwrap();
    rig.shared
        .write_slice(&[9; 1024], GuestAddress(BUFFER + 24))
        .unwrap();
    qgs.go.send(vec![0; 100]).unwrap();
    assert_eq!(rig.wait(BUFFER), 0);
    assert_eq!(rig.bytes(BUFFER + 24, 1), [7]);
}

#[test]
fn a_buffer_taken_away_is_not_written() {
    type Taken = fn(&Rig);
    let cases: [(&str, Taken); 3] = [
        ("private", |rig| rig.hide(BUFFER + 0x3000)),
        ("private and shared again", |rig| {
            rig.shared
                .write_slice(&[0; 0x1000], GuestAddress(BUFFER))
                .unwrap();
        }),
        ("used for something else", |rig| {
            rig.shared
                .write_slice(&[0x5a; 0x1000], GuestAddress(BUFFER))
                .unwrap();
        }),
    ];
    for (n, (what, taken)) in cases.into_iter().enumerate() {
        let qgs = Gated::new(&format!("taken{n}"));
        let rig = Rig::new(qgs.address());
        assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
        qgs.seen.recv().unwrap();
        taken(&rig);
        let before = rig.bytes(BUFFER, 0x3000);
        qgs.go.send(vec![0x77; 0x3000]).unwrap();
        // The next request's answer comes after it.
        rig.ask(0x10_0000, 1);
        assert_eq!(rig.service.request(0x10_0000, 0x1000), ReplyCode::Success);
        qgs.go.send(vec![0; 100]).unwrap();
        assert_eq!(rig.wait(0x10_0000), 0);
        assert_eq!(rig.bytes(BUFFER, 0x3000), before, "{what}");
        drop(rig.service);
        assert_eq!(rig.rings.load(Ordering::SeqCst), 1, "{what}");
    }
}

#[test]
fn a_quote_longer_than_the_buffer_is_an_error() {
    let qgs = Gated::new("long");
    let rig = Rig::new(qgs.address());
    for (bytes, status) in [(0x1000 - 24, 0), (0x1000 - 23, 0x8000_0000_0000_0000_u64)] {
        rig.ask(BUFFER, 7);
        rig.shared
            .write_slice(&[0xee; 8], GuestAddress(BUFFER + 0x1000))
            .unwrap();
        assert_eq!(rig.service.request(BUFFER, 0x1000), ReplyCode::Success);
        qgs.go.send(vec![3; bytes]).unwrap();
        assert_eq!(rig.wait(BUFFER), status);
        let stated = if status == 0 { bytes as u32 } else { 0 };
        assert_eq!(rig.bytes(BUFFER + 20, 4), stated.to_le_bytes());
        assert_eq!(rig.bytes(BUFFER + 0x1000, 8), [0xee; 8]);
    }
}

#[test]
fn the_end_of_a_guest_waits_for_no_service_and_leaves_its_memory_alone() {
    let qgs = Gated::new("end");
    let Rig {
        shared,
        service,
        rings,
        ..
    } = Rig::new(qgs.address());
    assert_eq!(service.request(BUFFER, SIZE), ReplyCode::Success);
    qgs.seen.recv().unwrap();
    let before = Arc::strong_count(shared.mapping());
    let start = Instant::now();
    drop(service);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // The thread is gone, and its hold on the memory with it.
    assert!(Arc::strong_count(shared.mapping()) < before);
    let _ = qgs.go.send(vec![1; 100]);
    std::thread::sleep(Duration::from_millis(20));
    let status: u64 = shared.load(GuestAddress(BUFFER + 8), Ordering::Acquire).unwrap();
    assert_eq!(
        (status, rings.load(Ordering::SeqCst)),
        (Status::InFlight as u64, 0)
    );
}

#[test]
fn a_thread_that_cannot_be_confined_talks_to_nobody() {
    let qgs = Gated::new("confined");
    let rig = Rig::entering(qgs.address(), |()| Err(io::Error::other("no seccomp")));
    assert_eq!(rig.service.request(BUFFER, SIZE), ReplyCode::Success);
    assert_eq!(rig.wait(BUFFER), Status::Unavailable as u64);
    assert!(qgs.seen.try_recv().is_err());
}

#[test]
fn nothing_is_written_once_a_conversion_has_drained() {
    let qgs = Gated::new("race");
    let rig = Rig::new(qgs.address());
    let page = PageRange::new(Gpa(BUFFER), 0x1000).unwrap();
    let private = || {
        let mut bytes = vec![0; 0x1000];
        let map: &GuestMemoryMmap = rig.shared.mapping();
        map.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        bytes
    };
    let mut dropped = 0;
    for n in 0..200 {
        rig.ask(BUFFER, 7);
        assert_eq!(rig.service.request(BUFFER, 0x1000), ReplyCode::Success);
        qgs.seen.recv().unwrap();
        qgs.go.send(vec![0x77; 4000]).unwrap();
        // From before the answer is there to after it.
        let start = Instant::now();
        while start.elapsed() < Duration::from_nanos(n * 500) {}
        rig.visible.set(page, Visibility::Private);
        assert!(rig.visible.drain(page, Duration::from_secs(5)));
        let before = private();
        // The worker is done once it takes the next request.
        rig.ask(0x10_0000, 1);
        while rig.service.request(0x10_0000, 0x1000) != ReplyCode::Success {}
        qgs.seen.recv().unwrap();
        assert_eq!(private(), before);
        dropped += u32::from(before[8..16] == [0xff; 8]);
        qgs.go.send(vec![0; 100]).unwrap();
        assert_eq!(rig.wait(0x10_0000), 0);
        rig.visible.set(page, Visibility::Shared);
    }
    println!("{dropped} of 200 quotes dropped");
    assert!(dropped > 0);
}
