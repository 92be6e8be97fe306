//! What the shim says to an SNP hypervisor and checks of its answers, without the instructions.
//!
//! Sources: "SEV-ES Guest-Hypervisor Communication Block Standardization", revision 2.03, sections "GHCB MSR
//! Protocol" and "GHCB Layout"; "SEV Secure Nested Paging Firmware ABI", revision 1.57, "CPUID page".

use crate::bytes::{get_u32, put};
use crate::layout::{C_BIT, CPUID, GHCB_REASON_SET, PAGE, SECRETS};
use crate::reason::Reason;

/// GHCB MSR value: ask for protocol versions.
pub const MSR_SEV_INFO: u64 = 0x002;
/// GHCB MSR value: ask for hypervisor features.
pub const MSR_FEATURES: u64 = 0x080;
const MSR_SEV_INFO_ANSWER: u64 = 0x001;
const MSR_FEATURES_ANSWER: u64 = 0x081;
const MSR_REGISTER: u64 = 0x012;
const MSR_REGISTER_ANSWER: u64 = 0x013;
const MSR_TERMINATE: u64 = 0x100;
const MSR_CODE_MASK: u64 = 0xfff;
/// The GHCB protocol version that SNP needs.
const PROTOCOL: u64 = 2;

/// The GHCB MSR value that ends the guest.
#[must_use]
pub fn msr_terminate(reason: Reason) -> u64 {
    MSR_TERMINATE | (u64::from(GHCB_REASON_SET) << 12) | (u64::from(reason.code()) << 16)
}

/// The GHCB MSR value that registers the GHCB page at `gpa`.
#[must_use]
pub fn msr_register(gpa: u64) -> u64 {
    (gpa & !MSR_CODE_MASK) | MSR_REGISTER
}

/// Checks the answer to [`MSR_SEV_INFO`]: version 2 must be in the offered range.
///
/// # Errors
/// [`Reason::GhcbProtocol`].
pub fn check_sev_info(answer: u64) -> Result<(), Reason> {
    let (max, min) = (answer >> 48, (answer >> 32) & 0xffff);
    let known = answer & MSR_CODE_MASK == MSR_SEV_INFO_ANSWER;
    (known && (min..=max).contains(&PROTOCOL))
        .then_some(())
        .ok_or(Reason::GhcbProtocol)
}

/// Checks the answer to [`MSR_FEATURES`]: SNP must be among them.
///
/// # Errors
/// [`Reason::GhcbFeatures`].
pub fn check_features(answer: u64) -> Result<(), Reason> {
    let snp = answer & MSR_CODE_MASK == MSR_FEATURES_ANSWER && (answer >> 12) & 1 == 1;
    snp.then_some(()).ok_or(Reason::GhcbFeatures)
}

/// Checks the answer to [`msr_register`]: it must echo the address.
///
/// # Errors
/// [`Reason::GhcbRegister`].
pub fn check_register(gpa: u64, answer: u64) -> Result<(), Reason> {
    (answer == (gpa & !MSR_CODE_MASK) | MSR_REGISTER_ANSWER)
        .then_some(())
        .ok_or(Reason::GhcbRegister)
}

/// Checks SEV_STATUS (APM volume 2, "SEV_STATUS MSR"): SEV, SEV-ES and SNP active, virtual TOM not, as it
/// would change what a mapping means.
///
/// # Errors
/// [`Reason::SevStatus`].
pub fn check_sev_status(status: u64) -> Result<(), Reason> {
    (status & 0b1111 == 0b0111).then_some(()).ok_or(Reason::SevStatus)
}

/// The leaf that describes memory encryption.
const LEAF_ENCRYPTION: u32 = 0x8000_001f;
const CPUID_ENTRIES_MAX: u32 = 64;
const CPUID_FIRST: usize = 16;
const CPUID_ENTRY_LEN: usize = 48;
const AT_EBX: usize = 28;
const AT_ECX: usize = 32;

/// Checks the CPUID page, which firmware has vetted but the host has composed; whether SHA instructions exist.
///
/// # Errors
/// [`Reason::CpuidPage`] when it names another C-bit or does not describe memory encryption.
pub fn check_cpuid(page: &[u8]) -> Result<bool, Reason> {
    let encryption = register(page, LEAF_ENCRYPTION, AT_EBX).ok_or(Reason::CpuidPage)?;
    if 1u64 << (encryption & 0x3f) != C_BIT {
        return Err(Reason::CpuidPage);
    }
    let features = register(page, 1, AT_ECX).unwrap_or(0);
    let more = register(page, 7, AT_EBX).unwrap_or(0);
    Ok(has_sha(features, more))
}

