//! Frames between `scripts/rig` and the agent: one kind byte, four bytes of length (little endian), the payload.
//!
//! Host to agent: `R`equest, `I`nput, `E`nd of input, `S`ignal. Agent to host: `O`utput, e`W`rror output, e`X`it.

/// What a session starts with, followed by [`NONCE_BYTES`] chosen by the host; the agent answers with those bytes.
pub(crate) const MAGIC: &[u8] = b"CVMMRIG1";
/// Bytes that tell one session's answer from what an earlier one left in the pipe.
pub(crate) const NONCE_BYTES: usize = 16;
/// More than any request or piece of input; a longer frame means that the stream is out of step.
const MAX_PAYLOAD: usize = 1 << 20;
const HEADER_BYTES: usize = 5;

/// Appends one frame to `out`.
pub(crate) fn push(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(payload);
}

/// Takes the first whole frame off `bytes`; `None` when more bytes must arrive first.
pub(crate) fn pop(bytes: &mut Vec<u8>) -> std::io::Result<Option<(u8, Vec<u8>)>> {
    let Some((&[kind, a, b, c, d], rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD {
        return Err(std::io::Error::other("frame out of step"));
    }
    let Some(payload) = rest.get(..length) else {
        return Ok(None);
    };
    let payload = payload.to_vec();
    bytes.drain(..HEADER_BYTES + length);
    Ok(Some((kind, payload)))
}

/// Takes everything up to the end of a session's start off `bytes` and gives the nonce.
pub(crate) fn pop_start(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let at = bytes.windows(MAGIC.len()).position(|window| window == MAGIC)?;
    let nonce = bytes
        .get(at + MAGIC.len()..at + MAGIC.len() + NONCE_BYTES)?
        .to_vec();
    bytes.drain(..at + MAGIC.len() + NONCE_BYTES);
    Some(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_once_all_its_bytes_are_there() {
        let mut whole = Vec::new();
        push(&mut whole, b'I', b"hello");
        for cut in 0..whole.len() {
            let mut part = whole[..cut].to_vec();
            assert!(pop(&mut part).expect("in step").is_none());
            assert_eq!(part.len(), cut);
        }
        assert_eq!(pop(&mut whole).expect("in step"), Some((b'I', b"hello".to_vec())));
        assert!(whole.is_empty());
    }

    #[test]
    fn a_start_is_found_behind_leftovers() {
        let mut bytes = [b"old bytes CVMM".as_slice(), MAGIC, &[7; NONCE_BYTES], b"next"].concat();
        assert_eq!(pop_start(&mut bytes), Some(vec![7; NONCE_BYTES]));
        assert_eq!(bytes, b"next");
    }

    #[test]
    fn a_length_beyond_reason_is_refused() {
        assert!(pop(&mut vec![b'I', 255, 255, 255, 255]).is_err());
    }
}
