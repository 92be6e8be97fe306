//! A stand-in for a kernel, where none is booted.

/// A file that passes for a kernel.
pub(crate) fn stand_in() -> Vec<u8> {
    let mut file = vec![0; 6 * 512];
    let fields: [(usize, &[u8]); 7] = [
        (0x1f1, &[4]),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 0x02]),
        (0x211, &[1]),
        (0x236, &[1, 0]),
        (0x238, &[0xff, 7, 0, 0]),
    ];
    for (at, bytes) in fields {
        file[at..][..bytes.len()].copy_from_slice(bytes);
    }
    file
}
