//! How a firmware image describes itself: a table of GUIDs that ends 32 bytes before the end of the image
//! (`OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm` in EDK II). Images come from anywhere, so nothing in them is
//! believed.

/// The reset vector code behind the table.
const TABLE_END: usize = 32;
/// `u16` length and GUID, behind the data of each entry.
const ENTRY_HEADER: usize = 18;
const FOOTER: Guid = guid(0x96b5_82de, 0x1fb2, 0x45f7, 0xbaea_a366_c55a_082d);

/// A GUID in EFI's mixed-endian form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

/// A GUID from its printed parts; the last two groups together are `tail`.
pub const fn guid(a: u32, b: u16, c: u16, tail: u64) -> Guid {
    let head = (a as u128) | (b as u128) << 32 | (c as u128) << 48;
    Guid((head | (tail.swap_bytes() as u128) << 64).to_le_bytes())
}

/// A table that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The image does not end with a table.
    #[error("no OVMF table at the end of the image; give an OVMF .fd file that holds the code part")]
    NoTable,
    /// An entry's length.
    #[error("the OVMF table is damaged: an entry of {bytes} bytes does not fit")]
    Entry {
        /// The length that the entry states.
        bytes: u16,
    },
}

/// The table of an image, without its footer.
#[derive(Clone, Copy, Debug)]
pub struct GuidTable<'a>(&'a [u8]);

/// Length and name of the entry that ends with `header`.
fn header(header: &[u8; ENTRY_HEADER]) -> (u16, &[u8]) {
    let [low, high, name @ ..] = header;
    (u16::from_le_bytes([*low, *high]), name)
}

impl<'a> GuidTable<'a> {
    /// Finds the table of `image`.
    ///
    /// # Errors
    /// There is none, or it begins before the image.
    pub fn of(image: &'a [u8]) -> Result<Self, TableError> {
        let end = image.len().checked_sub(TABLE_END);
        let (table, footer) = end
            .and_then(|end| image.get(..end)?.split_last_chunk())
            .ok_or(TableError::NoTable)?;
        let (bytes, name) = header(footer);
        if name != FOOTER.0 {
            return Err(TableError::NoTable);
        }
        let start = usize::from(bytes)
            .checked_sub(ENTRY_HEADER)
            .and_then(|len| table.len().checked_sub(len));
        start
            .and_then(|start| table.get(start..))
            .map(Self)
            .ok_or(TableError::Entry { bytes })
    }

    /// The first `u32` of the data of the entry named `name`, the last one in the file if there are two.
    ///
    /// # Errors
    /// An entry that does not fit, or is too short for the number.
    pub fn word(&self, name: Guid) -> Result<Option<u32>, TableError> {
        let mut rest = self.0;
        while let Some((data, last)) = rest.split_last_chunk() {
            let (bytes, found) = header(last);
            let damaged = TableError::Entry { bytes };
            let len = usize::from(bytes).checked_sub(ENTRY_HEADER).ok_or(damaged)?;
            let start = data.len().checked_sub(len).ok_or(damaged)?;
            let (before, data) = data.split_at_checked(start).ok_or(damaged)?;
            if found == name.0 {
                let word = data.first_chunk().ok_or(damaged)?;
                return Ok(Some(u32::from_le_bytes(*word)));
            }
            rest = before;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: Guid = guid(1, 2, 3, 4);

    fn entry(data: &[u8], name: Guid) -> Vec<u8> {
        let len = u16::try_from(data.len() + ENTRY_HEADER).unwrap();
        [data, &len.to_le_bytes(), &name.0].concat()
    }

    fn image(entries: &[u8]) -> Vec<u8> {
        let total = u16::try_from(entries.len() + ENTRY_HEADER).unwrap();
        [
            &[0xcc; 100],
            entries,
            &total.to_le_bytes(),
            &FOOTER.0,
            &[0x90; 32],
        ]
        .concat()
    }

    #[test]
    fn entries_are_found_by_name_from_the_end() {
        let other = guid(9, 9, 9, 9);
        let entries = [
            entry(&[1, 0, 0, 0], NAME),
            entry(&[2, 0, 0, 0, 7], NAME),
            entry(&[], other),
        ];
        let image = image(&entries.concat());
        let table = GuidTable::of(&image).unwrap();
        assert_eq!(table.word(NAME), Ok(Some(2)));
        assert_eq!(table.word(guid(0, 0, 0, 0)), Ok(None));
        assert_eq!(table.word(other), Err(TableError::Entry { bytes: 18 }));
    }

    #[test]
    fn broken_tables_are_refused() {
        for len in 0..50 {
            assert!(matches!(GuidTable::of(&vec![0; len]), Err(TableError::NoTable)));
        }
        let mut whole = image(&entry(&[1, 0, 0, 0], NAME));
        let footer = whole.len() - 32 - ENTRY_HEADER;
        whole[footer] = 0xff;
        assert!(matches!(
            GuidTable::of(&whole),
            Err(TableError::Entry { bytes: 0xff })
        ));
        let mut whole = image(&entry(&[1, 0, 0, 0], NAME));
        for bytes in [0, 17, 23] {
            whole[footer - ENTRY_HEADER] = bytes;
            let bytes = u16::from(bytes);
            assert_eq!(
                GuidTable::of(&whole).unwrap().word(NAME),
                Err(TableError::Entry { bytes })
            );
        }
    }

    #[test]
    fn guids_are_mixed_endian() {
        let bytes = guid(0x0011_2233, 0x4455, 0x6677, 0x8899_aabb_ccdd_eeff).0;
        assert_eq!(bytes[..8], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
        assert_eq!(bytes[8..], [0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]);
    }
}
