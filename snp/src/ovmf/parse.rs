//! OVMF's own description of itself: the SEV metadata that the image's table of GUIDs points to
//! (`OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm` in EDK II).

use arch::addr::{Gpa, PAGE_SIZE};
use arch::firmware::{Guid, GuidTable, TableError, guid};

use crate::bytes::{array, le32};
use crate::ovmf::hashes::PADDED_LEN;

/// The image ends here.
const FOUR_GIB: u64 = 1 << 32;
/// No real image is larger; keeps a mistaken file from being copied.
const MAX_IMAGE: u64 = 64 << 20;
const METADATA_HEADER: usize = 16;
const METADATA_ENTRY: usize = 12;
/// Real images have 7.
const MAX_SECTIONS: u32 = 64;
/// Real images have some 300 KiB; bounds the work of folding a digest.
const MAX_SECTION_BYTES: u64 = 1 << 28;

const HASH_TABLE: Guid = guid(0x7255_371f, 0x3a3b, 0x4b04, 0x927b_1da6_efa8_d454);
const AP_RESET: Guid = guid(0x00f7_71de, 0x1a7e, 0x4fcb, 0x890e_68c7_7e2f_b44e);
const METADATA: Guid = guid(0xdc88_6566, 0x984a, 0x4798, 0xa75e_5585_a7bf_67cc);

/// What a section of guest memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// Memory that the firmware uses before it can validate any.
    Memory,
    /// The secrets page.
    Secrets,
    /// The CPUID page.
    Cpuid,
    /// Calling area of an SVSM; zero where there is none.
    SvsmCallingArea,
    /// Hashes of kernel, initrd and command line.
    KernelHashes,
}

/// A range that the launch must add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Start, page-aligned.
    pub gpa: Gpa,
    /// Length, whole pages; 0 in images that have the entry but no use for it.
    pub bytes: u64,
    /// Purpose.
    pub kind: SectionKind,
}

/// Where the firmware expects the hash table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashTable {
    gpa: u32,
}

impl HashTable {
    pub(super) fn offset_in_page(self) -> usize {
        (self.gpa & 0xfff) as usize
    }
}

/// A file that is no OVMF image for SNP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum OvmfError {
    #[error("a firmware image is 4 KiB to 64 MiB in whole pages, this file has {bytes} bytes")]
    Size { bytes: u64 },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(
        "the image has no SEV metadata, so it cannot be launched as an SNP guest; take an SNP-capable OVMF"
    )]
    NoMetadata,
    #[error("the SEV metadata is damaged: {what}")]
    Metadata { what: &'static str },
    #[error("section {index} of the SEV metadata has the unknown type {kind:#x}")]
    UnknownSection { index: u32, kind: u32 },
    #[error("section {index} of the SEV metadata ({gpa:#x}, {bytes:#x} bytes) {what}")]
    Section {
        index: u32,
        gpa: u64,
        bytes: u64,
        what: &'static str,
    },
    #[error("the hash table at {gpa:#x} does not lie inside the SNP_KERNEL_HASHES section")]
    HashTable { gpa: u32 },
}

/// A checked image.
#[derive(Clone, Debug)]
pub struct Firmware {
    bytes: Vec<u8>,
    base: Gpa,
    sections: Vec<Section>,
    hash_table: Option<HashTable>,
    ap_start: Option<u32>,
}

impl Firmware {
    /// Parses and checks an image file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, OvmfError> {
        let size = bytes.len() as u64;
        if size == 0 || size > MAX_IMAGE || !size.is_multiple_of(PAGE_SIZE) {
            return Err(OvmfError::Size { bytes: size });
        }
        let table = GuidTable::of(&bytes)?;
        let base = Gpa(FOUR_GIB.saturating_sub(size));
        let sections = sections(&bytes, table.word(METADATA)?.ok_or(OvmfError::NoMetadata)?, base)?;
        let hash_table = table
            .word(HASH_TABLE)?
            .filter(|gpa| *gpa != 0)
            .map(|gpa| HashTable { gpa });
        let hashes = sections.iter().find(|s| s.kind == SectionKind::KernelHashes);
        if let (Some(HashTable { gpa }), Some(section)) = (hash_table, hashes) {
            let fits = u64::from(gpa & 0xfff) <= PAGE_SIZE.saturating_sub(PADDED_LEN);
            if u64::from(gpa & !0xfff) != section.gpa.0 || !fits {
                return Err(OvmfError::HashTable { gpa });
            }
        }
        let ap_start = table.word(AP_RESET)?;
        Ok(Self {
            bytes,
            base,
            sections,
            hash_table,
            ap_start,
        })
    }

    /// The file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The file, without the copy that a firmware image would cost.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Where the image starts; it ends at 4 GiB.
    pub fn base(&self) -> Gpa {
        self.base
    }

    /// Sections in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Where the firmware looks for kernel hashes.
    pub fn hash_table(&self) -> Option<HashTable> {
        self.hash_table
    }

    /// Where all vCPUs but the first start.
    pub fn ap_start(&self) -> Option<u32> {
        self.ap_start
    }
}

