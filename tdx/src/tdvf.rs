//! Launch plans for TDVF and td-shim images, so that `cvmm measure --payload tdvf` predicts their MRTD. The metadata
//! is that of "Intel TDX Virtual Firmware Design Guide", "TDVF Descriptor"; section types 5 to 8 are td-shim's
//! ("TD-Shim Specification", "TD-Shim metadata").

use arch::addr::{BadRange, Gpa, PAGE_SIZE, PageRange};
use arch::firmware::{Guid, GuidTable, TableError, guid};
use arch::platform::{LaunchPage, LaunchPlan, PageKind};

use crate::bytes::{array, le32, le64};

/// The image ends here, and so does the page of the reset vector.
const FOUR_GIB: u64 = 1 << 32;
/// No real image is larger; keeps a mistaken file from being copied.
const MAX_IMAGE: u64 = 64 << 20;
/// td-shim keeps the descriptor's offset this far from the end of an image without a table of GUIDs.
const OFFSET_FROM_END: usize = 32;
const DESCRIPTOR: usize = 16;
const ENTRY: usize = 32;
/// Real images have 6 to 10.
const MAX_SECTIONS: u32 = 64;
/// Real images launch some 4 MiB, td-shim 30 to 150; bounds the work of a digest.
const MAX_SECTION_BYTES: u64 = 1 << 28;
/// No TD has an address at or above this.
const MAX_GPA: u64 = 1 << 51;
/// Contents are measured at launch.
const EXTEND: u32 = 1;
/// The TD gets the pages while it runs; the launch leaves them out.
const AUG: u32 = 2;

/// The entry of the table of GUIDs that holds the descriptor's distance from the end of the image.
const METADATA: Guid = guid(0xe47a_6535, 0x984a, 0x4798, 0x865e_4685_a7bf_8ec2);
/// Stands before every descriptor.
const BEFORE_DESCRIPTOR: Guid = guid(0xe9ea_f9f3, 0x168e, 0x44d5, 0xa8eb_7f4d_8738_f6ae);

/// What a section is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SectionKind {
    /// Code, the reset vector with it.
    Code = 0,
    /// Variables.
    Variables = 1,
    /// Where the VMM puts the list of hand-off blocks.
    HandOff = 2,
    /// Memory that the firmware needs before it can accept any.
    Temporary = 3,
    /// Memory that td-shim owns for good.
    Permanent = 4,
    /// td-shim's payload, a kernel.
    Payload = 5,
    /// Its command line.
    PayloadParameters = 6,
    /// What td-shim says about itself.
    Info = 7,
    /// What td-shim says about the TD that it wants.
    Parameters = 8,
}

impl SectionKind {
    const ALL: [Self; 9] = [
        Self::Code,
        Self::Variables,
        Self::HandOff,
        Self::Temporary,
        Self::Permanent,
        Self::Payload,
        Self::PayloadParameters,
        Self::Info,
        Self::Parameters,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Code => "firmware code",
            Self::Variables => "variables",
            Self::HandOff => "hand-off blocks",
            Self::Temporary => "temporary memory",
            Self::Permanent => "permanent memory",
            Self::Payload => "payload",
            Self::PayloadParameters => "payload parameters",
            Self::Info => "TD information",
            Self::Parameters => "TD parameters",
        }
    }
}

/// One entry of the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Purpose.
    pub kind: SectionKind,
    /// Start, page-aligned.
    pub gpa: Gpa,
    /// Length in guest memory, whole pages; 0 if it has no place there.
    pub bytes: u64,
    /// Where its contents start in the file.
    pub offset: u32,
    /// Length of its contents in the file; zeros follow in memory.
    pub file_bytes: u32,
    /// Contents are measured.
    pub extended: bool,
    /// The launch adds its pages.
    pub added: bool,
}

/// A file that is no image for TDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum TdvfError {
    #[error("a firmware image is 4 KiB to 64 MiB in whole pages, this file has {bytes} bytes")]
    Size { bytes: u64 },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(
        "the image has no TDX metadata, so it cannot be launched as a TD; take a TDX-capable OVMF (Debian's \
         OVMF.inteltdx.ms.fd) or a td-shim image"
    )]
    NoMetadata,
    #[error("the TDX metadata is damaged: {what}")]
    Metadata { what: &'static str },
    #[error("section {index} of the TDX metadata has the unknown type {kind}")]
    UnknownSection { index: u32, kind: u32 },
    #[error("section {index} of the TDX metadata ({}, {gpa:#x}, {bytes:#x} bytes) {what}", kind.name())]
    Section {
        index: u32,
        kind: SectionKind,
        gpa: u64,
        bytes: u64,
        what: &'static str,
    },
}

