//! MRTD: one SHA-384 over a record for each page that a launch adds and each 256 bytes that it extends, in the
//! order of the commands (Intel TDX Module Base Architecture Specification, revision 348549-004, "TD Measurement";
//! ABI Specification, "TDH.MEM.PAGE.ADD" and "TDH.MR.EXTEND").
//!
//! What enters: address and order of every page, contents of measured pages. What does not: the number of vCPUs and
//! their registers, CPUID, ATTRIBUTES, XFAM and the owner's three fields, which a TD's report states by themselves.

use std::fmt;

use arch::addr::{Gpa, PAGE_SIZE};
pub use arch::measurement::{MeasureError, Measurement};
use arch::platform::{LaunchPage, LaunchPlan, PageKind};
use ring::digest;

/// Bytes of a launch page.
pub const PAGE: usize = 4096;
/// Bytes of one TDH.MR.EXTEND.
pub const CHUNK: usize = 256;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// The order of commands within a range of pages; two host stacks, two digests for one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Order {
    /// Each page is added and then extended, as `KVM_TDX_INIT_MEM_REGION` of mainline KVM does it.
    #[default]
    SinglePass,
    /// All pages of a range are added before the first is extended, as host stacks before mainline did it.
    TwoPass,
}

/// What is done to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// TDH.MEM.PAGE.ADD: its address is measured.
    Add,
    /// TDH.MR.EXTEND, 16 times: its contents are.
    Extend,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Add => "ADD",
            Self::Extend => "EXTEND",
        })
    }
}

/// The running digest.
#[derive(Clone)]
pub struct Mrtd(digest::Context);

impl fmt::Debug for Mrtd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mrtd({})", self.digest())
    }
}

impl Default for Mrtd {
    fn default() -> Self {
        Self::new()
    }
}

impl Mrtd {
    /// The digest before the first page.
    pub fn new() -> Self {
        Self(digest::Context::new(&digest::SHA384))
    }

    fn record(&mut self, name: &[u8], gpa: Gpa) {
        let mut record = [0; 128];
        let fields = name.iter().chain(std::iter::repeat(&0)).take(16);
        for (slot, byte) in record.iter_mut().zip(fields.chain(&gpa.0.to_le_bytes())) {
            *slot = *byte;
        }
        self.0.update(&record);
    }

    /// Adds the page at `gpa`.
    pub fn add(&mut self, gpa: Gpa) {
        self.record(b"MEM.PAGE.ADD", gpa);
    }

    /// Extends by the contents of the page at `gpa`, in chunks of [`CHUNK`] bytes.
    pub fn extend(&mut self, gpa: Gpa, contents: &[u8]) {
        for (at, chunk) in (gpa.0..).step_by(CHUNK).zip(contents.chunks_exact(CHUNK)) {
            self.record(b"MR.EXTEND", Gpa(at));
            self.0.update(chunk);
        }
    }

    /// Does `action` to the page at `gpa`.
    pub fn apply(&mut self, action: Action, gpa: Gpa, contents: &[u8]) {
        match action {
            Action::Add => self.add(gpa),
            Action::Extend => self.extend(gpa, contents),
        }
    }

    /// MRTD of a launch that ends here.
    pub fn digest(&self) -> Measurement {
        sum(self.0.clone())
    }
}

fn sum(context: digest::Context) -> Measurement {
    let mut out = Measurement::ZERO;
    for (slot, byte) in out.0.iter_mut().zip(context.finish().as_ref()) {
        *slot = *byte;
    }
    out
}

/// SHA-384 of `parts`, one after the other.
pub fn sha384(parts: &[&[u8]]) -> Measurement {
    let mut context = digest::Context::new(&digest::SHA384);
    parts.iter().for_each(|part| context.update(part));
    sum(context)
}

/// Single pages of `range` with what is measured of their contents.
fn pages(range: &LaunchPage) -> Result<impl Iterator<Item = (Gpa, Option<&[u8]>)>, MeasureError> {
    let zero = match range.kind {
        PageKind::Measured if range.bytes.len() as u64 != range.range.bytes() => {
            return Err(MeasureError::wrong_length(range));
        }
        PageKind::Secrets | PageKind::Cpuid => {
            return Err(MeasureError::Foreign {
                name: range.name,
                gpa: range.range.start(),
            });
        }
        PageKind::Measured | PageKind::Unmeasured => None,
        PageKind::Zero => Some(ZEROS.as_slice()),
    };
    let contents: &[u8] = if range.kind == PageKind::Measured {
        &range.bytes
    } else {
        &[]
    };
    let mut chunks = contents.chunks_exact(PAGE);
    Ok(range.range.frames().map(move |frame| {
        let gpa = Gpa(frame.saturating_mul(PAGE_SIZE));
        (gpa, zero.or_else(|| chunks.next()))
    }))
}

/// Calls `each` with every action of a launch of `plan` by `order`: range, action, page, and contents of the page
/// (empty for [`Action::Add`], which does not measure them).
///
/// # Errors
/// A page that no TD has, or that is measured and has no contents.
pub fn walk<'a>(
    plan: &'a LaunchPlan,
    order: Order,
    mut each: impl FnMut(&'a LaunchPage, Action, Gpa, &'a [u8]),
) -> Result<(), MeasureError> {
    for range in &plan.pages {
        if order == Order::TwoPass {
            pages(range)?.for_each(|(gpa, _)| each(range, Action::Add, gpa, &[]));
        }
        for (gpa, contents) in pages(range)? {
            if order == Order::SinglePass {
                each(range, Action::Add, gpa, &[]);
            }
            if let Some(contents) = contents {
                each(range, Action::Extend, gpa, contents);
            }
        }
    }
    Ok(())
}

