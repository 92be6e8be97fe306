//! Small OVMF-like images, made here so that no firmware needs to be in the tree or installed.

const FOOTER: &str = "96b582de-1fb2-45f7-baea-a366c55a082d";
const HASH_TABLE: &str = "7255371f-3a3b-4b04-927b-1da6efa8d454";
const AP_RESET: &str = "00f771de-1a7e-4fcb-890e-68c77e2fb44e";
const METADATA: &str = "dc886566-984a-4798-a75e-5585a7bf67cc";

/// `(gpa, bytes, type)` of each section of a 64 KiB image.
pub(crate) type Sections = &'static [(u32, u32, u32)];

/// The layouts of Debian's images, and one that packs its memory otherwise.
pub(crate) const LAYOUTS: &[(&str, Sections)] = &[
    (
        "hashes",
        &[
            (0x80_0000, 0x9000, 1),
            (0x80_a000, 0x3000, 1),
            (0x80_d000, 0x1000, 2),
            (0x80_e000, 0x1000, 3),
            (0x80_f000, 0x1000, 4),
            (0x81_1000, 0x1f000, 1),
            (0x81_0000, 0x1000, 0x10),
        ],
    ),
    (
        "no-hashes",
        &[
            (0x80_0000, 0x9000, 1),
            (0x80_a000, 0x3000, 1),
            (0x80_d000, 0x1000, 2),
            (0x80_e000, 0x1000, 3),
            (0, 0, 4),
            (0, 0, 1),
        ],
    ),
    (
        "cpuid-first",
        &[
            (0x2000, 0x1000, 3),
            (0x1000, 0x1000, 2),
            (0x81_0000, 0x1000, 0x10),
            (0x3000, 0x4000, 1),
        ],
    ),
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

fn entry(data: &[u8], name: &str) -> Vec<u8> {
    let len = (data.len() as u16 + 18).to_le_bytes();
    [data, &len, &guid(name)].concat()
}

/// A 64 KiB image: code that differs from page to page, padding, metadata, table.
pub(crate) fn image(sections: Sections) -> Vec<u8> {
    let words = sections
        .iter()
        .flat_map(|(gpa, bytes, kind)| [*gpa, *bytes, *kind]);
    let body: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    let len = 16 + body.len() as u32;
    let metadata: Vec<u8> = [
        *b"ASEV",
        len.to_le_bytes(),
        1u32.to_le_bytes(),
        (sections.len() as u32).to_le_bytes(),
    ]
    .concat()
    .into_iter()
    .chain(body)
    .collect();
    let hashed = sections.iter().any(|s| s.2 == 0x10);
    let hash_table = if hashed { 0x81_0c00u32 } else { 0 };
    let mut table = entry(
        &[hash_table.to_le_bytes(), 0x400u32.to_le_bytes()].concat(),
        HASH_TABLE,
    );
    table.extend(entry(&0x400u32.to_le_bytes(), METADATA));
    table.extend(entry(&0x80_b004u32.to_le_bytes(), AP_RESET));
    let total = (table.len() as u16 + 18).to_le_bytes();
    table.extend(total);
    table.extend(guid(FOOTER));

    let mut image: Vec<u8> = (0..0x10000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    image[0x4000..0xc000].fill(0xff);
    let size = image.len();
    image[size - 0x400..][..metadata.len()].copy_from_slice(&metadata);
    image[size - 32 - table.len()..][..table.len()].copy_from_slice(&table);
    image
}