fn sections(image: &[u8], offset_from_end: u32, base: Gpa) -> Result<Vec<Section>, OvmfError> {
    let damaged = |what| OvmfError::Metadata { what };
    let start = image.len().checked_sub(offset_from_end as usize);
    let metadata = start
        .and_then(|at| image.get(at..))
        .ok_or(damaged("it starts outside the image"))?;
    let field = |at| le32(metadata, at).ok_or(damaged("it ends with the image"));
    if array(metadata, 0) != Some(*b"ASEV") {
        return Err(damaged("it does not start with ASEV"));
    }
    let (bytes, version, count) = (field(4)?, field(8)?, field(12)?);
    if version != 1 {
        return Err(damaged("only version 1 is known"));
    }
    if count > MAX_SECTIONS {
        return Err(damaged("it has more than 64 sections"));
    }
    let entries = metadata
        .get(METADATA_HEADER..bytes as usize)
        .ok_or(damaged("its length is wrong"))?;
    let mut found: Vec<Section> = Vec::new();
    for (index, entry) in (0..count).zip(entries.chunks(METADATA_ENTRY)) {
        let section = section(index, entry).ok_or(damaged("its length is wrong"))??;
        let taken = found.iter().any(|other| overlap(other, &section));
        let in_firmware = section.bytes != 0 && section.gpa.0.saturating_add(section.bytes) > base.0;
        if taken || in_firmware {
            let (gpa, bytes) = (section.gpa.0, section.bytes);
            return Err(OvmfError::Section {
                index,
                gpa,
                bytes,
                what: "overlaps other launch pages",
            });
        }
        found.push(section);
    }
    if found.len() != count as usize {
        return Err(damaged("its length is wrong"));
    }
    if found.iter().map(|s| s.bytes).fold(0, u64::saturating_add) > MAX_SECTION_BYTES {
        return Err(damaged("its sections are larger than 256 MiB together"));
    }
    Ok(found)
}

fn overlap(a: &Section, b: &Section) -> bool {
    let end = |s: &Section| s.gpa.0.saturating_add(s.bytes);
    a.bytes != 0 && b.bytes != 0 && a.gpa.0 < end(b) && b.gpa.0 < end(a)
}

/// Decodes one entry; `None` if it is cut off.
fn section(index: u32, entry: &[u8]) -> Option<Result<Section, OvmfError>> {
    let (gpa, bytes, kind) = (le32(entry, 0)?, le32(entry, 4)?, le32(entry, 8)?);
    let wrong = |what| {
        Some(Err(OvmfError::Section {
            index,
            gpa: gpa.into(),
            bytes: bytes.into(),
            what,
        }))
    };
    let kind = match kind {
        1 => SectionKind::Memory,
        2 => SectionKind::Secrets,
        3 => SectionKind::Cpuid,
        4 => SectionKind::SvsmCallingArea,
        0x10 => SectionKind::KernelHashes,
        _ => return Some(Err(OvmfError::UnknownSection { index, kind })),
    };
    if (gpa | bytes) & 0xfff != 0 {
        return wrong("is not made of whole pages");
    }
    let one_page = matches!(
        kind,
        SectionKind::Secrets | SectionKind::Cpuid | SectionKind::KernelHashes
    );
    if one_page && bytes != 0x1000 {
        return wrong("must be exactly one page");
    }
    Some(Ok(Section {
        gpa: Gpa(gpa.into()),
        bytes: bytes.into(),
        kind,
    }))
}
