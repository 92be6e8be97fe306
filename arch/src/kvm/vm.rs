//! A VM: memory slots, page visibility, interrupts, kicks.
// UNSAFETY: memory slots hand host addresses to the kernel.
#![expect(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_MSI,
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_memory_attributes, kvm_msi, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::gmem::Gmem;
use super::system::Host;
use super::uapi;
use super::vcpu::Vcpu;
use crate::addr::{Gpa, PageRange};
use crate::mem::Visibility;

/// An open VM. Dropping it and its vCPUs and guest_memfd files ends the guest.
#[derive(Debug)]
pub struct Vm {
    pub(super) fd: VmFd,
    /// Host memory that the kernel maps into the guest, by slot; kept until the slot is gone.
    slots: Mutex<BTreeMap<u32, Arc<GuestRegionMmap>>>,
    routes: Mutex<BTreeMap<u32, MsiMessage>>,
}

/// Address and data of a message-signalled interrupt (PCI 3.0, "MSI-X Table Structure").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where x86 messages go (Intel SDM, volume 3, "Message Address Register Format").
const MSI_BASE: u64 = 0xfee0_0000;

impl MsiMessage {
    /// `vector`, edge-triggered and fixed, to the vCPU with this APIC id. KVM takes the id's bits above 8 in the upper
    /// half of the address (`KVM_CAP_X2APIC_API`).
    pub fn to_vcpu(apic_id: u32, vector: u8) -> Self {
        let low = u64::from(apic_id & 0xff) << 12;
        let high = u64::from(apic_id & !0xff) << 32;
        Self {
            address: MSI_BASE | low | high,
            data: u32::from(vector),
        }
    }

    /// The lower and upper half of the address.
    fn address_words(self) -> [u32; 2] {
        let [a, b, c, d, e, f, g, h] = self.address.to_le_bytes();
        [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
    }
}

/// Attribute calls cover at most this much, because the kernel works through a range uninterruptibly.
const ATTRIBUTE_CHUNK_BYTES: u64 = 1 << 30;

impl Vm {
    /// `KVM_CREATE_VM`, with local APICs in the kernel, 32-bit APIC ids, and page conversion requests sent
    /// to user space. `EINTR` is retried, as signals make the kernel give up here.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` for a type it does not offer.
    pub fn create(host: &Host, vm_type: u64) -> io::Result<Self> {
        let fd = loop {
            match host.kvm.create_vm_with_type(vm_type) {
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other?,
            }
        };
        let vm = Self {
            fd,
            slots: Mutex::default(),
            routes: Mutex::default(),
        };
        vm.enable(KVM_CAP_EXIT_HYPERCALL, 1 << uapi::HC_MAP_GPA_RANGE)?;
        vm.enable(KVM_CAP_SPLIT_IRQCHIP, 0)?;
        // 1: 32-bit ids in MSI routes; 2: no broadcast quirk.
        vm.enable(KVM_CAP_X2APIC_API, 3)?;
        Ok(vm)
    }

    fn enable(&self, cap: u32, arg: u64) -> io::Result<()> {
        let mut request = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        if let Some(first) = request.args.first_mut() {
            *first = arg;
        }
        Ok(self.fd.enable_cap(&request)?)
    }

    /// Length of a cycle of the local APICs' timers, which is 1 ns otherwise. No vCPU may exist.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_apic_bus_cycle(&self, nanoseconds: u64) -> io::Result<()> {
        self.enable(uapi::CAP_APIC_BUS_CYCLES_NS, nanoseconds)
    }

    /// Maps `region` into the guest at its own address. With `private`, the guest's private accesses go to
    /// that guest_memfd at that offset instead. The mapping is kept alive until the slot is removed.
    ///
    /// # Errors
    /// The kernel's: `EEXIST` for overlaps, `EINVAL` for what the VM type forbids.
    pub fn map_slot(
        &self,
        slot: u32,
        region: Arc<GuestRegionMmap>,
        private: Option<(&Gmem, u64)>,
    ) -> io::Result<()> {
        let plain = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        if let Some((gmem, offset)) = private {
            let request = kvm_userspace_memory_region2 {
                slot,
                flags: KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: plain.guest_phys_addr,
                memory_size: plain.memory_size,
                userspace_addr: plain.userspace_addr,
                guest_memfd: gmem.number(),
                guest_memfd_offset: offset,
                ..Default::default()
            };
            // SAFETY: the kernel lets the guest read and write `memory_size` bytes at `userspace_addr` until
            // the slot is removed or the VM is gone. That is exactly `region`'s mapping, which `self.slots`
            // keeps alive until then; host code touches it by volatile accesses only.
            unsafe { self.fd.set_user_memory_region2(request) }?;
        } else {
            // SAFETY: as above.
            unsafe { self.fd.set_user_memory_region(plain) }?;
        }
        self.slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(slot, region);
        Ok(())
    }

