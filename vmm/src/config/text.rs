//! Values that are written as one word on the command line: `512M`, `disk.img,ro`, `cid=3,uds=/run/v`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::rates::Rates;

/// A value that does not have the documented form. The text says what is wrong and what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(pub(super) String);

pub(super) fn bad<T>(text: impl Into<String>) -> Result<T, BadValue> {
    Err(BadValue(text.into()))
}

/// Serialises through `Display` and `FromStr`, as the command line does.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text: String = serde::Deserialize::deserialize(from)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(super) use serde_as_text;

/// A number of bytes. Text is a number with an optional suffix K, M, G or T (powers of 1024); JSON may also
/// hold a plain number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for Size {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let upper = text.to_ascii_uppercase();
        let unit = UNITS.iter().find(|(suffix, _)| upper.ends_with(*suffix));
        let digits = unit.map_or(upper.as_str(), |_| upper.trim_end_matches(char::is_alphabetic));
        let shift = unit.map_or(0, |(_, shift)| *shift);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let one_suffix = upper.len().saturating_sub(digits.len()) <= 1;
        if !plain || !one_suffix {
            return bad("not a size; write bytes or a suffix, for example 512M or 4G");
        }
        let scaled = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
        scaled.map_or_else(|| bad("larger than 2^64 bytes"), |bytes| Ok(Self(bytes)))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: &u32| self.0 != 0 && self.0.trailing_zeros() >= *shift;
        match UNITS.iter().find(|(_, shift)| fits(shift)) {
            Some((suffix, shift)) => write!(to, "{}{suffix}", self.0 >> shift),
            None => write!(to, "{}", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "a size must be a number of bytes or text such as \"512M\""
        )]
        enum Form {
            Bytes(u64),
            Text(String),
        }
        match Form::deserialize(from)? {
            Form::Bytes(bytes) => Ok(Self(bytes)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// A disk of the guest.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Raw image or block device.
    pub path: PathBuf,
    /// The guest may only read.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub readonly: bool,
    /// Request queues; absent means one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Rates to keep, over all queues together.
    #[serde(
        default,
        skip_serializing_if = "Rates::are_unlimited",
        deserialize_with = "super::object::object"
    )]
    pub limit: Rates,
}

const DISK_FORM: &str = "write PATH[,ro][,queues=N][,bandwidth=SIZE][,operations=N]";

impl FromStr for Disk {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let mut words = text.split(',');
        let mut disk = Self {
            path: words.next().unwrap_or_default().into(),
            readonly: false,
            queues: None,
            limit: Rates::default(),
        };
        if disk.path.as_os_str().is_empty() {
            return bad(format!("no path; {DISK_FORM}"));
        }
        once(words.clone())?;
        for word in words {
            match word.split_once('=') {
                None if word == "ro" => disk.readonly = true,
                Some(("queues", n)) => disk.queues = Some(number("queues", n)?),
                Some((name, value)) if disk.limit.take(name, value)? => {}
                _ => {
                    return bad(format!(
                        "unknown option `{word}`; {DISK_FORM} (a path with a comma only goes into --config)"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// Refuses options of which one is there twice, as one of the two would count for nothing.
pub(super) fn once<'a>(words: impl Iterator<Item = &'a str>) -> Result<(), BadValue> {
    let mut seen = vec![];
    for word in words {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        if seen.contains(&name) {
            return bad(format!("{name} is given twice; leave one out"));
        }
        seen.push(name);
    }
    Ok(())
}

pub(super) fn number<T: FromStr>(name: &str, text: &str) -> Result<T, BadValue> {
    text.parse()
        .or_else(|_| bad(format!("{name}={text} is not a number in range")))
}

/// Sockets between host and guest.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id.
    pub cid: u32,
    /// Unix socket on the host; a guest's connection to port P of the host goes to `uds` with `_P` appended.
    pub uds: PathBuf,
}

impl FromStr for Vsock {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let form = "write cid=N,uds=PATH";
        let rest = text
            .strip_prefix("cid=")
            .and_then(|rest| rest.split_once(",uds="));
        match rest {
            Some((cid, uds)) if !uds.is_empty() => Ok(Self {
                cid: number("cid", cid)?,
                uds: uds.into(),
            }),
            _ => bad(form),
        }
    }
}

/// Where the guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard input and output.
    Stdio,
    /// A new pseudo-terminal, whose name is logged and told by the `started` event.
    Pty,
    /// Output to a file, created or emptied; no input.
    File(PathBuf),
    /// A Unix socket that cvmm listens on, one client at a time.
    Socket(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for Console {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => bad("write stdio, pty, file=PATH, socket=PATH or none"),
        }
    }
}

impl fmt::Display for Console {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => to.write_str("stdio"),
            Self::Pty => to.write_str("pty"),
            Self::File(path) => write!(to, "file={}", path.display()),
            Self::Socket(path) => write!(to, "socket={}", path.display()),
            Self::None => to.write_str("none"),
        }
    }
}
serde_as_text!(Console);

/// Where event lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventSink {
    /// A file that is appended to, a FIFO, or a listening Unix socket.
    Path(PathBuf),
    /// A descriptor that the caller left open.
    Fd(u32),
}

impl FromStr for EventSink {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.strip_prefix("fd:") {
            Some(n) => match n.parse() {
                Ok(n) => Ok(Self::Fd(n)),
                Err(_) => bad("write a path, or fd: and the number of an open descriptor"),
            },
            None if text.is_empty() => bad("write a path, or fd: and the number of an open descriptor"),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for EventSink {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(to),
            Self::Fd(n) => write!(to, "fd:{n}"),
        }
    }
}
serde_as_text!(EventSink);