/// Whether SHA and the vector instructions around it exist: `features` is ECX of leaf 1 (SSSE3, SSE4.1),
/// `more` EBX of leaf 7.
#[must_use]
pub fn has_sha(features: u32, more: u32) -> bool {
    const VECTORS: u32 = (1 << 9) | (1 << 19);
    features & VECTORS == VECTORS && more & (1 << 29) != 0
}

/// A register of the first entry for `leaf`, by its offset in the entry.
fn register(page: &[u8], leaf: u32, offset: usize) -> Option<u32> {
    let count = get_u32(page, 0)?;
    if count > CPUID_ENTRIES_MAX {
        return None;
    }
    let mut entries = (CPUID_FIRST..)
        .step_by(CPUID_ENTRY_LEN)
        .take(usize::try_from(count).ok()?);
    let at = entries.find(|&at| get_u32(page, at) == Some(leaf))?;
    get_u32(page, at.checked_add(offset)?)
}

/// PVALIDATE's return code when the page is backed by pages of another size (APM volume 3).
pub const PVALIDATE_SIZE_MISMATCH: u32 = 6;

const AT_RAX: usize = 0x1f8;
const AT_EXIT_CODE: usize = 0x390;
const AT_EXIT_INFO_1: usize = 0x398;
const AT_VALID: usize = 0x3f0;
const AT_PROTOCOL: usize = 0xffa;
const EXIT_IOIO: u64 = 0x7b;
const IOIO_32_BIT: u64 = 1 << 6;

/// Fills the zeroed GHCB page `page` with a 32-bit write of `value` to `port`.
///
/// # Errors
/// [`Reason::Bug`] when `page` is no page.
pub fn ghcb_out(page: &mut [u8], port: u16, value: u32) -> Result<(), Reason> {
    let mut fill = || {
        put(page, AT_RAX, &u64::from(value).to_le_bytes())?;
        put(page, AT_EXIT_CODE, &EXIT_IOIO.to_le_bytes())?;
        put(
            page,
            AT_EXIT_INFO_1,
            &((u64::from(port) << 16) | IOIO_32_BIT).to_le_bytes(),
        )?;
        // One bit per 8-byte field: RAX, then exit code and both exit informations.
        put(page, AT_VALID.checked_add(7)?, &[1 << 7])?;
        put(page, AT_VALID.checked_add(14)?, &[0b1_1100])?;
        put(page, AT_PROTOCOL, &[2])
    };
    fill().ok_or(Reason::Bug)
}

/// Length of the confidential-computing blob.
const CC_BLOB_LEN: usize = 40;
/// Setup data of type "confidential computing blob" (Linux, `asm/setup_data.h`).
const SETUP_CC_BLOB: u32 = 7;
/// Where the setup data node stands behind the blob.
const AT_NODE: usize = 0x40;

/// Addresses of a written blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CcBlob {
    /// The blob itself.
    pub blob: u64,
    /// The setup data node that points at it.
    pub setup_data: u64,
}

/// Writes the blob (Linux, `asm/sev.h`, `struct cc_blob_sev_info`) and its setup data node to `area`, which
/// lies at `base` and is zero.
///
/// # Errors
/// [`Reason::TablesFull`] when `area` is too short.
pub fn write_cc_blob(area: &mut [u8], base: u64) -> Result<CcBlob, Reason> {
    let mut blob = [0; CC_BLOB_LEN];
    let mut fill = || {
        put(&mut blob, 0, b"AMDE\x01\0")?;
        put(&mut blob, 8, &SECRETS.to_le_bytes())?;
        put(&mut blob, 16, &PAGE.to_le_bytes())?;
        put(&mut blob, 24, &CPUID.to_le_bytes())?;
        put(&mut blob, 32, &PAGE.to_le_bytes())?;
        put(area, 0, &blob)?;
        let node = [0, 0, SETUP_CC_BLOB, 4, u32::try_from(base).ok()?].map(u32::to_le_bytes);
        put(area, AT_NODE, node.as_flattened())?;
        let setup_data = base.checked_add(u64::try_from(AT_NODE).ok()?)?;
        Some(CcBlob {
            blob: base,
            setup_data,
        })
    };
    fill().ok_or(Reason::TablesFull)
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]
mod tests {
    use super::*;
    use crate::bytes::get_u64;

    fn cpuid_page(entries: &[(u32, u32)]) -> [u8; 4096] {
        let mut page = [0; 4096];
        page[0] = u8::try_from(entries.len()).unwrap();
        for (at, (leaf, ebx)) in (16..).step_by(48).zip(entries) {
            page[at..at + 4].copy_from_slice(&leaf.to_le_bytes());
            page[at + 28..at + 32].copy_from_slice(&ebx.to_le_bytes());
        }
        page
    }

