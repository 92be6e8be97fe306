//! Virtio over PCI, modern only (virtio 1.2, "Virtio Over PCI Bus").
//!
//! [`VirtioPci`] carries one [`VirtioDevice`]. vCPU threads reach it through the PCI root (configuration space)
//! and the MMIO bus (its BAR); the event thread through [`VirtioPci::on_event`]. One mutex serialises them. It is
//! taken inside those of the buses and outside that of the MSI-X table, and never together with a memory
//! batch that outlives a device's own work: starting, stopping and dropping a device happen without a batch,
//! so a device may join threads then that use guest memory.
//!
//! Nobody waits for a reset but the driver: until the host has finished what the device began, the status keeps its
//! value (virtio 1.2, "Common configuration structure layout", `device_status`: 0 once the reset is done).

mod access;
mod common;
mod config;
mod fault;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arch::addr::Gpa;
use arch::mem::SharedMem;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Activation, Running, VirtioDevice};
use super::queue::{QueueBroken, QueueIrq, VirtQueue};
use crate::bus::{Bus, BusConflict};
use crate::pci::msix::{Interrupts, Msix};
use crate::pci::root::{BusFull, LINES_PER_SLOT, PciRoot, Slot};

use common::{QueueRegisters, Registers};
use config::{Face, Part};
use fault::FaultLog;
pub use fault::{Cause, Fault, Observer};

/// Wake-up source of [`VirtioPci::on_event`] that stands for the backend; smaller numbers are queues.
pub const BACKEND: u16 = 0xffff;
/// Most queues of one device.
pub const MAX_QUEUES: usize = 256;

/// A reset that takes longer is worth a word, and so is as long again.
const SLOW_RESET: Duration = Duration::from_secs(10);

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Lets the guest kick without an exit to user space. Implemented over KVM and by tests.
pub trait Kicks: Send + Sync + std::fmt::Debug {
    /// Makes every guest write at `at` count on `kick`. Called at most once per address, and not again after
    /// an error.
    ///
    /// # Errors
    /// The kernel's. The transport copes: kicks then arrive as writes on the bus.
    fn connect(&self, at: Gpa, kick: &EventFd) -> io::Result<()>;
}

/// What every device of a machine is wired to.
#[derive(Clone, Debug)]
pub struct Wires {
    /// Guest memory.
    pub mem: SharedMem,
    /// Interrupt lines.
    pub interrupts: Arc<dyn Interrupts>,
    /// Kicks.
    pub kicks: Arc<dyn Kicks>,
    /// Is told of devices that the guest or the host broke.
    pub observer: Arc<dyn Observer>,
}

