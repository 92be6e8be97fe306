//! Streams to `AF_VSOCK` addresses, which the standard library does not know.
// UNSAFETY: two system calls with a sockaddr_vm.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Begins to connect to `port` of the machine `cid` (vsock(7)) and returns the non-blocking stream: writable once it
/// is connected, or in error.
///
/// # Errors
/// The kernel's: `EAFNOSUPPORT` without vsock, `ENODEV` for a context id that nobody has.
pub fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointer is passed.
    let number = unsafe { libc::socket(libc::AF_VSOCK, flags, 0) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened `number` for this call, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let address = libc::sockaddr_vm {
        svm_family: u16::try_from(libc::AF_VSOCK).map_err(io::Error::other)?,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    };
    let bytes = u32::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    let pointer = (&raw const address).cast();
    // SAFETY: `pointer` points at `address`, `bytes` long, which lives until the call has returned; the kernel only
    // reads it.
    let result = unsafe { libc::connect(socket.as_raw_fd(), pointer, bytes) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(socket)
}