/// MRTD of a TD that is launched from `plan`.
///
/// # Errors
/// As [`walk`].
pub fn mrtd(plan: &LaunchPlan, order: Order) -> Result<Measurement, MeasureError> {
    let mut mrtd = Mrtd::new();
    walk(plan, order, |_, action, gpa, bytes| {
        mrtd.apply(action, gpa, bytes)
    })?;
    Ok(mrtd.digest())
}

/// What a launch asks of the TDX module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cost {
    /// TDH.MEM.PAGE.ADD, one for each page.
    pub adds: u64,
    /// TDH.MR.EXTEND, one for each [`CHUNK`].
    pub extends: u64,
    /// Bytes of guest memory whose contents are measured.
    pub bytes: u64,
}

/// The cost of launching `plan`.
///
/// # Errors
/// As [`walk`].
pub fn cost(plan: &LaunchPlan) -> Result<Cost, MeasureError> {
    let mut cost = Cost::default();
    walk(plan, Order::SinglePass, |_, action, _, bytes| {
        cost.adds = cost.adds.saturating_add(u64::from(action == Action::Add));
        cost.extends = cost.extends.saturating_add(bytes.chunks(CHUNK).len() as u64);
        cost.bytes = cost.bytes.saturating_add(bytes.len() as u64);
    })?;
    Ok(cost)
}

#[cfg(test)]
mod tests {
    use arch::addr::PageRange;

    use super::*;

    fn page(gpa: u64, pages: u64, kind: PageKind, bytes: Vec<u8>) -> LaunchPage {
        let range = PageRange::new(Gpa(gpa), pages << 12).unwrap();
        LaunchPage {
            name: "page",
            range,
            kind,
            bytes,
        }
    }

    fn plan(pages: &[LaunchPage]) -> LaunchPlan {
        LaunchPlan {
            pages: pages.to_vec(),
            vcpus: vec![],
        }
    }

    /// The stream as the specification words it, written out by hand.
    fn add(gpa: u64) -> Vec<u8> {
        let record = [&b"MEM.PAGE.ADD\0\0\0\0"[..], &gpa.to_le_bytes(), &[0; 104]];
        record.concat()
    }

    fn extend(gpa: u64, byte: u8) -> Vec<u8> {
        let chunk = |n: u64| {
            let gpa = gpa + 256 * n;
            [
                &b"MR.EXTEND\0\0\0\0\0\0\0"[..],
                &gpa.to_le_bytes(),
                &[0; 104],
                &[byte; 256],
            ]
            .concat()
        };
        (0..16).flat_map(chunk).collect()
    }

    #[test]
    fn the_digest_is_one_hash_over_the_records() {
        let two = [vec![1; PAGE], vec![2; PAGE]].concat();
        let plan = plan(&[
            page(0x1000, 2, PageKind::Measured, two),
            page(0x8000, 1, PageKind::Unmeasured, vec![9; PAGE]),
            page(0xffff_f000, 1, PageKind::Zero, vec![]),
        ]);
        let rest = [add(0x8000), add(0xffff_f000), extend(0xffff_f000, 0)].concat();
        let single = [add(0x1000), extend(0x1000, 1), add(0x2000), extend(0x2000, 2)];
        let double = [add(0x1000), add(0x2000), extend(0x1000, 1), extend(0x2000, 2)];
        for (order, first) in [(Order::SinglePass, single), (Order::TwoPass, double)] {
            let expected = sha384(&[&first.concat(), &rest]);
            assert_eq!(mrtd(&plan, order).unwrap(), expected, "{order:?}");
        }
        let cost = cost(&plan).unwrap();
        let (adds, extends, bytes) = (4, 48, 3 * 4096);
        assert_eq!(cost, Cost { adds, extends, bytes });
    }

    #[test]
    fn contents_count_for_measured_pages_only_but_every_address_does() {
        for (kind, measured) in [(PageKind::Measured, true), (PageKind::Unmeasured, false)] {
            let of = |gpa, byte| mrtd(&plan(&[page(gpa, 1, kind, vec![byte; PAGE])]), Order::SinglePass);
            assert_eq!(of(0x1000, 1) != of(0x1000, 2), measured, "{kind:?}");
            assert_ne!(of(0x1000, 1), of(0x2000, 1), "{kind:?}");
        }
    }

    #[test]
    fn zero_pages_are_measured_as_what_they_hold() {
        let zero = plan(&[page(0x1000, 2, PageKind::Zero, vec![])]);
        let full = plan(&[page(0x1000, 2, PageKind::Measured, vec![0; 2 * PAGE])]);
        for order in [Order::SinglePass, Order::TwoPass] {
            assert_eq!(mrtd(&zero, order), mrtd(&full, order));
        }
    }

    #[test]
    fn plans_that_no_td_has_are_refused() {
        let cases = [
            (
                page(0x1000, 2, PageKind::Measured, vec![0; PAGE]),
                "the measured range at 0x1000 has 8192 bytes but 4096 bytes of contents",
            ),
            (
                page(0x1000, 1, PageKind::Cpuid, vec![]),
                "the page page at 0x1000 does not exist on this platform",
            ),
            (
                page(0x1000, 1, PageKind::Secrets, vec![]),
                "the page page at 0x1000 does not exist on this platform",
            ),
        ];
        for (page, says) in cases {
            let error = mrtd(&plan(&[page]), Order::SinglePass).unwrap_err();
            assert_eq!(error.to_string(), says);
        }
    }
}
