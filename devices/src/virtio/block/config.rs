//! The configuration space of a block device (virtio 1.2, "Block Device", "Device configuration layout").

use arch::blockio::Geometry;

use super::request::{MAX_RANGE_SECTORS, SECTOR_BYTES, feature};

/// Length up to the last field that a feature of ours makes valid.
pub(super) const CONFIG_BYTES: usize = 60;

/// The bytes of `struct virtio_blk_config`.
pub(super) fn bytes(disk: &Geometry, seg_max: u32, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let ratio = disk.physical_block.checked_div(disk.logical_block);
    let exponent = ratio.and_then(u32::checked_ilog2).unwrap_or(0);
    let sectors = |bytes: u32| u32::try_from(u64::from(bytes) / SECTOR_BYTES).unwrap_or(1);
    let fields: [(usize, &[u8]); 11] = [
        (0, &(disk.bytes / SECTOR_BYTES).to_le_bytes()),
        (12, &seg_max.to_le_bytes()),
        (20, &disk.logical_block.to_le_bytes()),
        (24, &[u8::try_from(exponent).unwrap_or(0)]),
        // Smallest efficient transfer, in logical blocks.
        (26, &u16::try_from(ratio.unwrap_or(1)).unwrap_or(1).to_le_bytes()),
        (34, &queues.to_le_bytes()),
        (36, &MAX_RANGE_SECTORS.to_le_bytes()),
        // One range per discard, so that a request is one operation on the host.
        (40, &1_u32.to_le_bytes()),
        (44, &sectors(disk.discard_block).to_le_bytes()),
        (48, &MAX_RANGE_SECTORS.to_le_bytes()),
        (52, &1_u32.to_le_bytes()),
    ];
    for (at, value) in fields {
        for (to, from) in config.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
    }
    // write_zeroes_may_unmap
    if let Some(last) = config.get_mut(56) {
        *last = 1;
    }
    config
}

/// The features that a disk can truly offer.
pub(super) fn features(disk: &Geometry, read_only: bool, queues: u16) -> u64 {
    let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
    features |= if read_only {
        feature::RO
    } else {
        feature::DISCARD | feature::WRITE_ZEROES
    };
    if disk.physical_block > disk.logical_block {
        features |= feature::TOPOLOGY;
    }
    if queues > 1 {
        features |= feature::MQ;
    }
    features
}
