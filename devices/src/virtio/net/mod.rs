//! virtio-net (virtio 1.2, "Network Device") on a tap interface or a stream to passt.

mod header;
#[cfg(test)]
mod lies;
mod link;
mod run;
mod rx;
#[cfg(test)]
mod served;
#[cfg(test)]
mod tests;
mod tx;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use arch::poll::Poll;
use arch::tap::{Offloads, Tap, TapError};

use super::device::{Activation, Running, VirtioDevice};
use super::rate::{Limit, Rates};
use super::serve::copy_fields;
pub use header::net_feature;
use link::{Link, Stream, TapLink};
use net_feature::{
    CSUM, CTRL_VQ, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MAC, MQ, MRG_RXBUF, MTU, STATUS,
};
use run::{LIMIT, Limits, NetRunning, Shelf};

const DEVICE_ID: u32 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Most queue pairs of one device.
pub const MAX_PAIRS: u16 = 64;
/// Smallest MTU that may be announced: the smallest an IPv4 host must take.
const MTU_MIN: u32 = 68;
const LINK_UP: u16 = 1;

/// Where frames go.
#[derive(Debug)]
pub enum Backend {
    /// A tap interface by name.
    Tap(String),
    /// Open tap queues, one for each pair.
    TapFds(Vec<OwnedFd>),
    /// The socket that passt(1) listens on.
    Passt(PathBuf),
}

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The locally administered address of device number `index`: the same in every run.
    pub fn of_device(index: u32) -> Self {
        let [a, b, c, d] = index.to_be_bytes();
        Self([0x02, 0x63, a, b, c, d])
    }

    /// Its bytes in the order of transmission.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is not the address of one station.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a MAC address of one station; write six hex bytes like 02:00:00:00:00:01")]
pub struct BadMac(String);

impl FromStr for MacAddress {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts
                    .next()
                    .filter(|part| part.len() == 2 && !part.starts_with('+'))?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            let [first, ..] = bytes;
            let one_station = first & 1 == 0 && bytes != [0; 6];
            (parts.next().is_none() && one_station).then_some(Self(bytes))
        };
        parse().ok_or_else(|| BadMac(text.to_owned()))
    }
}

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The number of queue pairs does not go with the backend.
    #[error("{pairs} queue pairs are not possible here; use 1 to {limit}")]
    Pairs {
        /// Wanted.
        pairs: u16,
        /// Most that the backend can have.
        limit: u16,
    },
    /// The tap interface.
    #[error("network device has no tap")]
    Tap(#[from] TapError),
    /// Nobody listens there.
    #[error("cannot connect to passt at {path}; start `passt --socket {path}` first")]
    Passt {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The host is out of descriptors.
    #[error("cannot make an epoll or timer descriptor")]
    Poll(#[source] io::Error),
}

/// A network device before its driver is up.
#[derive(Debug)]
pub struct Net {
    features: u64,
    config: [u8; 12],
    queue_sizes: Vec<u16>,
    poll: Arc<Poll>,
    shelf: Shelf,
    limits: Limits,
}

impl Net {
    /// Opens `backend` with `pairs` queue pairs.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn open(backend: Backend, mac: MacAddress, pairs: u16) -> Result<Self, NetError> {
        let limit = match &backend {
            Backend::Tap(_) => MAX_PAIRS,
            Backend::TapFds(fds) => u16::try_from(fds.len()).unwrap_or(MAX_PAIRS).min(MAX_PAIRS),
            Backend::Passt(_) => 1,
        };
        let exact = matches!(backend, Backend::TapFds(_));
        if pairs == 0 || pairs > limit || exact && pairs != limit {
            return Err(NetError::Pairs { pairs, limit });
        }
        let taps = match backend {
            Backend::Tap(name) => (0..pairs)
                .map(|_| Tap::open(&name, pairs > 1))
                .collect::<Result<_, _>>()?,
            Backend::TapFds(fds) => fds.into_iter().map(Tap::from_fd).collect::<Result<_, _>>()?,
            Backend::Passt(path) => {
                let stream = connect(&path).map_err(|source| NetError::Passt { path, source })?;
                return Self::new(vec![Box::new(Stream::new(stream))], 0, None, mac);
            }
        };
        let (links, offloads, mtu) = tap_links(taps);
        Self::new(links, offloads, mtu, mac)
    }

    fn new(
        links: Vec<Box<dyn Link>>,
        offloads: u64,
        mtu: Option<u16>,
        mac: MacAddress,
    ) -> Result<Self, NetError> {
        let pairs = u16::try_from(links.len()).unwrap_or(MAX_PAIRS);
        let mut features = MAC | STATUS | MRG_RXBUF | offloads;
        let mut queue_sizes = vec![QUEUE_SIZE; links.len().saturating_mul(2)];
        if pairs > 1 {
            features |= MQ | CTRL_VQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        if mtu.is_some() {
            features |= MTU;
        }
        let [m0, m1, m2, m3, m4, m5] = mac.0;
        let [up, up_high] = LINK_UP.to_le_bytes();
        let [p0, p1] = pairs.to_le_bytes();
        let [u0, u1] = mtu.unwrap_or(0).to_le_bytes();
        Ok(Self {
            features,
            config: [m0, m1, m2, m3, m4, m5, up, up_high, p0, p1, u0, u1],
            queue_sizes,
            poll: Arc::new(Poll::open().map_err(NetError::Poll)?),
            shelf: Arc::new(Mutex::new(links)),
            limits: Limits::default(),
        })
    }

    /// Keeps the card to rates of what the guest receives and of what it sends, over all pairs together.
    ///
    /// # Errors
    /// See [`NetError::Poll`].
    pub fn limit(mut self, receive: Rates, transmit: Rates) -> Result<Self, NetError> {
        let limit = |rates| Limit::new(rates, &self.poll, LIMIT).map_err(NetError::Poll);
        self.limits = Limits {
            receive: limit(receive)?,
            transmit: limit(transmit)?,
        };
        Ok(self)
    }
}

fn connect(path: &std::path::Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// The links of `taps`, with the offloads and the MTU that the kernel grants them.
fn tap_links(taps: Vec<Tap>) -> (Vec<Box<dyn Link>>, u64, Option<u16>) {
    let detachable = taps.len() > 1;
    // Without offloads towards the guest the kernel computes what a frame lacks, so all of it is optional.
    let mut offloads = CSUM | HOST_TSO4 | HOST_TSO6;
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
    };
    let mut mtu = None;
    if let Some(tap) = taps.first() {
        if tap
            .set_offloads(all)
            .and_then(|()| tap.set_offloads(Offloads::default()))
            .is_ok()
        {
            offloads |= GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6;
        }
        let known = tap.mtu().ok().filter(|mtu| *mtu >= MTU_MIN);
        mtu = known.and_then(|mtu| u16::try_from(mtu).ok());
    }
    let link = |tap| -> Box<dyn Link> {
        Box::new(TapLink {
            tap,
            detachable,
            attached: true,
        })
    };
    (taps.into_iter().map(link).collect(), offloads, mtu)
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_fields(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poll.as_fd())
    }

    fn activate(&mut self, with: Activation) -> io::Result<Box<dyn Running>> {
        let running = NetRunning::start(
            with,
            Arc::clone(&self.poll),
            Arc::clone(&self.shelf),
            self.limits.clone(),
        )?;
        Ok(Box::new(running))
    }
}