/// A device cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// All slots are taken.
    #[error("device {name} does not fit")]
    Slot {
        /// Name of the device.
        name: String,
        /// Why.
        #[source]
        source: BusFull,
    },
    /// Something else lies where the BAR belongs.
    #[error("device {name} has no place on the memory bus")]
    Place {
        /// Name of the device.
        name: String,
        /// Where.
        #[source]
        source: BusConflict,
    },
    /// More than [`MAX_QUEUES`].
    #[error("device {name} has {count} queues, at most {MAX_QUEUES} are possible; configure fewer")]
    Queues {
        /// Name of the device.
        name: String,
        /// Queues it wants.
        count: usize,
    },
    /// The host has no event descriptors left.
    #[error("device {name} gets no event descriptors from the host; raise the limit of open files")]
    Events {
        /// Name of the device.
        name: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// One virtio device on the PCI bus. Clones are the same device.
#[derive(Clone, Debug)]
pub struct VirtioPci(Arc<Core>);

#[derive(Debug)]
struct Core {
    name: String,
    slot: Slot,
    wires: Wires,
    msix: Arc<Msix>,
    kicks: Vec<EventFd>,
    /// Holds the backend's descriptor only while the device runs, so that a backend with news for a device
    /// that cannot take them does not keep the event thread awake.
    gate: Option<Epoll>,
    state: Mutex<State>,
}

struct State {
    device: Box<dyn VirtioDevice>,
    running: Option<Box<dyn Running>>,
    /// What ran and is stopped, while the host still works for it.
    leaving: Option<Box<dyn Running>>,
    /// The driver waits for a reset, which takes place once nothing is leaving; since when, or since it was logged.
    resetting: Option<Instant>,
    registers: Registers,
    face: Face,
    /// Queues whose kicks were wired up, as far as the host lets us.
    connected: Vec<bool>,
    faults: FaultLog,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("running", &self.running.is_some())
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

/// The interrupt of one queue.
#[derive(Debug)]
struct VectorIrq {
    msix: Arc<Msix>,
    vector: u16,
}

impl QueueIrq for VectorIrq {
    fn notify(&self) {
        self.msix.raise(self.vector, ISR_QUEUE);
    }
}

impl VirtioPci {
    /// Puts `device` into the next slot of `root` and its BAR on `mmio`. `name` is what messages call it.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        name: &str,
        device: Box<dyn VirtioDevice>,
        wires: &Wires,
        root: &mut PciRoot,
        mmio: &mut Bus,
    ) -> Result<Self, AttachError> {
        let name = name.to_owned();
        let slot = match root.next_slot() {
            Ok(slot) => slot,
            Err(source) => return Err(AttachError::Slot { name, source }),
        };
        let this = Self::new(name.clone(), device, wires.clone(), slot)?;
        let bar = Box::new(this.clone());
        match mmio.attach(u64::from(slot.bar.start), u64::from(slot.bar.bytes), bar) {
            Ok(()) => {}
            Err(source) => return Err(AttachError::Place { name, source }),
        }
        match root.attach(Box::new(this.clone())) {
            Ok(_) => Ok(this),
            Err(source) => Err(AttachError::Slot { name, source }),
        }
    }

    fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        wires: Wires,
        slot: Slot,
    ) -> Result<Self, AttachError> {
        let sizes = device.queue_sizes();
        let count = sizes.len();
        if count > MAX_QUEUES {
            return Err(AttachError::Queues { name, count });
        }
        // One vector for each queue and one for configuration changes, as far as lines go.
        let lines = usize::try_from(LINES_PER_SLOT).unwrap_or(0);
        let vectors = u16::try_from(count.saturating_add(1).min(lines)).unwrap_or(0);
        let (kicks, gate) = match events(count, device.as_ref()) {
            Ok(events) => events,
            Err(source) => return Err(AttachError::Events { name, source }),
        };
        let msix = Msix::new(vectors, slot.first_line, Arc::clone(&wires.interrupts));
        let state = State {
            registers: Registers::new(device.features(), sizes, vectors),
            face: Face::new(device.id(), count as u64, vectors, &slot),
            running: None,
            leaving: None,
            resetting: None,
            connected: vec![false; count],
            faults: FaultLog::default(),
            device,
        };
        Ok(Self(Arc::new(Core {
            name,
            slot,
            wires,
            msix: Arc::new(msix),
            kicks,
            gate,
            state: Mutex::new(state),
        })))
    }

    /// Name of the device in messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Makes `epoll` report this device's events, with `token + n` as data, where `n` is a queue or
    /// [`BACKEND`] and what [`on_event`](Self::on_event) wants. Kicks are reported on each edge and never read.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let kicks = self.0.kicks.iter().map(|kick| kick.as_raw_fd());
        for (queue, fd) in (token..).zip(kicks) {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, queue);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        if let Some(gate) = &self.0.gate {
            let event = EpollEvent::new(EventSet::IN, token.saturating_add(u64::from(BACKEND)));
            epoll.ctl(ControlOperation::Add, gate.as_raw_fd(), event)?;
        }
        Ok(())
    }

    /// The event thread saw event `source`. While the device does not run it means nothing but that a stopped one may be
    /// ready to go: a spurious kick and one that races with a reset are the guest's right.
    pub fn on_event(&self, source: u16) {
        let core = &*self.0;
        let queue = usize::from(source);
        if source != BACKEND && queue >= core.kicks.len() {
            return;
        }
        let mut state = core.lock();
        let Some(running) = state.running.as_mut() else {
            core.settle(&mut state);
            return;
        };
        let done = {
            let _batch = core.wires.mem.batch();
            if source == BACKEND {
                running.on_backend()
            } else {
                running.on_kick(queue)
            }
        };
        if let Err(broken) = done {
            core.give_up(&mut state, Cause::Guest(broken));
        }
    }
}

