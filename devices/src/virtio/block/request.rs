//! What a block request asks for (virtio 1.2, "Block Device", "Device Operation"). Pure: it sees copies only.

/// Unit of all sector numbers, whatever the disk's own blocks are.
pub const SECTOR_BYTES: u64 = 512;
/// Length of the request header.
pub const HEADER_BYTES: u64 = 16;
/// Length of one range of a discard or write-zeroes request.
pub const RANGE_BYTES: u64 = 16;
/// Length of the identity, zero-padded, not terminated.
pub const ID_BYTES: u64 = 20;
/// Most sectors of one discard or write-zeroes request: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 4 << 20;

/// `VIRTIO_BLK_F_*`.
pub mod feature {
    /// The configuration gives the most segments of a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// The configuration gives the block size.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Writes may be cached, and there is a flush request.
    pub const FLUSH: u64 = 1 << 9;
    /// The configuration gives the physical block size.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// There is more than one queue.
    pub const MQ: u64 = 1 << 12;
    /// There is a discard request.
    pub const DISCARD: u64 = 1 << 13;
    /// There is a write-zeroes request.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// `VIRTIO_BLK_T_*`.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1;

/// `VIRTIO_BLK_S_*`, the byte that ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request is malformed or the host could not do it.
    IoErr = 1,
    /// The device does not know this request.
    Unsupp = 2,
}

/// What the driver agreed to and how large the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk.
    pub sectors: u64,
    /// Feature bits both sides agreed on.
    pub features: u64,
    /// Writes are errors.
    pub read_only: bool,
}

/// Bytes of a request besides header and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// From the driver.
    pub readable: u64,
    /// To the driver.
    pub writable: u64,
}

/// A request that the disk can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill all writable bytes from this byte of the disk on.
    Read {
        /// First byte.
        offset: u64,
    },
    /// Store all readable bytes from this byte of the disk on.
    Write {
        /// First byte.
        offset: u64,
    },
    /// Bring completed writes to stable storage.
    Flush,
    /// Tell who the disk is.
    Id,
    /// A [`Range`] follows, to be discarded.
    Discard,
    /// A [`Range`] follows, to be zeroed.
    Zero,
}

impl Request {
    /// Reads a header: le32 type, le32 reserved, le64 sector.
    ///
    /// # Errors
    /// The status that answers the request.
    pub fn parse(header: [u8; 16], data: Data, disk: &Limits) -> Result<Self, Status> {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let ranges = |feature: u64, request: Self| {
            if disk.features & feature == 0 {
                Err(Status::Unsupp)
            } else if disk.read_only || data.readable != RANGE_BYTES || data.writable != 0 {
                Err(Status::IoErr)
            } else {
                Ok(request)
            }
        };
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            kind::IN if data.readable != 0 => Err(Status::IoErr),
            kind::IN => disk
                .place(sector, data.writable)
                .map(|offset| Self::Read { offset }),
            kind::OUT if data.writable != 0 || disk.read_only => Err(Status::IoErr),
            kind::OUT => disk
                .place(sector, data.readable)
                .map(|offset| Self::Write { offset }),
            kind::FLUSH => Ok(Self::Flush),
            kind::GET_ID => Ok(Self::Id),
            kind::DISCARD => ranges(feature::DISCARD, Self::Discard),
            kind::WRITE_ZEROES => ranges(feature::WRITE_ZEROES, Self::Zero),
            _ => Err(Status::Unsupp),
        }
    }
}

/// A part of the disk to be freed or zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The host may free the space.
    pub unmap: bool,
}

impl Range {
    /// Reads a range: le64 sector, le32 sectors, le32 flags. `allowed` are the flags that the request knows.
    fn parse(raw: [u8; 16], allowed: u32, disk: &Limits) -> Result<Self, Status> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = raw;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !allowed != 0 {
            return Err(Status::Unsupp);
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Status::IoErr);
        }
        let bytes = u64::from(count).saturating_mul(SECTOR_BYTES);
        Ok(Self {
            offset: disk.place(sector, bytes)?,
            bytes,
            unmap: flags & FLAG_UNMAP != 0,
        })
    }

    /// Reads the range of a discard request, which knows no flag.
    ///
    /// # Errors
    /// The status that answers the request.
    pub fn discard(raw: [u8; 16], disk: &Limits) -> Result<Self, Status> {
        Self::parse(raw, 0, disk)
    }

    /// Reads the range of a write-zeroes request.
    ///
    /// # Errors
    /// The status that answers the request.
    pub fn zero(raw: [u8; 16], disk: &Limits) -> Result<Self, Status> {
        Self::parse(raw, FLAG_UNMAP, disk)
    }
}

impl Limits {
    /// Byte offset of `sector`, if `bytes` from there on are whole sectors inside the disk. No bytes at all
    /// are a malformed request.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Status> {
        let sectors = bytes / SECTOR_BYTES;
        let inside = sector.checked_add(sectors).is_some_and(|end| end <= self.sectors);
        if sectors == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || !inside {
            return Err(Status::IoErr);
        }
        sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoErr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Limits = Limits {
        sectors: 8,
        features: feature::DISCARD | feature::WRITE_ZEROES,
        read_only: false,
    };
    const READ_ONLY: Limits = Limits {
        read_only: true,
        ..DISK
    };
    const PLAIN: Limits = Limits { features: 0, ..DISK };
    const HUGE: Limits = Limits {
        sectors: u64::MAX,
        ..DISK
    };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut raw = [0xff; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        raw
    }

