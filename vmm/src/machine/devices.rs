//! The devices of a machine, put on its buses and into its event loop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use arch::blockio::Enter;
use devices::bus::{Bus, BusDevice};
use devices::console::{Console, ConsoleRequest};
use devices::pci::root::PciRoot;
use devices::power::{self, PowerPorts};
use devices::serial::{self, Serial};
use devices::virtio::block::Block;
use devices::virtio::console::VirtioConsole;
use devices::virtio::device::VirtioDevice;
use devices::virtio::input::{PowerButton, VirtioPowerButton};
use devices::virtio::rng::VirtioRng;
use devices::virtio::transport::{VirtioPci, Wires};
use shim::layout;

use super::build::Ground;
use super::inbox::{Inbox, Note};
use super::run::World;
use super::wires::{KvmWires, ToMain};
use crate::ending::RunError;
use crate::event_loop::EventLoop;
use crate::sandbox::Thread;

/// Everything outside the vCPUs.
#[derive(Debug)]
pub(super) struct Periphery {
    pub(super) ports: Bus,
    pub(super) mmio: Bus,
    pub(super) button: PowerButton,
}

/// Puts devices in place, one after another; PCI slots are given out in that order.
struct Fitter<'a> {
    root: PciRoot,
    mmio: Bus,
    wires: Wires,
    events: &'a mut EventLoop,
}

impl Fitter<'_> {
    fn attach(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), RunError> {
        let placing = || RunError::host(format!("attaching {name}"));
        let device = VirtioPci::attach(name, device, &self.wires, &mut self.root, &mut self.mmio)
            .map_err(|e| placing()(io::Error::other(e)))?;
        let served = device.clone();
        self.events
            .add_many(Box::new(move |source| served.on_event(source)), |epoll, token| {
                device.watch(epoll, token)
            })
            .map_err(placing())
    }
}

impl Periphery {
    /// Makes all devices for a life of the machine. What they are made from stays usable for the next one.
    pub(super) fn fit(
        world: &World<'_>,
        ground: &Ground,
        inbox: &Inbox,
        events: &mut EventLoop,
    ) -> Result<Self, RunError> {
        let specs = &world.parts.devices;
        let kvm = Arc::new(KvmWires(Arc::clone(&ground.vm)));
        let observer = inbox
            .address()
            .map_err(RunError::host("making the main thread's inbox"))?;
        let wires = Wires {
            mem: ground.ram.shared().clone(),
            interrupts: kvm.clone(),
            kicks: kvm,
            observer: Arc::new(ToMain(Mutex::new(observer))),
        };
        let mut fitter = Fitter {
            root: PciRoot::default(),
            mmio: Bus::default(),
            wires,
            events,
        };
        for (index, disk) in specs.disks.iter().enumerate() {
            let sandbox = world.sandbox.clone();
            let enter: Enter = Arc::new(move || sandbox.confine(Thread::Disk));
            let file = disk.file.try_clone();
            let opened = file
                .and_then(|file| Block::open(file, disk.readonly, disk.queues, serial_number(index), &enter))
                .and_then(|block| block.limit(disk.rates));
            let doing = format!("opening disk {}", disk.path.display());
            fitter.attach(
                &format!("disk{index}"),
                Box::new(opened.map_err(RunError::host(doing))?),
            )?;
        }
        for (index, net) in specs.nets.iter().enumerate() {
            let doing = format!("opening network card {}", net.name);
            let device = net
                .device()
                .map_err(|e| RunError::host(doing)(io::Error::other(e)))?;
            fitter.attach(&format!("net{index}"), Box::new(device))?;
        }
        if let Some(vsock) = world.vsock {
            fitter.attach("vsock", Box::new(vsock.clone()))?;
        }
        if specs.rng {
            let rng = VirtioRng::new().map_err(RunError::host("opening the random number device"))?;
            fitter.attach("rng", Box::new(rng))?;
        }
        if specs.has_console {
            fitter.attach("console", Box::new(VirtioConsole::new(specs.console.clone())))?;
        }
        let button = VirtioPowerButton::new().map_err(RunError::host("opening the power button"))?;
        let (device, button) = button;
        fitter.attach("power button", Box::new(device))?;
        let Fitter {
            root,
            mut mmio,
            events,
            ..
        } = fitter;
        place(&mut mmio, layout::ECAM, layout::ECAM_LEN, Box::new(root))?;
        watch_console(&specs.console, inbox, events)?;
        Ok(Self {
            ports: ports(&specs.console, inbox)?,
            mmio,
            button,
        })
    }
}

fn place(bus: &mut Bus, base: u64, len: u64, device: Box<dyn BusDevice>) -> Result<(), RunError> {
    bus.attach(base, len, device)
        .map_err(|e| RunError::Internal(e.to_string()))
}

fn ports(console: &Console, inbox: &Inbox) -> Result<Bus, RunError> {
    let to_main = inbox
        .address()
        .map_err(RunError::host("making the main thread's inbox"))?;
    let power = PowerPorts::new(Box::new(move |event| to_main.send(Note::Power(event))));
    let mut ports = Bus::default();
    place(&mut ports, power::PORT, power::PORTS, Box::new(power))?;
    let uart = Serial::new(Box::new(console.clone()));
    place(&mut ports, serial::PORT, serial::PORTS, Box::new(uart))?;
    Ok(ports)
}

fn watch_console(console: &Console, inbox: &Inbox, events: &mut EventLoop) -> Result<(), RunError> {
    let watching = || RunError::host("watching the console");
    let to_main = inbox.address().map_err(watching())?;
    let served = console.clone();
    let handler = move |_| {
        if let Some(ConsoleRequest::Quit) = served.service() {
            to_main.send(Note::Quit);
        }
    };
    events
        .add(console.descriptor().as_raw_fd(), Box::new(handler))
        .map_err(watching())
}

/// What the guest reads as the disk's serial number: stable, and tells disks apart.
fn serial_number(index: usize) -> [u8; 20] {
    let mut id = [0; 20];
    for (to, from) in id.iter_mut().zip(format!("cvmm-disk{index}").bytes()) {
        *to = from;
    }
    id
}
