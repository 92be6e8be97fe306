//! One connection with both of its ends.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::super::super::served::{Schedule, pattern};
use super::super::packet::{Key, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND};
use super::PACKET;

/// `count` bytes from number `from` of what one side of connection `id` sends.
pub(super) fn stretch(id: usize, side: usize, from: u64, count: usize) -> Vec<u8> {
    pattern(id as u64 * 7919 + side as u64 * 104_729 + from, count)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Asked for, and not answered.
    Asked,
    Open,
    /// Reset or forgotten.
    Gone,
}

/// One connection, with both of its ends.
pub(super) struct Talk {
    pub(super) id: usize,
    pub(super) phase: Phase,
    pub(super) key: Key,
    /// The guest's end: what it got and did not read, and credit in both directions.
    pub(super) inbox: Vec<u8>,
    pub(super) room: u32,
    pub(super) forwarded: u32,
    pub(super) announced: u32,
    pub(super) sent: u32,
    pub(super) peer_room: u32,
    pub(super) peer_forwarded: u32,
    pub(super) guest_shut: u32,
    pub(super) peer_shut: u32,
    pub(super) guest_read: u64,
    pub(super) guest_wrote: u64,
    /// What a process of the guest still has to write, and in pieces of how many bytes.
    pub(super) guest_writes: u64,
    pub(super) guest_piece: u32,
    /// The host's end.
    pub(super) listener: Option<(UnixListener, PathBuf)>,
    pub(super) socket: Option<UnixStream>,
    /// What the host's process has not written of its request.
    pub(super) request: Vec<u8>,
    /// What it has read of the answer.
    pub(super) greeting: Vec<u8>,
    pub(super) host_read: u64,
    pub(super) host_wrote: u64,
    /// What the host's process still has to write.
    pub(super) host_writes: u64,
    pub(super) host_ended: bool,
    pub(super) host_saw_end: bool,
}

impl Talk {
    pub(super) fn new(id: usize, key: Key, room: u32) -> Self {
        Self {
            id,
            phase: Phase::Asked,
            key,
            inbox: vec![],
            room,
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_room: 0,
            peer_forwarded: 0,
            guest_shut: 0,
            peer_shut: 0,
            guest_read: 0,
            guest_wrote: 0,
            guest_writes: 0,
            guest_piece: 1,
            listener: None,
            socket: None,
            request: vec![],
            greeting: vec![],
            host_read: 0,
            host_wrote: 0,
            host_writes: 0,
            host_ended: false,
            host_saw_end: false,
        }
    }

    pub(super) fn credit(&self) -> u32 {
        self.peer_room
            .saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    pub(super) fn peer_hears(&self) -> bool {
        self.peer_shut & SHUT_RECEIVE == 0
    }

    /// The host process reads at most `count` bytes; true if anything came.
    pub(super) fn host_reads(&mut self, count: usize, with: &Schedule) -> bool {
        if let Some((listener, path)) = &self.listener
            && let Ok((socket, _)) = UnixListener::accept(listener)
        {
            socket.set_nonblocking(true).unwrap();
            let _ = std::fs::remove_file(path);
            self.socket = Some(socket);
            self.listener = None;
            return true;
        }
        let mut bytes = [0; PACKET as usize];
        let room = &mut bytes[..count.min(PACKET as usize)];
        let got = match self.socket.as_mut().map(|socket| socket.read(room)) {
            Some(Ok(count)) => count,
            Some(Err(e)) if e.kind() == ErrorKind::WouldBlock => return false,
            Some(Err(_)) => 0,
            None => return false,
        };
        if got == 0 {
            return !std::mem::replace(&mut self.host_saw_end, true);
        }
        let mut bytes = &bytes[..got];
        while !self.greeting.ends_with(b"\n") && !bytes.is_empty() {
            self.greeting.push(bytes[0]);
            bytes = &bytes[1..];
        }
        if bytes != stretch(self.id, 0, self.host_read, bytes.len()) {
            with.wrong(|| format!("the host reads other bytes than the guest sent on {}", self.id));
        }
        self.host_read += bytes.len() as u64;
        true
    }

    /// The host process goes on writing; true if its socket took something.
    pub(super) fn host_writes(&mut self) -> bool {
        if let Some(socket) = self.socket.as_mut().filter(|_| !self.request.is_empty()) {
            return socket.write_all(&std::mem::take(&mut self.request)).is_ok();
        }
        if self.host_ended || !self.greeting.ends_with(b"\n") || self.host_writes == 0 {
            return false;
        }
        let bytes = stretch(self.id, 1, self.host_wrote, self.host_writes as usize);
        match self.socket.as_mut().map(|socket| socket.write(&bytes)) {
            Some(Ok(count)) => {
                self.host_wrote += count as u64;
                self.host_writes -= count as u64;
                true
            }
            _ => false,
        }
    }

    /// What keeps this connection from being done.
    pub(super) fn left(&self) -> Option<&'static str> {
        let closed = self.guest_shut == SHUT_BOTH;
        let alive = self.socket.is_some();
        let what = [
            (self.phase == Phase::Asked && !closed, "no answer to a request"),
            (
                self.phase == Phase::Open && closed,
                "no reset for a closed connection",
            ),
            (
                alive && !self.greeting.ends_with(b"\n"),
                "no answer for a host process",
            ),
            (
                !closed && self.guest_read != self.host_wrote,
                "bytes of the host do not reach the guest",
            ),
            (
                alive && !closed && !self.host_ended && self.host_writes != 0,
                "the host cannot write",
            ),
            (
                alive && self.guest_writes != 0 && self.phase == Phase::Open && self.peer_hears(),
                "the guest has no credit",
            ),
            (
                alive && self.host_read != self.guest_wrote,
                "bytes of the guest do not reach the host",
            ),
            (
                alive && self.guest_shut & SHUT_SEND != 0 && !self.host_saw_end,
                "the host does not see the end",
            ),
            (
                self.host_ended && !closed && self.phase == Phase::Open && self.peer_shut & SHUT_SEND == 0,
                "the guest does not see the end",
            ),
        ];
        what.into_iter().find(|(so, _)| *so).map(|(_, what)| what)
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.listener {
            let _ = std::fs::remove_file(path);
        }
    }
}