    /// Removes a slot and lets go of its host memory. Unknown slots are ignored.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_slot(&self, slot: u32) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = slots.get(&slot) {
            let request = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: 0,
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: a size of zero only removes the slot; no new memory is handed over.
            unsafe { self.fd.set_user_memory_region(request) }?;
            slots.remove(&slot);
        }
        Ok(())
    }

    /// Tells KVM which side `range` is on (`KVM_SET_MEMORY_ATTRIBUTES`). Later guest accesses to the other
    /// side exit with `KVM_EXIT_MEMORY_FAULT`. Moves and clears no contents.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` where the VM type has no private memory.
    pub fn set_visibility(&self, range: PageRange, to: Visibility) -> io::Result<()> {
        let attributes = match to {
            Visibility::Private => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            Visibility::Shared => 0,
        };
        let mut address = range.start().0;
        while address < range.end().0 {
            let size = range.end().0.saturating_sub(address).min(ATTRIBUTE_CHUNK_BYTES);
            self.fd.set_memory_attributes(kvm_memory_attributes {
                address,
                size,
                attributes,
                flags: 0,
            })?;
            address = address.saturating_add(size);
        }
        Ok(())
    }

    /// Makes guest writes of any size at `at` count on `kick` instead of exiting to user space.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect_kick(&self, at: Gpa, kick: &EventFd) -> io::Result<()> {
        Ok(self
            .fd
            .register_ioevent(kick, &IoEventAddress::Mmio(at.0), NoDatamatch)?)
    }

    /// Makes writes to `event` raise interrupt line `gsi`; what that means is up to [`route`](Self::route).
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect_irq(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        Ok(self.fd.register_irqfd(event, gsi)?)
    }

    /// Points interrupt line `gsi` at `message`, or at nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn route(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let unchanged = routes.get(&gsi) == message.as_ref();
        if unchanged {
            return Ok(());
        }
        // What the kernel refuses must not stay, or it would refuse every table from then on.
        let mut wanted = routes.clone();
        match message {
            Some(message) => wanted.insert(gsi, message),
            None => wanted.remove(&gsi),
        };
        let entries: Vec<_> = wanted
            .iter()
            .map(|(gsi, message)| routing_entry(*gsi, *message))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.fd.set_gsi_routing(&table)?;
        *routes = wanted;
        Ok(())
    }

    /// Sends `message` at once, as a device without an interrupt line would (`KVM_SIGNAL_MSI`).
    ///
    /// # Errors
    /// The kernel's; `EINVAL` for a message that no local APIC can take.
    pub fn signal(&self, message: MsiMessage) -> io::Result<()> {
        let [address_lo, address_hi] = message.address_words();
        self.fd.signal_msi(kvm_msi {
            address_lo,
            address_hi,
            data: message.data,
            ..Default::default()
        })?;
        Ok(())
    }

    /// Creates the vCPU with this index; its APIC id is the same number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn create_vcpu(&self, index: u32) -> io::Result<Vcpu> {
        Ok(Vcpu::new(index, self.fd.create_vcpu(u64::from(index))?))
    }

    /// `KVM_CHECK_EXTENSION` asked of this VM; 0 = absent.
    pub fn capability(&self, number: u32) -> u32 {
        u32::try_from(self.fd.check_extension_raw(libc::c_ulong::from(number))).unwrap_or(0)
    }

    /// The descriptor, for a platform's own commands.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.fd` owns the descriptor and keeps it open for as long as the borrow of `self` lasts.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}

fn routing_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    [entry.u.msi.address_lo, entry.u.msi.address_hi] = message.address_words();
    entry.u.msi.data = message.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_their_vcpu_with_all_32_bits() {
        let cases = [
            (0, 0x20, 0xfee0_0000, 0x20),
            (3, 0xff, 0xfee0_3000, 0xff),
            (0x1fe, 0x41, 0x0000_0100_feef_e000, 0x41),
        ];
        for (apic_id, vector, address, data) in cases {
            assert_eq!(MsiMessage::to_vcpu(apic_id, vector), MsiMessage { address, data });
        }
    }
}
