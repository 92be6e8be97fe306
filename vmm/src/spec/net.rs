//! Network cards: the host's side exists, is of the right kind and is used once.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use arch::tap::{Tap, TapError};
use devices::virtio::net as device;
use devices::virtio::rate::Rates;

use super::inherited::{FdError, Inherited};
use super::socket::{self, SocketError};
use crate::config::{Backend, Mac, Net};

/// A network card with its host's side.
#[derive(Debug)]
pub struct NetSpec {
    /// The host's side as the user wrote it, e.g. `tap=tap0`.
    pub name: String,
    /// Address of the guest's card.
    pub mac: device::MacAddress,
    link: Link,
    /// Rates to keep when the guest receives, and when it sends.
    rates: (Rates, Rates),
}

#[derive(Debug)]
enum Link {
    /// Queues of a tap, one for each pair.
    Taps(Vec<Tap>),
    /// passt's socket: each life of the machine is a connection of its own.
    Passt(PathBuf),
}

impl NetSpec {
    /// The device for one life of the machine, on the same queues as in the life before.
    ///
    /// # Errors
    /// No descriptors left, or passt has gone.
    pub fn device(&self) -> Result<device::Net, NetError> {
        let (backend, pairs) = match &self.link {
            Link::Passt(path) => (device::Backend::Passt(path.clone()), 1),
            Link::Taps(taps) => {
                let fds = taps.iter().map(|tap| tap.fd().try_clone_to_owned());
                let fds = fds
                    .collect::<io::Result<Vec<_>>>()
                    .map_err(NetError::Descriptors)?;
                let pairs = u16::try_from(fds.len()).unwrap_or(MOST_PAIRS);
                (device::Backend::TapFds(fds), pairs)
            }
        };
        let (receive, transmit) = self.rates;
        Ok(device::Net::open(backend, self.mac, pairs)?.limit(receive, transmit)?)
    }
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
    /// There is no socket of passt's.
    #[error("net passt={}: no socket; start passt first, as in `passt --socket {}`", path.display(), path.display())]
    NoPasst {
        /// The path.
        path: PathBuf,
    },
    /// The tap cannot be attached to.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The device cannot be made.
    #[error(transparent)]
    Device(#[from] device::NetError),
    /// No descriptors left.
    #[error("duplicating the tap's descriptors; raise the limit on open files (`ulimit -n`)")]
    Descriptors(#[source] io::Error),
}

/// A card of which all is known that can be known without changing anything.
#[derive(Debug)]
pub(super) struct Checked {
    name: String,
    backend: CheckedBackend,
    mac: device::MacAddress,
    pairs: u16,
    rates: (Rates, Rates),
}

#[derive(Debug)]
enum CheckedBackend {
    Tap(String),
    TapFd(OwnedFd),
    Passt(PathBuf),
}

pub(super) fn check_all(nets: &[Net]) -> Result<Vec<Checked>, NetError> {
    let mut checked = Vec::new();
    // Host sides as (kind, name); an inherited descriptor counts as the tap that it is attached to.
    let mut seen: Vec<(bool, String)> = Vec::new();
    for net in nets {
        let (backend, key) = check_backend(net)?;
        let name = written(&net.backend);
        if seen.contains(&key) {
            return Err(NetError::Twice { name });
        }
        let own_mac = device_mac(&key.1);
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
        let most = match backend {
            CheckedBackend::Tap(_) => MOST_PAIRS,
            CheckedBackend::TapFd(_) | CheckedBackend::Passt(_) => 1,
        };
        let pairs = net.queues.unwrap_or(1);
        if !(1..=most).contains(&pairs) {
            return Err(NetError::Queues { name, pairs, most });
        }
        let mac = net.mac.unwrap_or(own_mac);
        checked.push(Checked {
            name,
            backend,
            mac: mac.to_string().parse().map_err(|_| NetError::Mac { mac })?,
            pairs,
            rates: (net.rx_limit.into(), net.tx_limit.into()),
        });
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
            check_tap(name, net.queues.unwrap_or(1))?;
            (CheckedBackend::Tap(name.clone()), (true, name.clone()))
        }
        Backend::Fd(number) => {
            let (fd, name) = Inherited::take("net fd", *number)?.writable()?.tap()?;
            (CheckedBackend::TapFd(fd), (true, name))
        }
        Backend::Passt(path) => {
            socket::check_path("passt", path)?;
            if !path.metadata().is_ok_and(|m| m.file_type().is_socket()) {
                return Err(NetError::NoPasst { path: path.clone() });
            }
            let key = (false, path.to_string_lossy().into_owned());
            (CheckedBackend::Passt(path.clone()), key)
        }
    })
}

fn check_tap(name: &str, pairs: u16) -> Result<(), NetError> {
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
    if pairs > 1 && flags & IFF_MULTI_QUEUE == 0 {
        return Err(NetError::SingleQueue {
            name: name.into(),
            pairs,
        });
    }
    Ok(())
}

/// A locally administered unicast address made from the name of the host's side (FNV-1a), so that it is the same in
/// every run, and different for two machines on one host.
fn device_mac(name: &str) -> Mac {
    let start = 0xcbf2_9ce4_8422_2325_u64;
    let hash = name.bytes().fold(start, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    Mac([0x02, a, b, c, d, e])
}

impl Checked {
    /// Attaches to the taps.
    pub(super) fn open(self) -> Result<NetSpec, NetError> {
        let link = match self.backend {
            CheckedBackend::Tap(name) => {
                let queues = (0..self.pairs).map(|_| Tap::open(&name, self.pairs > 1));
                Link::Taps(queues.collect::<Result<_, _>>()?)
            }
            CheckedBackend::TapFd(fd) => Link::Taps(vec![Tap::from_fd(fd)?]),
            CheckedBackend::Passt(path) => Link::Passt(path),
        };
        Ok(NetSpec {
            name: self.name,
            mac: self.mac,
            link,
            rates: self.rates,
        })
    }
}
