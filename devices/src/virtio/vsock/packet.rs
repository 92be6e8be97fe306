//! The packet header (virtio 1.2, "Socket Device", "Device Operation").

/// `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;
/// `VMADDR_CID_HOST`.
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// `VIRTIO_VSOCK_OP_*`.
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will not receive any more.
pub(super) const SHUT_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will not send any more.
pub(super) const SHUT_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUT_BOTH: u32 = SHUT_RECEIVE | SHUT_SEND;

/// A connection: the port on the host side and the port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header, in host byte order. Nothing in it is trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A packet to the guest without payload and credit.
    pub(super) fn to_guest(cid: u64, key: Key, op: u16) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: key.host,
            dst_port: key.guest,
            kind: STREAM,
            op,
            ..Self::default()
        }
    }

    /// The connection that a packet of the guest belongs to.
    pub(super) fn key_from_guest(&self) -> Key {
        Key {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    rest.split_off(..N)
        .and_then(|field| field.try_into().ok())
        .unwrap_or([0; N])
}

fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some(room) = rest.split_off_mut(..N) {
        room.copy_from_slice(&field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0_u8; HEADER_BYTES];
        for (value, byte) in (1..).zip(&mut bytes) {
            *byte = value;
        }
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0807_0605_0403_0201);
        assert_eq!(header.dst_port, 0x1817_1615);
        assert_eq!(
            (header.len, header.kind, header.op),
            (0x1c1b_1a19, 0x1e1d, 0x201f)
        );
        assert_eq!(
            (header.flags, header.buf_alloc, header.fwd_cnt),
            (0x2423_2221, 0x2827_2625, 0x2c2b_2a29)
        );
        assert_eq!(header.bytes(), bytes);
    }
}
