//! Requests in memory that changes between two accesses of the service, at each access in turn.

use std::sync::atomic::AtomicUsize;

use arch::mem::{Visibility, VisibilityMap, Watch};
use vm_memory::{GuestMemoryMmap, Permissions};

use super::tests::Gated;
use super::*;

const BUFFER: u64 = 0x4000;
const PAGES: u64 = 4;
const PAGE: u64 = 4096;
const RAM: u64 = 0x40_0000;
/// It reaches into the third page.
const QUOTE_BYTES: usize = 9000;

#[derive(Debug)]
struct Liar {
    visible: Arc<VisibilityMap>,
    /// Which page turns private before which access.
    hide: Option<(u64, usize)>,
    accesses: AtomicUsize,
    reads: Mutex<Vec<u64>>,
}

impl Watch for Liar {
    fn before(&self, at: Gpa, bytes: u64, access: Permissions) {
        let now = self.accesses.fetch_add(1, Ordering::SeqCst);
        if access == Permissions::Read {
            self.reads.lock().unwrap().extend(at.0..at.0 + bytes);
        }
        if let Some((page, _)) = self.hide.filter(|(_, when)| *when == now) {
            let _hidden = self.visible.hide(PageRange::new(Gpa(page), PAGE).unwrap());
        }
    }
}

/// Runs one request to its end, and says how it was answered at once.
fn run(qgs: &Gated, hide: Option<(u64, usize)>) -> (ReplyCode, Arc<Liar>, SharedMem) {
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let ram = [PageRange::new(Gpa(0), RAM).unwrap()];
    let visible = Arc::new(VisibilityMap::new(&ram, Visibility::Shared));
    let shared = SharedMem::new(Arc::new(map), Arc::clone(&visible));
    let mut request = vec![0; 24];
    request[0] = 1;
    request[16..20].copy_from_slice(&1024_u32.to_le_bytes());
    request.extend([7; 1024]);
    shared.write_slice(&request, GuestAddress(BUFFER)).unwrap();
    let liar = Arc::new(Liar {
        visible,
        hide,
        accesses: AtomicUsize::new(0),
        reads: Mutex::default(),
    });
    let watch: Arc<dyn Watch> = Arc::<Liar>::clone(&liar);
    let source = qgs.address().map(|address| Source {
        address,
        enter: Arc::new(|| Ok(())),
    });
    let service = QuoteService::new(shared.clone().watched(watch), source, Box::new(|| {})).unwrap();
    let code = service.request(BUFFER, PAGES * PAGE);
    if code == ReplyCode::Success {
        assert_eq!(qgs.seen.recv().unwrap(), 7);
        qgs.go.send(vec![9; QUOTE_BYTES]).unwrap();
    }
    let end = Instant::now() + MOST_TIME;
    while !service.flights.0.lock().unwrap().is_empty() {
        assert!(Instant::now() < end, "never answered");
        std::thread::yield_now();
    }
    (code, liar, shared)
}

#[test]
fn nothing_but_the_status_is_read_twice() {
    let qgs = Gated::new("twice");
    let (_, liar, _) = run(&qgs, None);
    let mut reads = std::mem::take(&mut *liar.reads.lock().unwrap());
    let all = reads.len();
    assert!(all > 1024);
    reads.retain(|at| !(BUFFER + 8..BUFFER + 16).contains(at));
    reads.sort_unstable();
    assert!(reads.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn a_page_that_turns_private_is_left_alone() {
    let qgs = Gated::new("lies");
    for page in (0..PAGES).map(|page| BUFFER + page * PAGE) {
        let mut when = 0;
        loop {
            let (code, liar, shared) = run(&qgs, Some((page, when)));
            if liar.accesses.load(Ordering::SeqCst) <= when {
                break;
            }
            assert!(matches!(code, ReplyCode::Success | ReplyCode::InvalidOperand));
            let range = PageRange::new(Gpa(page), PAGE).unwrap();
            assert!(liar.visible.drain(range, Duration::ZERO));
            let map = shared.mapping();
            map.write_slice(&[0xc5; PAGE as usize], GuestAddress(page))
                .unwrap();
            std::thread::yield_now();
            let mut seen = [0; PAGE as usize];
            map.read_slice(&mut seen, GuestAddress(page)).unwrap();
            assert!(seen == [0xc5; PAGE as usize], "{page:#x}, access {when}");
            when += 1;
        }
        assert!((3..100).contains(&when), "{when} accesses");
    }
}
