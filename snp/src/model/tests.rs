//! Cases 7 to 20 and 30 of `kernel-contract.md` §16, each named after what the kernel does.

mod exits;
pub(crate) mod launch;
mod vcpus;

use arch::addr::{Gpa, PageRange};
use arch::x86::regs::{BootState, General};

use super::*;
use crate::error::FirmwareStatus;

const EINVAL: Answer = Err((libc::EINVAL, 0));
const EIO: Answer = Err((libc::EIO, 0));
const POLICY: u64 = 0x30000;

/// An initialised SNP VM with frames 0..64 in a slot and private.
fn started() -> Model {
    let mut model = Model::new(4);
    model
        .raw_init2(RawInit {
            ghcb_version: 2,
            ..RawInit::default()
        })
        .unwrap();
    model.raw_start(POLICY, 0).unwrap();
    model.slot(0..64, true);
    model.set_private(0..64);
    model
}

fn update(model: &mut Model, change: impl FnOnce(&mut RawUpdate<'_>)) -> (Answer, u64, u64) {
    let mut bytes = vec![7; 4 * PAGE];
    let mut raw = RawUpdate {
        gfn_start: 1,
        uaddr: 0x7000_0000_0000,
        len: PAGE_SIZE,
        kind: 1,
        flags: 0,
        source: Some(&mut bytes),
        writable: true,
    };
    change(&mut raw);
    let answer = model.raw_update(&mut raw);
    (answer, raw.gfn_start, raw.len)
}
