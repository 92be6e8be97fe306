//! What is said to a quote generation service (QGS): one request and one answer on a stream of its own
//! (Intel SGX DCAP, QuoteGeneration/quote_wrapper/qgs_msg_lib, "qgs_msg_header_t" and its neighbours).
//!
//! Each message follows its length, four bytes, big-endian; all else is little-endian.

mod stream;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::bytes::{le16, le32};
use crate::get_quote::{MOST_BUFFER_BYTES, Status};

pub use stream::Stop;
use stream::Stream;

/// Length of a TDREPORT (Intel TDX module ABI, "TDREPORT_STRUCT").
pub const TD_REPORT_BYTES: usize = REPORT_SIZE as usize;
/// A TDREPORT, which only this machine's CPU can check.
pub type TdReport = [u8; TD_REPORT_BYTES];

const HEADER_BYTES: usize = 16;
/// Header, two lengths, report.
const REQUEST_BYTES: u32 = 16 + 8 + REPORT_SIZE;
const REPORT_SIZE: u32 = 1024;
const MAJOR: u16 = 1;
const MINOR: u16 = 1;
const GET_QUOTE_REQUEST: u32 = 0;
const GET_QUOTE_RESPONSE: u32 = 1;
/// Longest answer that is read: no longer quote fits a guest's buffer.
#[expect(clippy::cast_possible_truncation, reason = "128 KiB")]
const MOST_ANSWER_BYTES: usize = MOST_BUFFER_BYTES as usize;
/// Time in which a service must take a connection.
const CONNECT_TIME: Duration = Duration::from_secs(2);

/// Where a service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix stream socket.
    Unix(PathBuf),
    /// A vsock port, 2 being the host's own context id as its guests see it, 1 this machine.
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Vsock { cid, port } => write!(f, "vsock={cid}:{port}"),
        }
    }
}

/// An answer that holds no quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// Longer than any that is read, or shorter than a header.
    #[error("it announces an answer of {0} bytes, which no quote has")]
    Length(u32),
    /// Cut off.
    #[error("its answer of {0} bytes is cut off")]
    Short(usize),
    /// Another protocol.
    #[error("it speaks version {0} of the protocol, cvmm version {MAJOR}; install a QGS that fits")]
    Version(u16),
    /// An error of the service.
    #[error("it refuses: {}", Code(*.0))]
    Refused(u32),
    /// An answer to something else.
    #[error("its answer has type {0}, a quote has type {GET_QUOTE_RESPONSE}")]
    Type(u32),
    /// The lengths inside do not add up.
    #[error("the lengths in its answer do not add up")]
    Lengths,
    /// No quote inside.
    #[error("its answer holds no quote")]
    Empty,
    /// The quote does not fit the guest's buffer.
    #[error("its quote has {quote} bytes, the guest's buffer takes {room}")]
    TooLong {
        /// Bytes of the quote.
        quote: usize,
        /// Bytes that fit.
        room: usize,
    },
}

/// A service's own error code, in words where it is one of the protocol's.
struct Code(u32);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self.0 {
            0x1_2001 => "unexpected error",
            0x1_2002 => "out of memory",
            0x1_2003 => "invalid parameter",
            0x1_2004 => "invalid version",
            0x1_2005 => "invalid type",
            0x1_2006 => "invalid size",
            0x1_2007 => "invalid code",
            other => return write!(f, "error {other:#x}; its log says more"),
        };
        write!(f, "{words} ({:#x}); its log says more", self.0)
    }
}

