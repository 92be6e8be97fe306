//! Network cards: the host's side exists, is of the right kind and is used once.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::inherited::{FdError, Inherited};
use super::socket::{self, SocketError};
use crate::config::{Backend, Mac, Net};

/// A network card with its host's side.
#[derive(Debug)]
pub struct NetSpec {
    /// The host's side.
    pub backend: NetBackend,
    /// Address of the guest's card.
    pub mac: [u8; 6],
    /// Pairs of queues, 1 to [`MOST_PAIRS`].
    pub pairs: u16,
}

/// The host's side of a network card.
#[derive(Debug)]
pub enum NetBackend {
    /// An existing tap, not opened yet: attaching is the tap back-end's ioctl.
    Tap {
        /// Name of the interface.
        name: String,
        /// The interface was made with `multi_queue`, so attaching must say so too.
        multi_queue: bool,
    },
    /// An inherited descriptor that is attached to a tap.
    TapFd(OwnedFd),
    /// A connection to passt.
    Passt(UnixStream),
}

/// Most pairs of queues of a card.
pub const MOST_PAIRS: u16 = 8;
/// `IFNAMSIZ` less the NUL.
const NAME_MAX: usize = 15;
const IFF_TAP: u32 = 2;
const IFF_MULTI_QUEUE: u32 = 0x100;

/// A network card that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No interface can have this name.
    #[error(
        "net tap={name}: not the name of an interface (1 to {NAME_MAX} bytes, no `/` or space); see `ip link`"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// There is no such interface.
    #[error(
        "net tap={name}: no such interface; create it with `ip tuntap add {name} mode tap && ip link set {name} up`"
    )]
    NoTap {
        /// The name.
        name: String,
    },
    /// The interface is something else.
    #[error("net tap={name}: not a tap interface; create one with `ip tuntap add NAME mode tap`")]
    NotATap {
        /// The name.
        name: String,
    },
    /// The tap has one queue only.
    #[error(
        "net tap={name}: has no multi_queue for {pairs} queues; create it with `ip tuntap add {name} mode tap multi_queue`"
    )]
    SingleQueue {
        /// The name.
        name: String,
        /// Pairs asked for.
        pairs: u16,
    },
    /// Two cards on one host's side.
    #[error("net {name}: given twice; remove one")]
    Twice {
        /// The host's side as the user wrote it.
        name: String,
    },
    /// A number of queues that this back-end cannot have.
    #[error("net {name}: {pairs} queues are not between 1 and {most}; give queues=N in that range")]
    Queues {
        /// The host's side as the user wrote it.
        name: String,
        /// Pairs asked for.
        pairs: u16,
        /// Most that it can have.
        most: u16,
    },
    /// An address that no card may have.
    #[error(
        "net mac={mac}: a multicast or zero address; give one whose first byte is even, for example 02:00:00:00:00:01"
    )]
    Mac {
        /// The address.
        mac: Mac,
    },
    /// Two cards with one address.
    #[error("net mac={mac}: given twice; give each card its own")]
    MacTwice {
        /// The address.
        mac: Mac,
    },
    /// The inherited descriptor is wrong.
    #[error(transparent)]
    Fd(#[from] FdError),
    /// passt's socket is wrong.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// A card of which all is known that can be known without changing anything.
pub(super) struct Checked {
    backend: CheckedBackend,
    mac: [u8; 6],
    pairs: u16,
}

enum CheckedBackend {
    Tap { name: String, multi_queue: bool },
    TapFd(OwnedFd),
    Passt(PathBuf),
}

pub(super) fn check_all(nets: &[Net]) -> Result<Vec<Checked>, NetError> {
    let mut checked = Vec::new();
    // Host sides as (kind, name); an inherited descriptor counts as the tap that it is attached to.
    let mut seen: Vec<(bool, String)> = Vec::new();
    for net in nets {
        let (backend, key) = check_backend(net)?;
        let written = written(&net.backend);
        if seen.contains(&key) {
            return Err(NetError::Twice { name: written });
        }
        seen.push(key);
        if let Some(mac) = net.mac {
            let [first, ..] = mac.0;
            if first & 1 != 0 || mac.0 == [0; 6] {
                return Err(NetError::Mac { mac });
            }
            if nets.iter().filter(|other| other.mac == Some(mac)).count() > 1 {
                return Err(NetError::MacTwice { mac });
            }
        }
        let most = if matches!(backend, CheckedBackend::Tap { .. }) {
            MOST_PAIRS
        } else {
            1
        };
        let pairs = net.queues.unwrap_or(1);
        if !(1..=most).contains(&pairs) {
            let name = written;
            return Err(NetError::Queues { name, pairs, most });
        }
        let mac = net.mac.map_or_else(random_mac, |mac| mac.0);
        checked.push(Checked { backend, mac, pairs });
    }
    Ok(checked)
}

fn written(backend: &Backend) -> String {
    match backend {
        Backend::Tap(name) => format!("tap={name}"),
        Backend::Fd(n) => format!("fd={n}"),
        Backend::Passt(path) => format!("passt={}", path.display()),
    }
}

fn check_backend(net: &Net) -> Result<(CheckedBackend, (bool, String)), NetError> {
    Ok(match &net.backend {
        Backend::Tap(name) => {
            let multi_queue = check_tap(name, net.queues.unwrap_or(1))?;
            let name = name.clone();
            let key = (true, name.clone());
            (CheckedBackend::Tap { name, multi_queue }, key)
        }
        Backend::Fd(number) => {
            let (fd, name) = Inherited::take("net fd", *number)?.writable()?.tap()?;
            (CheckedBackend::TapFd(fd), (true, name))
        }
        Backend::Passt(path) => {
            socket::check_path("passt", path)?;
            let key = (false, path.to_string_lossy().into_owned());
            (CheckedBackend::Passt(path.clone()), key)
        }
    })
}

/// True if the tap has several queues.
fn check_tap(name: &str, pairs: u16) -> Result<bool, NetError> {
    let name_is_good = (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with('.')
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if !name_is_good {
        return Err(NetError::Name { name: name.into() });
    }
    let interface = PathBuf::from("/sys/class/net").join(name);
    if !interface.exists() {
        return Err(NetError::NoTap { name: name.into() });
    }
    let flags = fs::read_to_string(interface.join("tun_flags")).unwrap_or_default();
    let flags = flags.trim().trim_start_matches("0x");
    let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
    if flags & IFF_TAP == 0 {
        return Err(NetError::NotATap { name: name.into() });
    }
    let multi_queue = flags & IFF_MULTI_QUEUE != 0;
    if pairs > 1 && !multi_queue {
        return Err(NetError::SingleQueue {
            name: name.into(),
            pairs,
        });
    }
    Ok(multi_queue)
}

/// A unicast address of the locally administered kind (IEEE 802, "local bit").
fn random_mac() -> [u8; 6] {
    let [a, b, c, d, e, ..] = RandomState::new().hash_one(0).to_le_bytes();
    [0x02, a, b, c, d, e]
}

impl Checked {
    /// Connects what has to be connected.
    pub(super) fn open(self) -> Result<NetSpec, NetError> {
        Ok(NetSpec {
            backend: match self.backend {
                CheckedBackend::Tap { name, multi_queue } => NetBackend::Tap { name, multi_queue },
                CheckedBackend::TapFd(fd) => NetBackend::TapFd(fd),
                CheckedBackend::Passt(path) => NetBackend::Passt(socket::connect("passt", &path)?),
            },
            mac: self.mac,
            pairs: self.pairs,
        })
    }
}
