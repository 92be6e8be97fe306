//! What other threads tell the main thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use devices::power::PowerEvent;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vcpu::VcpuEnd;

/// One message to the main thread.
#[derive(Debug)]
pub(super) enum Note {
    /// The guest used a power port.
    Power(PowerEvent),
    /// A vCPU thread is about to end.
    VcpuEnded(VcpuEnd),
    /// The event thread cannot go on.
    EventsFailed(io::Error),
    /// A device stopped serving until its driver resets it.
    DeviceBroken { device: String, reason: String },
    /// The user asks through the console to end the machine.
    Quit,
}

/// The receiving end; its descriptor is readable while there are notes.
#[derive(Debug)]
pub(super) struct Inbox {
    notes: Receiver<Note>,
    address: Address,
}

/// The sending end, one for each sender.
#[derive(Debug)]
pub(super) struct Address {
    notes: Sender<Note>,
    bell: EventFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        let (sender, notes) = channel();
        let address = Address {
            notes: sender,
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        Ok(Self { notes, address })
    }

    pub(super) fn address(&self) -> io::Result<Address> {
        Ok(Address {
            notes: self.address.notes.clone(),
            bell: self.address.bell.try_clone()?,
        })
    }

    /// The descriptor to watch.
    pub(super) fn fd(&self) -> RawFd {
        self.address.bell.as_raw_fd()
    }

    /// A note, if there is one.
    pub(super) fn take(&self) -> Option<Note> {
        match self.notes.try_recv() {
            Ok(note) => Some(note),
            Err(_) => {
                // Nothing to read is the usual case.
                let _ = self.address.bell.read();
                self.notes.try_recv().ok()
            }
        }
    }
}

impl Address {
    /// Sends `note`; never blocks. The main thread outlives every sender.
    pub(super) fn send(&self, note: Note) {
        if self.notes.send(note).is_ok()
            && let Err(e) = self.bell.write(1)
        {
            log::error!("waking the main thread: {e}");
        }
    }
}
