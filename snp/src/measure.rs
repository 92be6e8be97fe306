//! The launch digest: a chain of SHA-384 over one record per launch page, in the order of the launch commands
//! (SEV-SNP Firmware ABI, revision 1.58, "SNP_LAUNCH_UPDATE", table "Layout of the PAGE_INFO Structure").
//!
//! What enters: page type, address and order of every page, contents of measured pages and of one VMSA page per
//! vCPU. What does not: policy, ID block and HOST_DATA, which the attestation report states by themselves.

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
pub use arch::measurement::{MeasureError, Measurement, NotADigest};
use arch::platform::{LaunchPlan, PageKind};
use ring::digest;

use crate::bytes::put;
use crate::vmsa::{SevFeatures, Vmsa};

/// Bytes of a launch page.
pub const PAGE: usize = 4096;
/// KVM measures every VMSA at this address: all ones, cut to 52 bits and to a page.
const VMSA_GPA: Gpa = Gpa(0xffff_ffff_f000);
/// Length of PAGE_INFO, which the structure itself also carries.
const PAGE_INFO: u8 = 0x70;

/// Page types of PAGE_INFO and of `KVM_SEV_SNP_LAUNCH_UPDATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageType {
    /// Contents are measured.
    Normal = 1,
    /// A vCPU's save area; KVM alone may add one, at the end of the launch.
    Vmsa = 2,
    /// Measured as zero.
    Zero = 3,
    /// Loaded, contents not measured.
    Unmeasured = 4,
    /// Firmware fills it; contents not measured.
    Secrets = 5,
    /// Firmware checks it; contents not measured.
    Cpuid = 6,
}

impl PageType {
    /// Name in the firmware's specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "NORMAL",
            Self::Vmsa => "VMSA",
            Self::Zero => "ZERO",
            Self::Unmeasured => "UNMEASURED",
            Self::Secrets => "SECRETS",
            Self::Cpuid => "CPUID",
        }
    }
}

impl From<PageKind> for PageType {
    fn from(kind: PageKind) -> Self {
        match kind {
            PageKind::Measured => Self::Normal,
            PageKind::Unmeasured => Self::Unmeasured,
            PageKind::Zero => Self::Zero,
            PageKind::Secrets => Self::Secrets,
            PageKind::Cpuid => Self::Cpuid,
        }
    }
}

/// SHA-384 of `bytes`.
pub fn sha384(bytes: &[u8]) -> [u8; 48] {
    let mut out = [0; 48];
    put(&mut out, 0, digest::digest(&digest::SHA384, bytes).as_ref());
    out
}

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    put(&mut out, 0, digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// The contents of `range` if pages of this kind are measured by them.
pub(crate) fn measured(
    kind: PageType,
    range: PageRange,
    bytes: &[u8],
) -> Result<Option<&[u8]>, MeasureError> {
    if !matches!(kind, PageType::Normal | PageType::Vmsa) {
        return Ok(None);
    }
    let (want, got) = (range.bytes(), bytes.len() as u64);
    if want != got {
        return Err(MeasureError::WrongLength {
            gpa: range.start(),
            want,
            got,
        });
    }
    Ok(Some(bytes))
}

/// The running digest. Cheap to copy, so that a digest for each vCPU count costs one step each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    digest: Measurement,
    pages: u64,
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// The digest before the first page.
    pub const fn new() -> Self {
        Self {
            digest: Measurement([0; 48]),
            pages: 0,
        }
    }

    /// Continues from a digest of earlier pages, e.g. of a known firmware image.
    pub const fn resume(digest: Measurement) -> Self {
        Self { digest, pages: 0 }
    }

    /// The digest so far.
    pub fn digest(&self) -> Measurement {
        self.digest
    }

    /// Pages added to this value since [`Chain::new`] or [`Chain::resume`].
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds one page whose contents hash to `contents`; zeros for the types that leave contents out.
    pub fn page(&mut self, kind: PageType, gpa: Gpa, contents: &[u8; 48]) {
        let mut info = [0; PAGE_INFO as usize];
        put(&mut info, 0, &self.digest.0);
        put(&mut info, 0x30, contents);
        put(&mut info, 0x60, &[PAGE_INFO, 0, kind as u8]);
        // IMI flag and VMPL permissions at 0x63 stay zero: KVM launches everything at VMPL0 without IMI.
        put(&mut info, 0x68, &gpa.0.to_le_bytes());
        self.digest = Measurement(sha384(&info));
        self.pages = self.pages.saturating_add(1);
    }

    /// Adds every page of `range`. `bytes` matters for measured pages only and must then fill the range.
    ///
    /// # Errors
    /// `bytes` of another length.
    pub fn range(&mut self, kind: PageType, range: PageRange, bytes: &[u8]) -> Result<(), MeasureError> {
        let gpas = range.frames().map(|frame| Gpa(frame.saturating_mul(PAGE_SIZE)));
        let Some(bytes) = measured(kind, range, bytes)? else {
            gpas.for_each(|gpa| self.page(kind, gpa, &[0; 48]));
            return Ok(());
        };
        // Firmware images are padded: a page like the one before it need not be hashed again.
        let mut last: (&[u8], [u8; 48]) = (&[], [0; 48]);
        for (gpa, page) in gpas.zip(bytes.chunks_exact(PAGE)) {
            if page != last.0 {
                last = (page, sha384(page));
            }
            self.page(kind, gpa, &last.1);
        }
        Ok(())
    }

    /// Adds the save area of the next vCPU, as `KVM_SEV_SNP_LAUNCH_FINISH` does in order of vCPU creation.
    pub fn vmsa(&mut self, vmsa: &Vmsa) {
        self.page(PageType::Vmsa, VMSA_GPA, &sha384(vmsa.bytes()));
    }
}

