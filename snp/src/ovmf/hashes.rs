//! The page by which OVMF recognises the kernel, initrd and command line that its digest speaks for (QEMU's
//! `target/i386/sev.c`, "SevHashTable"; OVMF's `BlobVerifierLibSevHashes`).

use arch::firmware::{Guid, guid};

use crate::bytes::put;
use crate::measure::{PAGE, sha256};
use crate::ovmf::parse::HashTable;

const TABLE: Guid = guid(0x9438_d606, 0x4f22, 0x4cc9, 0xb479_a793_d411_fd21);
const CMDLINE: Guid = guid(0x97d0_2dd8, 0xbd20, 0x4c94, 0xaa78_e771_4d36_ab2a);
const INITRD: Guid = guid(0x44ba_f731, 0x3a2f, 0x4bd7, 0x9af1_41e2_9169_781d);
const KERNEL: Guid = guid(0x4de7_9437, 0xabd2, 0x427f, 0xb835_d5b1_72d2_045b);

/// GUID, `u16` length, and for an entry the SHA-256.
const HEADER: u16 = 18;
const ENTRY: u16 = HEADER + 32;
const TABLE_LEN: u16 = HEADER + 3 * ENTRY;
/// Bytes that QEMU writes: the table rounded up to 16.
pub(super) const PADDED_LEN: u64 = 176;

/// SHA-256 of what the firmware boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelHashes {
    /// Of the whole kernel file as passed.
    pub kernel: [u8; 32],
    /// Of the whole initrd file; of nothing if there is none.
    pub initrd: [u8; 32],
    /// Of the command line and its terminating zero.
    pub cmdline: [u8; 32],
}

impl KernelHashes {
    /// Hashes files that are in memory; kernel and initrd on two threads, since they are most of the work.
    pub fn of(kernel: &[u8], initrd: &[u8], cmdline: &str) -> Self {
        let terminated: Vec<u8> = cmdline.bytes().chain([0]).collect();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| sha256(initrd));
            let kernel = sha256(kernel);
            // A thread that hashes cannot panic; should it ever, hashing again here is right as well.
            let initrd = other.join().unwrap_or_else(|_| sha256(initrd));
            Self {
                kernel,
                initrd,
                cmdline: sha256(&terminated),
            }
        })
    }

    /// The measured page with the table where the firmware looks for it.
    pub(super) fn page(&self, table: HashTable) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let mut at = table.offset_in_page();
        let mut write = |bytes: &[u8]| {
            put(&mut page, at, bytes);
            at = at.saturating_add(bytes.len());
        };
        write(&TABLE.0);
        write(&TABLE_LEN.to_le_bytes());
        for (name, hash) in [
            (CMDLINE, self.cmdline),
            (INITRD, self.initrd),
            (KERNEL, self.kernel),
        ] {
            write(&name.0);
            write(&ENTRY.to_le_bytes());
            write(&hash);
        }
        page
    }
}
