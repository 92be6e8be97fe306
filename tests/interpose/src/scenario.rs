//! What a host has, and what goes wrong on it.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use arch::x86::cpuid::CpuidEntry;

use crate::call::Call;
use crate::machine::Ran;
use crate::tdcall::TdCall;

/// How far a guest has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Returns of `KVM_RUN` to the program.
    pub exits: &'a [Ran],
    /// TDCALLs.
    pub tdcalls: &'a [TdCall],
}

/// A host.
#[derive(Clone)]
pub struct Scenario {
    /// Files under this directory replace those of the host, by the same absolute path.
    pub root: PathBuf,
    /// `KVM_CAP_VM_TYPES`.
    pub vm_types: u32,
    /// Other answers of `KVM_CHECK_EXTENSION`.
    pub capabilities: BTreeMap<u32, u32>,
    /// CPUID that `KVM_GET_SUPPORTED_CPUID` shows besides, or instead of, the real host's.
    pub cpuid: Vec<CpuidEntry>,
    /// Changes to a fresh TDX model.
    pub tdx: fn(&mut tdx::model::Model),
    /// Changes to a fresh SNP model.
    pub snp: fn(&mut snp::model::Model),
    /// The program is killed once this is true.
    pub enough: fn(&Progress<'_>) -> bool,
    /// The program is killed after this time.
    pub limit: Duration,
}

impl fmt::Debug for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scenario at {}", self.root.display())
    }
}

impl Scenario {
    /// A host with all that SNP and TDX guests need, as far as KVM says so.
    pub fn new(root: PathBuf) -> Self {
        // MEMORY_FAULT_INFO, MEMORY_ATTRIBUTES, GUEST_MEMFD, PRE_FAULT_MEMORY, APIC_BUS_CYCLES, EXIT_HYPERCALL,
        // SYSTEM_EVENT_DATA
        let offered = [
            (232, 1),
            (233, 8),
            (234, 1),
            (236, 1),
            (237, 1),
            (201, 0x1000),
            (215, 1),
        ];
        // An SNP guest finds the encryption bit there.
        let memory_encryption = CpuidEntry {
            leaf: 0x8000_001f,
            eax: 0x1a,
            ebx: 51 | 1 << 6,
            ..CpuidEntry::default()
        };
        Self {
            root,
            vm_types: 1 | 1 << 4 | 1 << 5,
            capabilities: offered.into_iter().collect(),
            cpuid: vec![memory_encryption],
            tdx: |_| {},
            snp: |_| {},
            enough: |_| false,
            limit: Duration::from_secs(30),
        }
    }

    /// The file that replaces `path`, with its NUL.
    pub(crate) fn file(&self, path: &[u8]) -> Option<Vec<u8>> {
        let relative = std::ffi::OsStr::from_bytes(path.strip_prefix(b"/")?);
        let file = self.root.join(relative);
        let mut name = file
            .is_file()
            .then(|| file.into_os_string().into_encoded_bytes())?;
        name.push(0);
        Some(name)
    }

    pub(crate) fn extension(&self, number: u64) -> Option<u32> {
        const VM_TYPES: u32 = 235;
        match u32::try_from(number).ok()? {
            VM_TYPES => Some(self.vm_types),
            other => self.capabilities.get(&other).copied(),
        }
    }

    /// x86.c:kvm_is_vm_type_supported.
    pub(crate) fn offers(&self, vm_type: u64) -> bool {
        vm_type < 32 && self.vm_types >> vm_type & 1 != 0
    }

    pub(crate) fn tdx_model(&self) -> tdx::model::Model {
        let kernel = tdx::model::Kernel {
            vm_types: self.vm_types,
            ..tdx::model::Kernel::default()
        };
        let mut model = tdx::model::Model::create(kernel, 5).expect("the type is offered");
        // The KVM behind the model may have to emulate the shim, and cannot emulate SHA instructions.
        for leaf in model.module.native.leaf_mut(7) {
            leaf.ebx &= !(1 << 29);
        }
        (self.tdx)(&mut model);
        model
    }

    pub(crate) fn snp_model(&self, vm_type: u64) -> snp::model::Model {
        let mut model = snp::model::Model::new(vm_type);
        (self.snp)(&mut model);
        model
    }

    /// `KVM_GET_DEVICE_ATTR` and `KVM_HAS_DEVICE_ATTR` on `/dev/kvm`.
    pub(crate) fn device_attribute(&self, call: &Call<'_>, at: u64, get: bool) -> Result<(), i32> {
        let (group, attribute, to) = (call.u32(at + 4)?, call.u64(at + 8)?, call.u64(at + 16)?);
        let value = self.snp_model(4).kernel.attribute(group, attribute)?;
        if get {
            call.write(to, &value.to_ne_bytes())?;
        }
        Ok(())
    }
}