    #[test]
    fn each_kind_of_request_is_accepted_or_answered() {
        use Status::{IoErr, Unsupp};
        let read = |offset| Ok(Request::Read { offset });
        let write = |offset| Ok(Request::Write { offset });
        type Row = (&'static str, Limits, u32, u64, u64, u64, Result<Request, Status>);
        #[rustfmt::skip]
        let rows: &[Row] = &[
            // name, disk, kind, sector, readable, writable, expected
            ("first sector",              DISK,      0,  0, 0,    512,  read(0)),
            ("whole disk",                DISK,      0,  0, 0,    4096, read(0)),
            ("last sector",               DISK,      0,  7, 0,    512,  read(3584)),
            ("one sector too many",       DISK,      0,  7, 0,    1024, Err(IoErr)),
            ("start at the end",          DISK,      0,  8, 0,    512,  Err(IoErr)),
            ("sector + count wraps",      DISK,      0,  u64::MAX, 0, 512, Err(IoErr)),
            ("sector * 512 wraps",        HUGE,      0,  1 << 60, 0, 512, Err(IoErr)),
            ("no data",                   DISK,      0,  0, 0,    0,    Err(IoErr)),
            ("part of a sector",          DISK,      0,  0, 0,    513,  Err(IoErr)),
            ("read with data",            DISK,      0,  0, 512,  512,  Err(IoErr)),
            ("write",                     DISK,      1,  2, 1024, 0,    write(1024)),
            ("write past the end",        DISK,      1,  7, 1024, 0,    Err(IoErr)),
            ("write with room",           DISK,      1,  0, 512,  512,  Err(IoErr)),
            ("write, read-only",          READ_ONLY, 1,  0, 512,  0,    Err(IoErr)),
            ("read, read-only",           READ_ONLY, 0,  0, 0,    512,  read(0)),
            ("flush",                     DISK,      4,  0, 0,    0,    Ok(Request::Flush)),
            ("flush with odd sector",     DISK,      4, 99, 0,    0,    Ok(Request::Flush)),
            ("identity",                  DISK,      8,  0, 0,    20,   Ok(Request::Id)),
            ("identity, no room",         DISK,      8,  0, 0,    0,    Ok(Request::Id)),
            ("discard",                   DISK,      11, 0, 16,   0,    Ok(Request::Discard)),
            ("discard, two ranges",       DISK,      11, 0, 32,   0,    Err(IoErr)),
            ("discard, no range",         DISK,      11, 0, 0,    0,    Err(IoErr)),
            ("discard, not negotiated",   PLAIN,     11, 0, 16,   0,    Err(Unsupp)),
            ("discard, read-only",        READ_ONLY, 11, 0, 16,   0,    Err(IoErr)),
            ("zero",                      DISK,      13, 0, 16,   0,    Ok(Request::Zero)),
            ("zero, cut range",           DISK,      13, 0, 15,   0,    Err(IoErr)),
            ("zero, not negotiated",      PLAIN,     13, 0, 16,   0,    Err(Unsupp)),
            ("lifetime",                  DISK,      10, 0, 0,    40,   Err(Unsupp)),
            ("secure erase",              DISK,      14, 0, 16,   0,    Err(Unsupp)),
            ("unknown",                   DISK,      77, 0, 0,    512,  Err(Unsupp)),
            ("legacy barrier bit",        DISK,      0x8000_0000, 0, 0, 512, Err(Unsupp)),
        ];
        for &(name, disk, kind, sector, readable, writable, expected) in rows {
            let data = Data { readable, writable };
            assert_eq!(
                Request::parse(header(kind, sector), data, &disk),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn ranges_lie_inside_the_disk_and_have_known_flags() {
        use Status::{IoErr, Unsupp};
        #[rustfmt::skip]
        let rows: &[(u64, u32, u32, Result<(), Status>, Result<(), Status>)] = &[
            // sector, count, flags, discard, zero
            (0, 8, 0, Ok(()), Ok(())),
            (7, 1, 1, Err(Unsupp), Ok(())),
            (7, 1, 2, Err(Unsupp), Err(Unsupp)),
            (0, 9, 0, Err(IoErr), Err(IoErr)),
            (8, 1, 0, Err(IoErr), Err(IoErr)),
            (0, 0, 0, Err(IoErr), Err(IoErr)),
            (u64::MAX, 1, 0, Err(IoErr), Err(IoErr)),
            (0, u32::MAX, 0, Err(IoErr), Err(IoErr)),
        ];
        for &(sector, count, flags, discard, zero) in rows {
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&sector.to_le_bytes());
            raw[8..12].copy_from_slice(&count.to_le_bytes());
            raw[12..].copy_from_slice(&flags.to_le_bytes());
            let row = format!("{sector}+{count} flags {flags}");
            assert_eq!(Range::discard(raw, &DISK).map(drop), discard, "{row}");
            assert_eq!(Range::zero(raw, &DISK).map(drop), zero, "{row}");
            assert!(Range::zero(raw, &HUGE).is_ok() || zero.is_err(), "{row}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_accepted_reaches_beyond_the_disk(
            raw in proptest::array::uniform16(0_u8..),
            readable in 0_u64..1 << 31,
            writable in 0_u64..1 << 31,
            sectors in 0_u64..,
        ) {
            let disk = Limits { sectors, ..DISK };
            let data = Data { readable, writable };
            for kind in 0..16 {
                let mut raw = raw;
                raw[..4].copy_from_slice(&u32::to_le_bytes(kind));
                if let Ok(Request::Read { offset } | Request::Write { offset }) = Request::parse(raw, data, &disk) {
                    let end = u128::from(offset) + u128::from(readable + writable);
                    proptest::prop_assert!(end <= u128::from(sectors) * 512);
                }
            }
            if let Ok(range) = Range::zero(raw, &disk) {
                let end = u128::from(range.offset) + u128::from(range.bytes);
                proptest::prop_assert!(end <= u128::from(sectors) * 512);
            }
        }
    }
}
