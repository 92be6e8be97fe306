//! Network cards.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::rates::Rates;
use super::text::{BadValue, bad, number, once, serde_as_text};

/// A network card. In JSON one of `tap`, `fd` and `passt` names the host's side.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct Net {
    /// The host's side.
    pub backend: Backend,
    /// Address of the guest's card; absent means a random local one.
    pub mac: Option<Mac>,
    /// Pairs of queues; absent means one.
    pub queues: Option<u16>,
    /// Rates of what the guest receives, over all pairs together.
    pub rx_limit: Rates,
    /// Rates of what the guest sends.
    pub tx_limit: Rates,
}

/// The host's side of a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// An existing tap interface.
    Tap(String),
    /// An inherited descriptor of `/dev/net/tun` that is attached to a tap.
    Fd(u32),
    /// The Unix socket of a running passt.
    Passt(PathBuf),
}

/// Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

const FORM: &str = "write tap=NAME, fd=N or passt=PATH, then optionally ,mac=02:00:00:00:00:01, ,queues=N and \
                    ,rx-bandwidth=SIZE, ,rx-operations=N, ,tx-bandwidth=SIZE, ,tx-operations=N";

#[derive(Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fd: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    passt: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<Mac>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queues: Option<u16>,
    #[serde(
        skip_serializing_if = "Rates::are_unlimited",
        deserialize_with = "super::object::object"
    )]
    rx_limit: Rates,
    #[serde(
        skip_serializing_if = "Rates::are_unlimited",
        deserialize_with = "super::object::object"
    )]
    tx_limit: Rates,
}

impl TryFrom<Fields> for Net {
    type Error = BadValue;

    fn try_from(fields: Fields) -> Result<Self, BadValue> {
        let backend = match (fields.tap, fields.fd, fields.passt) {
            (Some(name), None, None) => Backend::Tap(name),
            (None, Some(n), None) => Backend::Fd(n),
            (None, None, Some(path)) => Backend::Passt(path),
            (None, None, None) => return bad(format!("no back-end given; {FORM}")),
            _ => return bad(format!("more than one back-end; {FORM}")),
        };
        Ok(Self {
            backend,
            mac: fields.mac,
            queues: fields.queues,
            rx_limit: fields.rx_limit,
            tx_limit: fields.tx_limit,
        })
    }
}

impl From<Net> for Fields {
    fn from(net: Net) -> Self {
        let mut fields = Self {
            mac: net.mac,
            queues: net.queues,
            rx_limit: net.rx_limit,
            tx_limit: net.tx_limit,
            ..Self::default()
        };
        match net.backend {
            Backend::Tap(name) => fields.tap = Some(name),
            Backend::Fd(n) => fields.fd = Some(n),
            Backend::Passt(path) => fields.passt = Some(path),
        }
        fields
    }
}

impl FromStr for Net {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        once(text.split(','))?;
        let mut fields = Fields::default();
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("tap", name)) => fields.tap = Some(name.into()),
                Some(("fd", n)) => fields.fd = Some(number("fd", n)?),
                Some(("passt", path)) => fields.passt = Some(path.into()),
                Some(("mac", mac)) => fields.mac = Some(mac.parse()?),
                Some(("queues", n)) => fields.queues = Some(number("queues", n)?),
                Some((name, value)) => {
                    let taken = match name.split_once('-') {
                        Some(("rx", name)) => fields.rx_limit.take(name, value)?,
                        Some(("tx", name)) => fields.tx_limit.take(name, value)?,
                        _ => false,
                    };
                    if !taken {
                        return bad(format!("unknown option `{word}`; {FORM}"));
                    }
                }
                None => return bad(format!("unknown option `{word}`; {FORM}")),
            }
        }
        fields.try_into()
    }
}

impl FromStr for Mac {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let form = "mac must be six hexadecimal bytes, for example 02:00:00:00:00:01";
        let mut mac = [0; 6];
        let mut words = text.split(':');
        for byte in &mut mac {
            let digits = words.next().filter(|w| w.len() == 2);
            match digits.and_then(|w| u8::from_str_radix(w, 16).ok()) {
                Some(value) => *byte = value,
                None => return bad(form),
            }
        }
        if words.next().is_some() {
            return bad(form);
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(to, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}
serde_as_text!(Mac);
