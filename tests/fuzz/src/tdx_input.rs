//! What a TD, a quote generation service and files for TDX say.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use tdx::get_quote::{Header, QuoteService};
use tdx::qgs;
use tdx::quote::{self, verify};
use tdx::tdvf::Tdvf;
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

const RAM: u64 = 1 << 20;

/// A TDVF image.
pub fn tdvf(data: &[u8]) {
    // As for OVMF, the end of the image is what counts.
    let mut image = vec![0; data.len().next_multiple_of(4096)];
    let start = image.len() - data.len();
    image[start..].copy_from_slice(data);
    let Ok(tdvf) = Tdvf::parse(image) else { return };
    let plan = tdvf.plan().expect("an image that parses has no plan");
    assert!(plan.pages.len() <= tdvf.sections().len());
    for page in &plan.pages {
        assert!(page.bytes.is_empty() || page.bytes.len() as u64 == page.range.bytes());
    }
}

/// A quote, and collateral to verify it with.
pub fn quote(data: &[u8]) {
    let mut input = Input::new(data);
    let len = usize::from(input.u16());
    let raw = input.take(len);
    let collateral = verify::Collateral::parse(input.rest());
    let Ok(quote) = quote::parse(raw) else { return };
    let _ = format!("{quote:?} {:?}", quote.kind());
    let _ = (quote.version(), quote.certificates(), quote.check_signature());
    if let Ok(collateral) = collateral {
        let _ = verify::verify(&quote, &collateral, 1_700_000_000);
    }
}

/// What a service answers.
pub fn answer(data: &[u8]) {
    if let Some(prefix) = data.first_chunk()
        && let Ok(bytes) = qgs::answer_bytes(*prefix)
    {
        assert!(bytes <= 1 << 20);
    }
    if let Ok(quote) = qgs::parse_response(data) {
        assert!(!quote.is_empty() && quote.len() < data.len());
        let _ = quote::parse(quote);
    }
}

/// A guest's requests, while no service is there.
pub fn get_quote(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        let _ = format!("{header:?}");
    }
    let mut input = Input::new(data);
    let all = [PageRange::new(Gpa(0), RAM).unwrap()];
    let ram = HostRam::allocate(&all).unwrap();
    let visible = Arc::new(VisibilityMap::new(&all, Visibility::Shared));
    let shared = SharedMem::new(Arc::clone(ram.map()), Arc::clone(&visible));
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    let notify = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let service = QuoteService::new(shared, None, notify).unwrap();
    let mut asked = 0;
    while !input.is_empty() && asked < 200 {
        asked += 1;
        let how = input.u8();
        let page = u64::from(input.u8());
        let (mut gpa, mut size) = (page * PAGE_SIZE, (u64::from(how >> 4) + 1) * PAGE_SIZE);
        if how & 1 != 0 {
            gpa ^= input.u64();
        }
        if how & 2 != 0 {
            size ^= input.u64();
        }
        if how & 4 != 0 {
            let range = PageRange::new(Gpa(u64::from(input.u8()) * PAGE_SIZE), PAGE_SIZE).unwrap();
            let to = if how & 8 == 0 {
                Visibility::Private
            } else {
                Visibility::Shared
            };
            visible.set(range, to);
        }
        let good = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0];
        let header = if how & 8 == 0 { &good[..] } else { input.take(24) };
        // Private or not, the guest has written there before.
        let _ = ram.map().write_slice(header, GuestAddress(gpa % RAM));
        let before = private_bytes(&ram, &visible);
        let _ = service.request(gpa, size);
        assert_eq!(
            private_bytes(&ram, &visible),
            before,
            "a private page was written"
        );
    }
    assert!(told.load(Ordering::SeqCst) <= asked);
}

/// A sum over what lies in private frames.
fn private_bytes(ram: &HostRam, visible: &VisibilityMap) -> u64 {
    let private = (0..RAM / PAGE_SIZE).filter(|frame| !visible.all_shared(Gpa(frame * PAGE_SIZE), 1));
    let mut bytes = [0; 64];
    private
        .map(|frame| {
            ram.map()
                .read_slice(&mut bytes, GuestAddress(frame * PAGE_SIZE))
                .unwrap();
            bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>()
        })
        .sum()
}