/// A checked image.
#[derive(Clone, Debug)]
pub struct Tdvf {
    image: Vec<u8>,
    sections: Vec<Section>,
}

impl Tdvf {
    /// Parses and checks an image file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn parse(image: Vec<u8>) -> Result<Self, TdvfError> {
        let bytes = image.len() as u64;
        if bytes == 0 || bytes > MAX_IMAGE || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(TdvfError::Size { bytes });
        }
        let sections = sections(&image, descriptor(&image)?)?;
        Ok(Self { image, sections })
    }

    /// Sections in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The launch of this image: its sections in the order of the metadata, as QEMU adds them. What no digest
    /// depends on is left out: vCPUs, and the list of hand-off blocks that the VMM makes.
    ///
    /// # Errors
    /// None that [`Tdvf::parse`] does not find first.
    pub fn plan(&self) -> Result<LaunchPlan, BadRange> {
        let added = self.sections.iter().filter(|s| s.added && s.bytes != 0);
        let pages = added.map(|section| {
            let range = PageRange::new(section.gpa, section.bytes)?;
            let contents = contents(&self.image, section).unwrap_or_default();
            let kind = match (section.extended, contents.is_empty()) {
                (true, false) => PageKind::Measured,
                (true, true) => PageKind::Zero,
                (false, _) => PageKind::Unmeasured,
            };
            let mut bytes = contents.to_vec();
            if !bytes.is_empty() {
                bytes.resize(usize::try_from(section.bytes).unwrap_or(0), 0);
            }
            Ok(LaunchPage {
                name: section.kind.name(),
                range,
                kind,
                bytes,
            })
        });
        Ok(LaunchPlan {
            pages: pages.collect::<Result<_, _>>()?,
            vcpus: Vec::new(),
        })
    }
}

fn damaged(what: &'static str) -> TdvfError {
    TdvfError::Metadata { what }
}

/// The descriptor and everything behind it.
fn descriptor(image: &[u8]) -> Result<&[u8], TdvfError> {
    let at = match GuidTable::of(image) {
        Ok(table) => {
            let from_end = table.word(METADATA)?.ok_or(TdvfError::NoMetadata)?;
            image.len().checked_sub(from_end as usize)
        }
        Err(TableError::NoTable) => {
            let last = image.last_chunk::<OFFSET_FROM_END>();
            let offset = last.and_then(|last| le32(last, 0)).ok_or(TdvfError::NoMetadata)? as usize;
            if !is_announced(image, offset) {
                return Err(TdvfError::NoMetadata);
            }
            Some(offset)
        }
        Err(e) => return Err(e.into()),
    };
    let outside = damaged("it starts outside the image");
    let at = at.ok_or(outside)?;
    if !is_announced(image, at) {
        return Err(damaged("no descriptor is where it should be"));
    }
    image.get(at..).ok_or(outside)
}

/// True if the GUID that announces a descriptor stands before `at`.
fn is_announced(image: &[u8], at: usize) -> bool {
    let before = image.get(..at).and_then(|before| before.last_chunk::<16>());
    before == Some(&BEFORE_DESCRIPTOR.0)
}

fn sections(image: &[u8], metadata: &[u8]) -> Result<Vec<Section>, TdvfError> {
    let field = |at| le32(metadata, at).ok_or(damaged("it ends with the image"));
    if array(metadata, 0) != Some(*b"TDVF") {
        return Err(damaged("it does not start with TDVF"));
    }
    let (bytes, version, count) = (field(4)?, field(8)?, field(12)?);
    if version != 1 {
        return Err(damaged("only version 1 is known"));
    }
    if count > MAX_SECTIONS {
        return Err(damaged("it has more than 64 sections"));
    }
    let wrong_length = damaged("its length is wrong");
    let entries = metadata.get(DESCRIPTOR..bytes as usize).ok_or(wrong_length)?;
    let (entries, []) = entries.as_chunks::<ENTRY>() else {
        return Err(wrong_length);
    };
    if entries.len() != count as usize {
        return Err(wrong_length);
    }
    let mut found: Vec<Section> = Vec::new();
    for (index, entry) in (0..).zip(entries) {
        let section = section(index, entry).ok_or(wrong_length)??;
        let what = flaw(image, &section, entry).or_else(|| conflict(&found, &section));
        if let Some(what) = what {
            return Err(TdvfError::Section {
                index,
                kind: section.kind,
                gpa: section.gpa.0,
                bytes: section.bytes,
                what,
            });
        }
        found.push(section);
    }
    let added = found.iter().filter(|s| s.added).map(|s| s.bytes);
    if added.fold(0, u64::saturating_add) > MAX_SECTION_BYTES {
        return Err(damaged("its sections are larger than 256 MiB together"));
    }
    let starts = |s: &Section| s.kind == SectionKind::Code && s.gpa.0.saturating_add(s.bytes) == FOUR_GIB;
    if !found.iter().any(starts) {
        return Err(damaged("no firmware code ends at 4 GiB, where a TD starts"));
    }
    Ok(found)
}