/// Why there is no quote.
#[derive(Debug, thiserror::Error)]
pub enum QgsError {
    /// Nobody takes a connection.
    #[error("nobody answers ({0}); start the QGS, or correct --quote-service")]
    Absent(io::Error),
    /// The stream broke.
    #[error("the connection broke ({0})")]
    Broken(io::Error),
    /// No whole answer in time.
    #[error("no whole answer in time; look at the QGS")]
    Late,
    /// The guest is gone.
    #[error("the guest is gone")]
    Stopped,
    /// An answer without a quote.
    #[error(transparent)]
    Answer(#[from] BadAnswer),
}

impl QgsError {
    /// What the guest is told.
    pub fn status(&self) -> Status {
        match self {
            Self::Absent(_) | Self::Broken(_) | Self::Late | Self::Stopped => Status::Unavailable,
            Self::Answer(_) => Status::Error,
        }
    }
}

/// A service, connected to anew for each request.
#[derive(Debug)]
pub struct Qgs {
    address: Address,
}

impl Qgs {
    /// The service at `address`, which need not be there yet.
    pub fn new(address: Address) -> Self {
        Self { address }
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The quote of `report`, at most `room` bytes, before `until` and before `stop` is raised.
    ///
    /// # Errors
    /// See [`QgsError`].
    pub fn quote(
        &self,
        report: &TdReport,
        room: usize,
        until: Instant,
        stop: &Stop,
    ) -> Result<Vec<u8>, QgsError> {
        let connected = Instant::now()
            .checked_add(CONNECT_TIME)
            .unwrap_or(until)
            .min(until);
        let mut stream = Stream::connect(&self.address, connected, stop)?;
        stream.write_all(&request(report), until, stop)?;
        let mut length = [0; 4];
        stream.read_exact(&mut length, until, stop)?;
        let mut answer = vec![0; answer_bytes(length)?];
        stream.read_exact(&mut answer, until, stop)?;
        let quote = parse_response(&answer)?;
        if quote.len() > room {
            return Err(BadAnswer::TooLong {
                quote: quote.len(),
                room,
            }
            .into());
        }
        Ok(quote.to_vec())
    }
}

/// The request for a quote of `report`, with its length before it.
pub fn request(report: &TdReport) -> Vec<u8> {
    let no_ids = 0_u32;
    let mut message = Vec::with_capacity(4_usize.saturating_add(REQUEST_BYTES as usize));
    message.extend(REQUEST_BYTES.to_be_bytes());
    message.extend(MAJOR.to_le_bytes());
    message.extend(MINOR.to_le_bytes());
    for field in [GET_QUOTE_REQUEST, REQUEST_BYTES, 0, REPORT_SIZE, no_ids] {
        message.extend(field.to_le_bytes());
    }
    message.extend(report);
    message
}

/// The length of the answer that follows `prefix`.
///
/// # Errors
/// No answer has that length.
pub fn answer_bytes(prefix: [u8; 4]) -> Result<usize, BadAnswer> {
    let announced = u32::from_be_bytes(prefix);
    match usize::try_from(announced) {
        Ok(bytes) if (HEADER_BYTES..=MOST_ANSWER_BYTES).contains(&bytes) => Ok(bytes),
        _ => Err(BadAnswer::Length(announced)),
    }
}

/// The quote in an answer, without the length before it.
///
/// # Errors
/// See [`BadAnswer`].
pub fn parse_response(answer: &[u8]) -> Result<&[u8], BadAnswer> {
    let short = BadAnswer::Short(answer.len());
    let word = |at| le32(answer, at).ok_or(short);
    let major = le16(answer, 0).ok_or(short)?;
    let (kind, size, code) = (word(4)?, word(8)?, word(12)?);
    if major != MAJOR {
        return Err(BadAnswer::Version(major));
    }
    if code != 0 {
        return Err(BadAnswer::Refused(code));
    }
    if kind != GET_QUOTE_RESPONSE {
        return Err(BadAnswer::Type(kind));
    }
    let length = |word| usize::try_from(word).map_err(|_| BadAnswer::Lengths);
    let (id_bytes, quote_bytes) = (length(word(16)?)?, length(word(20)?)?);
    let body = answer.get(24..).ok_or(short)?;
    let quote = body.get(id_bytes..).ok_or(BadAnswer::Lengths)?;
    if length(size)? != answer.len() || quote.len() != quote_bytes {
        return Err(BadAnswer::Lengths);
    }
    if quote.is_empty() {
        return Err(BadAnswer::Empty);
    }
    Ok(quote)
}

#[cfg(test)]
mod tests;
