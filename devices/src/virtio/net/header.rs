//! Feature bits and the header in front of each frame (virtio 1.2, "Network Device": "Feature bits",
//! "Device Operation").

/// Device-specific feature bits.
pub mod net_feature {
    /// `VIRTIO_NET_F_CSUM`: the device fills in checksums of frames that the guest sends.
    pub const CSUM: u64 = 1;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the guest takes frames without a checksum.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_MTU`.
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`.
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_HOST_TSO4`.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_MRG_RXBUF`: a received frame may fill several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`.
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_CTRL_VQ`.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `VIRTIO_NET_F_MQ`.
    pub const MQ: u64 = 1 << 22;
}
use net_feature::{CSUM, HOST_TSO4, HOST_TSO6};

/// `struct virtio_net_hdr_v1`.
pub(super) const HEADER_BYTES: usize = 12;
/// Offset of `num_buffers` in it.
pub(super) const NUM_BUFFERS_AT: u64 = 10;
/// Largest header and frame in either direction: a 64 KiB packet, its Ethernet header, ours.
pub(super) const MAX_BYTES: usize = 65562;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// The header to hand to the host for a frame of `frame` bytes that the guest sends with `raw`. A checksum
/// request that was not negotiated is cleared; `None` if the frame must be dropped: a segmentation that was
/// not negotiated, or fields that point outside the frame.
pub(super) fn outgoing(raw: [u8; HEADER_BYTES], frame: usize, features: u64) -> Option<[u8; HEADER_BYTES]> {
    let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = raw;
    let checksum = flags & NEEDS_CSUM != 0 && features & CSUM != 0;
    let field = |low, high| usize::from(u16::from_le_bytes([low, high]));
    if checksum {
        let end = field(c0, c1).checked_add(field(o0, o1))?.checked_add(2)?;
        if end > frame {
            return None;
        }
    }
    let allowed = match gso {
        GSO_NONE => true,
        GSO_TCPV4 => checksum && features & HOST_TSO4 != 0,
        GSO_TCPV6 => checksum && features & HOST_TSO6 != 0,
        _ => false,
    };
    if !allowed || (gso != GSO_NONE && (field(s0, s1) == 0 || field(h0, h1) > frame)) {
        return None;
    }
    let mut out = [0; HEADER_BYTES];
    if checksum {
        out = [NEEDS_CSUM, gso, 0, 0, 0, 0, c0, c1, o0, o1, 0, 0];
    }
    if gso != GSO_NONE {
        out = [NEEDS_CSUM, gso, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0];
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_negotiated_offloads_reach_the_host() {
        let tcp4 = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        let tcp6 = [1, 4, 74, 0, 0xa0, 5, 54, 0, 16, 0, 0, 0];
        let sum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        let all = CSUM | HOST_TSO4 | HOST_TSO6;
        let cases = [
            ("plain", [0; 12], 60, 0, Some([0; 12])),
            ("tcp4", tcp4, 9000, all, Some(tcp4)),
            ("tcp6", tcp6, 9000, all, Some(tcp6)),
            ("tcp4 with tcp6 only", tcp4, 9000, CSUM | HOST_TSO6, None),
            ("tcp4 without checksum", tcp4, 9000, HOST_TSO4, None),
            ("checksum", sum, 60, CSUM, Some(sum)),
            ("checksum not negotiated", sum, 60, 0, Some([0; 12])),
            ("checksum at the end", sum, 52, CSUM, Some(sum)),
            ("checksum behind the end", sum, 51, CSUM, None),
            (
                "segment size 0",
                [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
                9000,
                all,
                None,
            ),
            ("headers longer than the frame", tcp4, 53, all, None),
            ("UFO", [1, 3, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], 9000, all, None),
            (
                "ECN",
                [1, 0x81, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0],
                9000,
                all,
                None,
            ),
            (
                "offsets overflow",
                [1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0],
                65000,
                all,
                None,
            ),
            (
                "other bits",
                [0xfe, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
                60,
                all,
                Some([0; 12]),
            ),
        ];
        for (name, raw, frame, features, expected) in cases {
            assert_eq!(outgoing(raw, frame, features), expected, "{name}");
        }
    }
}
