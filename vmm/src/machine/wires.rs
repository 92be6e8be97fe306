//! What devices are wired to, over KVM: interrupt lines, kicks, and the main thread that hears of broken devices.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::addr::Gpa;
use arch::kvm::vm::{MsiMessage, Vm};
use devices::pci::msix::Interrupts;
use devices::virtio::transport::{Fault, Kicks, Observer};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::inbox::{Address, Note};

/// Interrupts and kicks of one VM.
#[derive(Debug)]
pub(super) struct KvmWires(pub(super) Arc<Vm>);

impl Interrupts for KvmWires {
    fn route(&self, line: u32, message: Option<MsiMessage>) -> io::Result<()> {
        self.0.route(line, message)
    }

    fn connect(&self, line: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.0.connect_irq(line, &event)?;
        Ok(event)
    }
}

impl Kicks for KvmWires {
    fn connect(&self, at: Gpa, kick: &EventFd) -> io::Result<()> {
        self.0.connect_kick(at, kick)
    }
}

/// Tells the main thread.
#[derive(Debug)]
pub(super) struct ToMain(pub(super) Mutex<Address>);

impl Observer for ToMain {
    fn device_broken(&self, fault: &Fault<'_>) {
        let note = Note::DeviceBroken {
            device: fault.device.to_owned(),
            reason: fault.cause.to_string(),
        };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).send(note);
    }
}