/// Kick events and backend gate of a device.
fn events(queues: usize, device: &dyn VirtioDevice) -> io::Result<(Vec<EventFd>, Option<Epoll>)> {
    let kick = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    let kicks = std::iter::repeat_with(kick)
        .take(queues)
        .collect::<io::Result<_>>()?;
    let gate = device.backend().map(|_| Epoll::new()).transpose()?;
    Ok((kicks, gate))
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, state: &mut State) {
        if let Err(cause) = self.try_start(state) {
            self.give_up(state, cause);
        }
    }

    fn try_start(&self, state: &mut State) -> Result<(), Cause> {
        let queues = {
            let _batch = self.wires.mem.batch();
            (0..)
                .zip(state.registers.queues())
                .map(|(index, registers)| self.queue(index, registers, state.registers.accepted()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(Cause::Guest)?
        };
        for ((queue, connected), index) in queues.iter().zip(&mut state.connected).zip(0_usize..) {
            if queue.is_some() && !std::mem::replace(connected, true) {
                self.connect_kick(index);
            }
        }
        let with = Activation {
            mem: self.wires.mem.clone(),
            features: state.registers.accepted(),
            queues,
        };
        state.running = Some(state.device.activate(with).map_err(Cause::Host)?);
        self.set_gate(state, true).map_err(Cause::Host)?;
        // What a driver put into its queues before it was ready counts from now on.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Ok(())
    }

    fn queue(
        &self,
        index: u16,
        registers: &QueueRegisters,
        features: u64,
    ) -> Result<Option<VirtQueue>, QueueBroken> {
        if !registers.enabled {
            return Ok(None);
        }
        let ready = registers
            .place
            .check(registers.max, &self.wires.mem)
            .map_err(|source| QueueBroken { queue: index, source })?;
        let irq = VectorIrq {
            msix: Arc::clone(&self.msix),
            vector: registers.vector,
        };
        Ok(Some(VirtQueue::new(index, ready, features, Box::new(irq))))
    }

    fn connect_kick(&self, queue: usize) {
        let Some(kick) = self.kicks.get(queue) else {
            return;
        };
        let at = u64::from(self.slot.bar.start).saturating_add(Part::notify_offset(queue));
        if let Err(error) = self.wires.kicks.connect(Gpa(at), kick) {
            let name = &self.name;
            log::warn!("kicks of {name} queue {queue} exit to user space, which is slower: {error}");
        }
    }

    /// Lets the backend wake the event thread, or not.
    fn set_gate(&self, state: &State, open: bool) -> io::Result<()> {
        let (Some(gate), Some(backend)) = (&self.gate, state.device.backend()) else {
            return Ok(());
        };
        let operation = if open {
            ControlOperation::Add
        } else {
            ControlOperation::Delete
        };
        gate.ctl(operation, backend.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
    }

    /// Stops what runs, if anything, and drops it as soon as the host lets it go.
    fn stop(&self, state: &mut State) {
        if let Some(running) = state.running.take() {
            state.leaving = Some(running);
        }
        self.settle(state);
    }

    /// Drops what was stopped, if the host is done with it; then a reset that waits for that takes place.
    fn settle(&self, state: &mut State) {
        if let Some(leaving) = &mut state.leaving {
            if !leaving.stop() {
                self.complain(state);
                return;
            }
            // It fails only if the descriptor is gone, with the same result.
            let _ = self.set_gate(state, false);
            state.leaving = None;
        }
        if state.resetting.take().is_some() {
            state.registers.reset();
        }
    }

    /// Says that a reset takes long, once in a while.
    fn complain(&self, state: &mut State) {
        if let Some(since) = &mut state.resetting
            && since.elapsed() >= SLOW_RESET
        {
            *since = Instant::now();
            let name = &self.name;
            log::warn!("the reset of device {name} waits for the host to finish what the device began");
        }
    }

    fn give_up(&self, state: &mut State, cause: Cause) {
        self.stop(state);
        state.registers.set_broken();
        self.msix.raise(state.registers.config_vector(), ISR_CONFIG);
        state
            .faults
            .report(&self.name, cause, self.wires.observer.as_ref());
    }
}
