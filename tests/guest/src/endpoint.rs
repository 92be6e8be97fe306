//! Byte streams by name: `tcp:ADDRESS:PORT`, `vsock:CID:PORT`, `unix:PATH`, `hybrid:PATH:PORT`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vsock::{VsockListener, VsockStream};

/// A connected stream of whatever kind.
pub(crate) type Stream = File;

/// Connects to the named endpoint.
pub(crate) fn connect(name: &str) -> io::Result<Stream> {
    match split(name)? {
        ("tcp", address) => Ok(owned(TcpStream::connect(address)?)),
        ("unix", path) => Ok(owned(UnixStream::connect(path)?)),
        ("vsock", address) => {
            let (cid, port) = vsock_address(address)?;
            Ok(File::from(
                VsockStream::connect_with_cid_port(cid, port)?
                    .as_fd()
                    .try_clone_to_owned()?,
            ))
        }
        ("hybrid", address) => {
            let (path, port) = address.rsplit_once(':').ok_or_else(|| bad(name))?;
            hybrid(path, port)
        }
        _ => Err(bad(name)),
    }
}

/// Waits for one connection at the named endpoint. A socket file is made, and removed after the connection.
pub(crate) fn accept(name: &str) -> io::Result<Stream> {
    match split(name)? {
        ("tcp", address) => Ok(owned(TcpListener::bind(address)?.accept()?.0)),
        ("unix", path) => {
            let _ = std::fs::remove_file(path);
            let accepted = UnixListener::bind(path)?.accept();
            std::fs::remove_file(path)?;
            Ok(owned(accepted?.0))
        }
        ("vsock", address) => {
            let (cid, port) = vsock_address(address)?;
            let (stream, _) = VsockListener::bind_with_cid_port(cid, port)?.accept()?;
            Ok(File::from(stream.as_fd().try_clone_to_owned()?))
        }
        _ => Err(bad(name)),
    }
}

/// Waits for one connection and passes bytes between it and standard input and output, until the other end closes.
pub(crate) fn relay(name: &str) -> io::Result<()> {
    let mut stream = accept(name)?;
    let mut answers = stream.try_clone()?;
    std::thread::spawn(move || io::copy(&mut io::stdin().lock(), &mut answers));
    let mut out = io::stdout().lock();
    let mut bytes = [0_u8; 4096];
    loop {
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        out.write_all(bytes.get(..count).unwrap_or_default())?;
        out.flush()?;
    }
}

/// A connection into a guest through the VMM's vsock socket: `CONNECT port`, answered by `OK port`.
fn hybrid(path: &str, port: &str) -> io::Result<Stream> {
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0_u8];
    while answer.last() != Some(&b'\n') {
        if answer.len() > 32 || stream.read(&mut byte)? == 0 {
            return Err(io::Error::other(format!(
                "the guest does not listen on vsock port {port}"
            )));
        }
        answer.extend_from_slice(&byte);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::other(format!(
            "answer to CONNECT: {}",
            String::from_utf8_lossy(&answer).trim()
        )));
    }
    Ok(owned(stream))
}

fn vsock_address(text: &str) -> io::Result<(u32, u32)> {
    let (cid, port) = text.split_once(':').ok_or_else(|| bad(text))?;
    let number = |text: &str| text.parse::<u32>().map_err(io::Error::other);
    Ok((number(cid)?, number(port)?))
}

fn split(name: &str) -> io::Result<(&str, &str)> {
    name.split_once(':').ok_or_else(|| bad(name))
}

fn owned(stream: impl Into<OwnedFd>) -> Stream {
    File::from(stream.into())
}

fn bad(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` names no endpoint"))
}
