//! Small TDVF-like images, made here so that no firmware needs to be in the tree or installed.

const FOOTER: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";
const METADATA: &str = "e47a6535-984a-4798-865e-4685a7bf8ec2";
const BEFORE_DESCRIPTOR: &str = "e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae";

/// Length of every image.
pub(crate) const LEN: usize = 0x10000;
/// Where the descriptor lies.
pub(crate) const DESCRIPTOR: usize = LEN - 0x400;

/// A section as the file has it: offset, bytes in the file, address, bytes in memory, type, attributes.
pub(crate) type Row = (u32, u32, u64, u64, u32, u32);

/// How the descriptor is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// OVMF's table of GUIDs.
    Table,
    /// td-shim's word 32 bytes before the end.
    Offset,
}

/// Debian's OVMF, smaller.
pub(crate) const TDVF: &[Row] = &[
    (0x4000, 0xc000, 0xffff_4000, 0xc000, 0, 1),
    (0, 0x4000, 0xffff_0000, 0x4000, 1, 0),
    (0, 0, 0x81_0000, 0x10000, 3, 0),
    (0, 0, 0x80_b000, 0x2000, 3, 0),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
    (0, 0, 0x80_0000, 0x6000, 3, 0),
];

/// td-shim with a payload that its image brings along, smaller; the code starts in the middle of its section.
pub(crate) const TD_SHIM: &[Row] = &[
    (0x8000, 0x8000, 0xffff_8000, 0x8000, 0, 1),
    (0, 0x1000, 0xffff_0000, 0x1000, 1, 0),
    (0, 0, 0xffff_1000, 0x2000, 3, 0),
    (0, 0, 0x80_0000, 0x2_0000, 2, 0),
    (0x3000, 0x3210, 0x120_0000, 0x8000, 5, 1),
    (0, 0, 0x110_0000, 0x1000, 6, 0),
    (0x8100, 0x100, 0, 0, 7, 0),
    (0, 0, 0x200_0000, 0x1000_0000, 4, 2),
];

fn guid(text: &str) -> Vec<u8> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let bytes: Vec<u8> = (0..16)
        .map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]
        .map(|i| bytes[i])
        .to_vec()
}

/// An image with these sections: code that differs from page to page, padding, metadata, and a way to find it.
pub(crate) fn image(rows: &[Row], by: By) -> Vec<u8> {
    let mut image: Vec<u8> = (0..LEN as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    image[0x4000..0x6000].fill(0xff);
    let mut metadata = [guid(BEFORE_DESCRIPTOR), b"TDVF".to_vec()].concat();
    for word in [16 + 32 * rows.len() as u32, 1, rows.len() as u32] {
        metadata.extend(word.to_le_bytes());
    }
    for (offset, file_bytes, gpa, bytes, kind, attributes) in rows {
        metadata.extend([offset.to_le_bytes(), file_bytes.to_le_bytes()].concat());
        metadata.extend([gpa.to_le_bytes(), bytes.to_le_bytes()].concat());
        metadata.extend([kind.to_le_bytes(), attributes.to_le_bytes()].concat());
    }
    image[DESCRIPTOR - 16..][..metadata.len()].copy_from_slice(&metadata);
    match by {
        By::Table => {
            let entry = [0x400u32.to_le_bytes().to_vec(), vec![22, 0], guid(METADATA)].concat();
            let table = [entry, vec![40, 0], guid(FOOTER)].concat();
            image[LEN - 32 - table.len()..][..table.len()].copy_from_slice(&table);
        }
        By::Offset => image[LEN - 32..][..4].copy_from_slice(&(DESCRIPTOR as u32).to_le_bytes()),
    }
    image
}