/// The digest over the pages of `plan` alone, before any vCPU.
///
/// # Errors
/// A measured range whose contents do not fill it.
pub fn image(plan: &LaunchPlan) -> Result<Chain, MeasureError> {
    let mut chain = Chain::new();
    for page in &plan.pages {
        chain.range(page.kind.into(), page.range, &page.bytes)?;
    }
    Ok(chain)
}

/// Digests of `plan` with its first 1, 2, … vCPUs; the last one is that of the whole plan.
///
/// # Errors
/// A measured range whose contents do not fill it.
pub fn by_vcpus(plan: &LaunchPlan, features: SevFeatures) -> Result<Vec<Measurement>, MeasureError> {
    let mut chain = image(plan)?;
    let each = plan.vcpus.iter().map(|state| {
        chain.vmsa(&Vmsa::new(state, features));
        chain.digest()
    });
    Ok(each.collect())
}

/// The digest of the whole plan: what the report of a guest launched from it states.
///
/// # Errors
/// A measured range whose contents do not fill it.
pub fn digest(plan: &LaunchPlan, features: SevFeatures) -> Result<Measurement, MeasureError> {
    let mut chain = image(plan)?;
    plan.vcpus
        .iter()
        .for_each(|state| chain.vmsa(&Vmsa::new(state, features)));
    Ok(chain.digest())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, bytes: u64) -> PageRange {
        PageRange::new(Gpa(start), bytes).unwrap()
    }

    #[test]
    fn order_address_and_type_count() {
        let add = |pages: &[(PageType, u64)]| {
            let mut chain = Chain::new();
            for (kind, gpa) in pages {
                chain.range(*kind, range(*gpa, 0x1000), &[7; PAGE]).unwrap();
            }
            chain.digest()
        };
        let base = add(&[(PageType::Normal, 0x1000), (PageType::Zero, 0x2000)]);
        assert_ne!(base, add(&[(PageType::Zero, 0x2000), (PageType::Normal, 0x1000)]));
        assert_ne!(base, add(&[(PageType::Normal, 0x1000), (PageType::Zero, 0x3000)]));
        assert_ne!(
            base,
            add(&[(PageType::Normal, 0x1000), (PageType::Unmeasured, 0x2000)])
        );
    }

    #[test]
    fn contents_count_for_measured_pages_only() {
        let kinds = [
            (PageType::Normal, true),
            (PageType::Zero, false),
            (PageType::Unmeasured, false),
            (PageType::Secrets, false),
            (PageType::Cpuid, false),
        ];
        for (kind, measured) in kinds {
            let with = |byte| {
                let mut chain = Chain::new();
                chain.range(kind, range(0x1000, 0x1000), &[byte; PAGE]).unwrap();
                chain.digest()
            };
            assert_eq!(with(1) != with(2), measured, "{kind:?}");
        }
    }

    #[test]
    fn repeated_pages_hash_like_any_others() {
        let bytes: Vec<u8> = [0, 0, 1, 1, 0].iter().flat_map(|b| [*b; PAGE]).collect();
        let mut whole = Chain::new();
        whole
            .range(PageType::Normal, range(0, 5 * 0x1000), &bytes)
            .unwrap();
        let mut single = Chain::new();
        for (page, gpa) in bytes.chunks(PAGE).zip((0..).step_by(PAGE)) {
            single.page(PageType::Normal, Gpa(gpa), &sha384(page));
        }
        assert_eq!(whole, single);
    }

    #[test]
    fn short_contents_are_refused() {
        let error = Chain::new()
            .range(PageType::Normal, range(0x8000, 0x2000), &[0; PAGE])
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the measured range at 0x8000 has 8192 bytes but 4096 bytes of contents"
        );
    }
}
