//! Tap interfaces (Linux, "Universal TUN/TAP device driver"): one descriptor is one queue.
// UNSAFETY: ioctls of the tun driver on plain structures that live on our stack.
#![expect(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;

/// `VIRTIO_NET_HDR` of virtio 1.2: what every frame on our taps begins with.
pub const HEADER_BYTES: i32 = 12;

const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// An open queue of a tap interface. Frames begin with a 12-byte virtio-net header.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty, longer than 15 bytes or has a NUL.
    #[error("{0:?} is not an interface name; use 1 to 15 bytes")]
    Name(String),
    /// No access to the tun driver.
    #[error("cannot open /dev/net/tun; load the tun module and give cvmm access to the file")]
    Driver(#[source] io::Error),
    /// The kernel refuses the interface.
    #[error(
        "cannot use tap interface {name}; create it for this user first, \
         with `multi_queue` if it shall have several queues, and let nobody else hold it"
    )]
    Attach {
        /// Interface.
        name: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is something else.
    #[error("descriptor {fd} is not a tap interface opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    NotATap {
        /// Its number.
        fd: i32,
    },
    /// The kernel refuses our header size or offloads.
    #[error("cannot set up tap interface {name}; it needs a Linux 4.18 or later")]
    Setup {
        /// Interface.
        name: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Offloads that a tap may do towards the guest: what the guest's driver accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is not filled in.
    pub checksum: bool,
    /// TCP over IPv4 in frames up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 in frames up to 64 KiB.
    pub tso6: bool,
}

impl Tap {
    /// Opens a queue of interface `name`, which is created if this process may and it does not exist.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Driver)?;
        let several = [libc::IFF_MULTI_QUEUE, 0];
        // An interface that exists keeps its kind, so one queue tries both.
        let kinds = if multi_queue {
            &several[..1]
        } else {
            &[0, libc::IFF_MULTI_QUEUE][..]
        };
        let mut outcome = Ok(());
        for kind in kinds {
            set_flags(&mut request, FLAGS | kind);
            outcome = ioctl(file.as_fd(), libc::TUNSETIFF, &mut request);
            if outcome.is_ok() {
                break;
            }
        }
        outcome.map_err(|source| TapError::Attach {
            name: name.to_owned(),
            source,
        })?;
        Self::set_up(file)
    }

    /// Takes over a descriptor that the parent process opened.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let not_a_tap = TapError::NotATap { fd: fd.as_raw_fd() };
        // SAFETY: F_GETFL takes no pointer.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: F_SETFL takes no pointer.
        let rc = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        if flags < 0 || rc < 0 {
            return Err(not_a_tap);
        }
        Self::set_up(File::from(fd))
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        let not_a_tap = TapError::NotATap { fd: file.as_raw_fd() };
        let mut request = empty();
        if ioctl(file.as_fd(), libc::TUNGETIFF, &mut request).is_err() || get_flags(&request) & FLAGS != FLAGS
        {
            return Err(not_a_tap);
        }
        let name = name_of(&request);
        let mut bytes = HEADER_BYTES;
        ioctl(file.as_fd(), libc::TUNSETVNETHDRSZ, &mut bytes).map_err(|source| TapError::Setup {
            name: name.clone(),
            source,
        })?;
        Ok(Self { file, name })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor; it does not block.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Tells the tap what it may leave to the guest.
    ///
    /// # Errors
    /// The kernel does not know one of them.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.checksum && offloads.tso4, libc::TUN_F_TSO4),
            (offloads.checksum && offloads.tso6, libc::TUN_F_TSO6),
        ];
        let bits = bits
            .iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bit)| all | bit);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let rc = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(bits),
            )
        };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Lets the kernel use this queue or keeps it from doing so. Only for interfaces with several queues.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_attached(&self, on: bool) -> io::Result<()> {
        let mut request = empty();
        set_flags(
            &mut request,
            if on {
                libc::IFF_ATTACH_QUEUE
            } else {
                libc::IFF_DETACH_QUEUE
            },
        );
        ioctl(self.fd(), libc::TUNSETQUEUE, &mut request)
    }

    /// Largest packet of the interface, without its Ethernet header.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name).map_err(io::Error::other)?;
        let socket = UnixDatagram::unbound()?;
        ioctl(socket.as_fd(), libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU wrote this member of the union; any bytes are a valid integer.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u32::try_from(mtu).map_err(io::Error::other)
    }
}

fn empty() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_map: libc::__c_anonymous_ifru_map {
                mem_start: 0,
                mem_end: 0,
                base_addr: 0,
                irq: 0,
                dma: 0,
                port: 0,
            },
        },
    }
}

fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request = empty();
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(TapError::Name(name.to_owned()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn set_flags(request: &mut libc::ifreq, flags: i32) {
    let [low, high, ..] = flags.to_le_bytes();
    request.ifr_ifru.ifru_flags = i16::from_le_bytes([low, high]);
}

fn get_flags(request: &libc::ifreq) -> i32 {
    // SAFETY: TUNGETIFF wrote this member of the union; any bytes are a valid integer.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let [low, high] = flags.to_le_bytes();
    i32::from(u16::from_le_bytes([low, high]))
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().flat_map(|c| c.to_ne_bytes()).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn ioctl<T>(fd: BorrowedFd<'_>, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: `argument` is the structure that each caller's request number names, borrowed mutably for the
    // call; the kernel keeps no pointer to it.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(argument)) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_names_are_refused_before_the_kernel_sees_them() {
        for name in ["", "0123456789abcdef", "a\0b"] {
            assert!(
                matches!(Tap::open(name, false), Err(TapError::Name(_))),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Tap::from_fd(null.into()), Err(TapError::NotATap { .. })));
    }
}