/// Decodes one entry; `None` if it is cut off.
fn section(index: u32, entry: &[u8; ENTRY]) -> Option<Result<Section, TdvfError>> {
    let number = le32(entry, 24)?;
    let attributes = le32(entry, 28)?;
    let kinds = SectionKind::ALL;
    let Some(&kind) = kinds.iter().find(|kind| **kind as u32 == number) else {
        return Some(Err(TdvfError::UnknownSection { index, kind: number }));
    };
    Some(Ok(Section {
        kind,
        gpa: Gpa(le64(entry, 8)?),
        bytes: le64(entry, 16)?,
        offset: le32(entry, 0)?,
        file_bytes: le32(entry, 4)?,
        extended: attributes & EXTEND != 0,
        added: attributes & AUG == 0,
    }))
}

/// The part of the file that fills `section`; `None` if it is not there.
fn contents<'a>(image: &'a [u8], section: &Section) -> Option<&'a [u8]> {
    image
        .get(section.offset as usize..)?
        .get(..section.file_bytes as usize)
}

/// What is wrong with a section by itself.
fn flaw(image: &[u8], section: &Section, entry: &[u8; ENTRY]) -> Option<&'static str> {
    let attributes = le32(entry, 28).unwrap_or(0);
    let end = section.gpa.0.checked_add(section.bytes);
    let informs = matches!(section.kind, SectionKind::Info | SectionKind::Parameters);
    let empty = matches!(
        section.kind,
        SectionKind::HandOff | SectionKind::Temporary | SectionKind::Permanent
    );
    let permanent = section.kind == SectionKind::Permanent;
    let from_host = match section.kind {
        SectionKind::HandOff => true,
        SectionKind::Payload | SectionKind::PayloadParameters => section.file_bytes == 0,
        SectionKind::Code
        | SectionKind::Variables
        | SectionKind::Temporary
        | SectionKind::Permanent
        | SectionKind::Info
        | SectionKind::Parameters => false,
    };
    let checks = [
        (
            attributes & !(EXTEND | AUG) != 0,
            "has attributes that nobody has defined",
        ),
        (
            section.extended && !section.added,
            "is to be measured, but not part of the launch",
        ),
        (
            section.extended && from_host,
            "is to be measured, whose contents the host makes; no digest can be predicted",
        ),
        (permanent && section.added, "is permanent, which no launch adds"),
        (
            section.kind == SectionKind::Code && !section.extended,
            "is code that nothing would measure",
        ),
        (
            (section.gpa.0 | section.bytes) & 0xfff != 0,
            "is not made of whole pages",
        ),
        (
            end.is_none_or(|end| end > MAX_GPA),
            "ends above the addresses that a TD has",
        ),
        (
            contents(image, section).is_none(),
            "takes its contents from behind the end of the file",
        ),
        (
            section.kind == SectionKind::Code && section.file_bytes == 0,
            "is code without contents",
        ),
        (empty && section.file_bytes != 0, "must be empty and has contents"),
        (
            u64::from(section.file_bytes) > section.bytes && !(informs && section.bytes == 0),
            "has more contents than room",
        ),
    ];
    checks.iter().find(|(broken, _)| *broken).map(|(_, what)| *what)
}

/// What is wrong with a section beside `others`.
fn conflict(others: &[Section], section: &Section) -> Option<&'static str> {
    let end = |s: &Section| s.gpa.0.saturating_add(s.bytes);
    let overlap = |other: &&Section| {
        let used = other.bytes != 0 && section.bytes != 0;
        used && other.gpa.0 < end(section) && section.gpa.0 < end(other)
    };
    let twice = |other: &&Section| section.kind == SectionKind::HandOff && other.kind == section.kind;
    if others.iter().any(|other| overlap(&other)) {
        return Some("overlaps an earlier one");
    }
    let second = others.iter().any(|other| twice(&other));
    second.then_some("is the second one for hand-off blocks")
}