    #[test]
    fn the_cpuid_page_must_name_the_c_bit_of_the_tables() {
        assert_eq!(
            check_cpuid(&cpuid_page(&[(0, 0), (0x8000_001f, 51 | 1 << 6)])),
            Ok(false)
        );
        assert_eq!(
            check_cpuid(&cpuid_page(&[(0x8000_001f, 51 | 1 << 31)])),
            Ok(false)
        );
        let bad: [&[(u32, u32)]; 3] = [&[], &[(0x8000_001e, 51)], &[(0x8000_001f, 47)]];
        for entries in bad {
            assert_eq!(
                check_cpuid(&cpuid_page(entries)),
                Err(Reason::CpuidPage),
                "{entries:?}"
            );
        }
        let mut page = cpuid_page(&[(0x8000_001f, 51)]);
        page[0] = 65;
        assert_eq!(check_cpuid(&page), Err(Reason::CpuidPage));
    }

    #[test]
    fn sha_needs_its_own_bit_and_those_of_the_vectors() {
        for (features, more, sha) in [
            (0x8_0200, 0x2000_0000, true),
            (0x8_0000, 0x2000_0000, false),
            (0x200, 0x2000_0000, false),
            (!0, 0, false),
        ] {
            assert_eq!(has_sha(features, more), sha, "{features:#x} {more:#x}");
        }
    }

    #[test]
    fn a_hypervisor_must_offer_version_2_and_snp() {
        for (answer, good) in [
            (0x0002_0001_3300_0001, true),
            (0x0003_0002_3300_0001, true),
            (0x0001_0001_3300_0001, false),
            (0x0004_0003_3300_0001, false),
            (0x0002_0001_3300_0000, false),
        ] {
            assert_eq!(check_sev_info(answer).is_ok(), good, "{answer:#x}");
        }
        for (answer, good) in [(0x3081, true), (0x2081, false), (0x3080, false), (0, false)] {
            assert_eq!(check_features(answer).is_ok(), good, "{answer:#x}");
        }
        for (status, good) in [(7, true), (0x87, true), (3, false), (0xf, false), (0, false)] {
            assert_eq!(check_sev_status(status).is_ok(), good, "{status:#x}");
        }
    }

    #[test]
    fn the_registered_page_must_be_echoed() {
        assert_eq!(msr_register(0x70_0000_1000), 0x70_0000_1012);
        assert_eq!(check_register(0x70_0000_1000, 0x70_0000_1013), Ok(()));
        for answer in [0xffff_ffff_ffff_f013, 0x70_0000_2013, 0x70_0000_1012] {
            assert_eq!(check_register(0x70_0000_1000, answer), Err(Reason::GhcbRegister));
        }
    }

    #[test]
    fn termination_carries_set_2_and_the_code() {
        assert_eq!(msr_terminate(Reason::KernelMismatch), 0x0008_2100);
    }

    #[test]
    fn a_port_write_marks_exactly_the_fields_that_it_fills() {
        let mut page = [0; 4096];
        ghcb_out(&mut page, 0x604, 1).unwrap();
        assert_eq!(get_u64(&page, 0x1f8), Some(1));
        assert_eq!(get_u64(&page, 0x390), Some(0x7b));
        assert_eq!(get_u64(&page, 0x398), Some(0x604_0040));
        let marked: std::vec::Vec<usize> = (0..128)
            .filter(|field| page[0x3f0 + field / 8] & (1 << (field % 8)) != 0)
            .collect();
        assert_eq!(marked, [0x1f8 / 8, 0x390 / 8, 0x398 / 8, 0x3a0 / 8]);
        assert_eq!(page[0xffa..], [2, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_blob_names_the_secrets_and_cpuid_pages() {
        let mut area = [0; 4096];
        let blob = write_cc_blob(&mut area, 0x12_2000).unwrap();
        assert_eq!(
            blob,
            CcBlob {
                blob: 0x12_2000,
                setup_data: 0x12_2040
            }
        );
        assert_eq!(get_u64(&area, 0), Some(0x0001_4544_4d41));
        assert_eq!(
            [8, 16, 24, 32].map(|at| get_u64(&area, at)),
            [0x11_0000, 4096, 0x11_1000, 4096].map(Some)
        );
        assert_eq!(
            [0x40, 0x48, 0x50].map(|at| get_u64(&area, at)),
            [0, 0x4_0000_0007, 0x12_2000].map(Some)
        );
    }
}
