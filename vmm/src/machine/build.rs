//! From a specification to a machine that is ready to run.

use std::io;
use std::sync::Arc;

use arch::kvm::gmem::Gmem;
use arch::kvm::system::Host;
use arch::kvm::vcpu::Vcpu;
use arch::kvm::vm::Vm;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use arch::platform::{Foundation, Platform};
use arch::x86::cpuid::CpuidTable;

use crate::cpuid;
use crate::ending::RunError;
use crate::ram::{self, GuestRam, KvmBacking};

/// `KVM_CAP_MAX_VCPUS`.
const MAX_VCPUS: u32 = 66;

/// A VM with memory, before anything is launched into it.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) vm: Arc<Vm>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) host_ram: HostRam,
    pub(super) cpuid: CpuidTable,
}

impl Ground {
    /// Creates the VM and its RAM for `platform`.
    pub(super) fn lay(
        host: &Host,
        platform: &dyn Platform,
        memory_bytes: u64,
        cpus: u32,
    ) -> Result<Self, RunError> {
        let mut table = host
            .supported_cpuid()
            .map_err(RunError::host("asking KVM for CPUID"))?;
        table = cpuid::adapt(table, cpus);
        platform.adapt_cpuid(&mut table);
        let vm = Vm::create(host, platform.vm_type()).map_err(RunError::host("creating the VM"))?;
        let vm = Arc::new(vm);
        let ranges =
            ram::ranges(memory_bytes).map_err(|e| RunError::host("placing RAM")(io::Error::other(e)))?;
        let host_ram = HostRam::allocate(&ranges).map_err(RunError::host("reserving guest RAM"))?;
        let private = platform.private_memory();
        if private {
            // A guest shares single pages all over its memory, and pays for the private ones around them already.
            host_ram
                .keep_pages_small()
                .map_err(RunError::host("backing shared memory by small pages"))?;
        }
        let gmem = if private {
            Some(Gmem::new(&vm, memory_bytes).map_err(RunError::host("creating guest_memfd"))?)
        } else {
            None
        };
        let backing = KvmBacking::new(Arc::clone(&vm), host_ram.clone(), gmem)
            .map_err(RunError::host("mapping guest RAM"))?;
        let initial = if private {
            Visibility::Private
        } else {
            Visibility::Shared
        };
        if private {
            for range in &ranges {
                vm.set_visibility(*range, initial)
                    .map_err(RunError::host("making guest RAM private"))?;
            }
        }
        let visible = Arc::new(VisibilityMap::new(&ranges, initial));
        let shared = SharedMem::new(Arc::clone(host_ram.map()), Arc::clone(&visible));
        let ram = Arc::new(GuestRam::new(shared, visible, Box::new(backing)));
        Ok(Self {
            vm,
            ram,
            host_ram,
            cpuid: table,
        })
    }

    /// What a platform needs to begin its launch.
    pub(super) fn foundation(&self) -> Foundation {
        Foundation {
            vm: Arc::clone(&self.vm),
            ram: self.host_ram.clone(),
            shared: self.ram.shared().clone(),
            cpuid: self.cpuid.clone(),
        }
    }

    /// Creates all vCPUs, each with its CPUID. Only after the platform has begun its launch.
    pub(super) fn vcpus(&self, cpus: u32) -> Result<Vec<Vcpu>, RunError> {
        // Only the VM itself can tell: its type may allow fewer than KVM does, a TD one for each CPU of the host.
        let most = self.vm.capability(MAX_VCPUS);
        if cpus > most {
            return Err(RunError::HostLacks {
                what: format!(
                    "cpus: {cpus} are more than the {most} vCPUs that KVM allows this guest on this host"
                ),
                remedy: format!("give at most --cpus {most}"),
            });
        }
        (0..cpus)
            .map(|index| {
                let vcpu = self.vm.create_vcpu(index)?;
                vcpu.set_cpuid(&self.cpuid.clone().for_vcpu(index))?;
                Ok(vcpu)
            })
            .collect::<io::Result<_>>()
            .map_err(RunError::host("creating vCPUs"))
    }
}
