//! KVM's TDX interface and the TDX module behind it, as a model: the same answers, errno for errno, to what a VMM
//! does right or wrong (Linux 7.2, arch/x86/kvm/vmx/tdx.c unless said otherwise, by function). For tests only; it
//! protects nothing and needs no hardware. Nothing here is called by a launch on a real host.

mod calls;
mod memory;
mod module;
mod seam;
mod vcpu;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crate::commands::{Capabilities, InitVm};

pub use calls::{Call, Completion, TdxExit};
pub use memory::RawRegion;
pub use module::Module;
pub use vcpu::{Entry, Vcpu};

/// `KVM_X86_TDX_VM`.
const TDX_VM: u64 = 5;
/// `KVM_MAX_CPUID_ENTRIES`.
const CPUID_ENTRIES_MAX: usize = 256;
/// Guest-physical address width that needs extended page tables of five levels.
const WIDE: u32 = 52;
const NARROW: u32 = 48;

/// What the kernel on this host has.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `KVM_CAP_VM_TYPES`.
    pub vm_types: u32,
    /// TDX key ids left.
    pub key_ids: u32,
    /// The control group has reached its limit of `tdx`.
    pub group_full: bool,
    /// `KVM_CAP_MAX_VCPUS` of a TD.
    pub max_vcpus: u32,
    /// Extended page tables have five levels.
    pub five_levels: bool,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            vm_types: 1 << TDX_VM | 1,
            key_ids: 1,
            group_full: false,
            max_vcpus: 8,
            five_levels: true,
        }
    }
}

/// `struct kvm_tdx_cmd` but for its number and its data.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct RawCmd {
    pub flags: u32,
    pub hw_error: u64,
}

/// `struct kvm_tdx_init_vm` with its list.
#[derive(Clone, Debug)]
pub struct RawInit {
    /// What has a meaning.
    pub init: InitVm,
    /// Any of `reserved` is not zero.
    pub reserved: bool,
    /// `cpuid.padding`.
    pub padding: u32,
}

/// Errno, and `hw_error` as it comes back.
pub type Failure = (i32, u64);

/// `enum kvm_tdx_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Uninitialised,
    Initialised,
    Runnable,
}

/// A memory slot, in frames.
#[derive(Clone, Debug)]
struct Slot {
    frames: Range<u64>,
    gmem: bool,
}

/// One VM.
#[derive(Debug)]
pub struct Model {
    /// The host.
    pub kernel: Kernel,
    /// The TDX module.
    pub module: Module,
    /// vCPUs by index.
    pub vcpus: Vec<Vcpu>,
    /// Another thread is in `KVM_CREATE_VCPU`.
    pub creating_vcpu: bool,
    /// What stops the next `KVM_TDX_INIT_MEM_REGION`s: after that many pages, that errno.
    pub interruptions: VecDeque<(u64, i32)>,
    vm_type: u64,
    state: State,
    /// `kvm->vm_bugged`: every later ioctl fails.
    dead: bool,
    split_irqchip: bool,
    exit_hypercall: bool,
    /// Width of guest-physical addresses; the topmost bit is the shared one.
    width: u32,
    slots: Vec<Slot>,
    private: BTreeSet<u64>,
    added: BTreeSet<u64>,
    calls: Vec<calls::Pending>,
}

impl Model {
    /// `KVM_CREATE_VM` (x86.c:kvm_is_vm_type_supported).
    ///
    /// # Errors
    /// `EINVAL` for a type that the kernel does not offer.
    pub fn create(kernel: Kernel, vm_type: u64) -> Result<Self, i32> {
        let offered =
            u32::try_from(vm_type).is_ok_and(|bit| kernel.vm_types.checked_shr(bit).unwrap_or(0) & 1 != 0);
        if !offered {
            return Err(libc::EINVAL);
        }
        Ok(Self {
            kernel,
            module: Module::default(),
            vcpus: Vec::new(),
            creating_vcpu: false,
            interruptions: VecDeque::new(),
            vm_type,
            state: State::Uninitialised,
            dead: false,
            split_irqchip: false,
            exit_hypercall: false,
            width: 0,
            slots: Vec::new(),
            private: BTreeSet::new(),
            added: BTreeSet::new(),
            calls: Vec::new(),
        })
    }

    /// True once `KVM_TDX_FINALIZE_VM` has succeeded.
    pub fn finalised(&self) -> bool {
        self.state == State::Runnable
    }

    /// True after a failure that the kernel holds for its own bug: nothing succeeds any more.
    pub fn dead(&self) -> bool {
        self.dead
    }

    /// Width of guest-physical addresses with the shared bit, in bits; 0 before INIT_VM.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// The shared bit; 0 before INIT_VM.
    pub(crate) fn shared_bit(&self) -> u64 {
        match self.width.checked_sub(1) {
            Some(bit) => 1_u64.checked_shl(bit).unwrap_or(0),
            None => 0,
        }
    }

    /// What km:kvm_vm_ioctl and kvm_vcpu_ioctl check first.
    fn alive(&self) -> Result<(), i32> {
        if self.dead { Err(libc::EIO) } else { Ok(()) }
    }

    /// `KVM_CREATE_IRQCHIP` (x86.c:kvm_arch_vm_ioctl).
    ///
    /// # Errors
    /// Errno.
    pub fn create_irqchip(&self) -> Result<(), i32> {
        self.alive()?;
        if self.split_irqchip {
            return Err(libc::EEXIST);
        }
        if self.vm_type == TDX_VM {
            return Err(libc::ENOTTY);
        }
        if self.vcpus.is_empty() {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    /// `KVM_CAP_SPLIT_IRQCHIP` (x86.c:kvm_vm_ioctl_enable_cap).
    ///
    /// # Errors
    /// Errno.
    pub fn split_irqchip(&mut self, routes: u64) -> Result<(), i32> {
        self.alive()?;
        if routes > 4096 {
            return Err(libc::EINVAL);
        }
        if self.split_irqchip || !self.vcpus.is_empty() {
            return Err(libc::EEXIST);
        }
        self.split_irqchip = true;
        Ok(())
    }

    /// `KVM_CAP_EXIT_HYPERCALL` (x86.c:kvm_vm_ioctl_enable_cap).
    ///
    /// # Errors
    /// `EINVAL` for more than MAP_GPA_RANGE.
    pub fn exit_hypercall(&mut self, mask: u64) -> Result<(), i32> {
        self.alive()?;
        if mask & !(1 << 12) != 0 {
            return Err(libc::EINVAL);
        }
        self.exit_hypercall = mask != 0;
        Ok(())
    }

    /// `KVM_CAP_X86_APIC_BUS_CYCLES_NS` (x86.c:kvm_vm_ioctl_enable_cap).
    ///
    /// # Errors
    /// Errno.
    pub fn bus_cycles(&self, nanoseconds: u64) -> Result<(), i32> {
        self.alive()?;
        // The longest count of the timer, with its greatest divisor, must fit in 64 bits of nanoseconds.
        let longest = u64::from(u32::MAX).saturating_mul(128).checked_mul(nanoseconds);
        if nanoseconds == 0 || longest.is_none() {
            return Err(libc::EINVAL);
        }
        if !self.split_irqchip {
            return Err(libc::ENXIO);
        }
        if self.vcpus.is_empty() {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    /// What every command checks first (`tdx_get_cmd`, `tdx_acquire_vm_state_locks`).
    fn begin(&self, cmd: RawCmd) -> Result<(), Failure> {
        self.alive().map_err(|errno| (errno, cmd.hw_error))?;
        if self.vm_type != TDX_VM {
            return Err((libc::ENOTTY, cmd.hw_error));
        }
        if cmd.hw_error != 0 {
            return Err((libc::EINVAL, cmd.hw_error));
        }
        Ok(())
    }

    fn locked(&self, cmd: RawCmd) -> Result<(), Failure> {
        self.begin(cmd)?;
        if self.creating_vcpu {
            return Err((libc::EBUSY, 0));
        }
        Ok(())
    }

    /// A SEAMCALL failed as none should (`KVM_BUG_ON`).
    fn bug(&mut self) -> Failure {
        self.dead = true;
        (libc::EIO, 0)
    }

    /// KVM_TDX_CAPABILITIES (`tdx_get_capabilities`, `init_kvm_tdx_caps`).
    ///
    /// # Errors
    /// Errno and `hw_error`; `E2BIG` does not say how many entries there are.
    pub fn raw_capabilities(&self, cmd: RawCmd, room: usize) -> Result<Capabilities, Failure> {
        self.begin(cmd)?;
        if cmd.flags != 0 {
            return Err((libc::EINVAL, 0));
        }
        let offered = self.module.capabilities();
        if offered.cpuid.0.len() > room {
            return Err((libc::E2BIG, 0));
        }
        Ok(offered)
    }

    /// KVM_TDX_INIT_VM (`tdx_td_init`, `setup_tdparams`, `__tdx_td_init`).
    ///
    /// # Errors
    /// Errno and `hw_error`, which names the operand where the module refuses one.
    pub fn raw_init_vm(&mut self, cmd: RawCmd, raw: &RawInit) -> Result<(), Failure> {
        self.locked(cmd)?;
        if self.state != State::Uninitialised || cmd.flags != 0 {
            return Err((libc::EINVAL, 0));
        }
        if raw.init.cpuid.0.len() > CPUID_ENTRIES_MAX {
            return Err((libc::E2BIG, 0));
        }
        if raw.reserved || raw.padding != 0 {
            return Err((libc::EINVAL, 0));
        }
        let width = self.check_parameters(&raw.init).map_err(|errno| (errno, 0))?;
        // `tdx_guest_keyid_alloc` says what the id allocator says, then the misc control group is charged.
        if self.kernel.key_ids == 0 {
            return Err((libc::ENOSPC, 0));
        }
        if self.kernel.group_full {
            return Err((libc::EBUSY, 0));
        }
        if self.module.without_entropy != 0 {
            self.module.without_entropy = self.module.without_entropy.saturating_sub(1);
            return Err((libc::EAGAIN, 0));
        }
        if self.module.fails() {
            return Err(self.bug());
        }
        self.module
            .initialise(&raw.init)
            .map_err(|status| (libc::EINVAL, status))?;
        self.kernel.key_ids = self.kernel.key_ids.saturating_sub(1);
        self.width = width;
        self.state = State::Initialised;
        Ok(())
    }

    /// `setup_tdparams`, `setup_tdparams_eptp_controls`, `setup_tdparams_cpuids`; the width of guest-physical
    /// addresses.
    fn check_parameters(&self, init: &InitVm) -> Result<u32, i32> {
        if !self.vcpus.is_empty() {
            return Err(libc::EBUSY);
        }
        let offered = self.module.capabilities();
        if init.attributes & !offered.attributes != 0 || init.xfam & !offered.xfam != 0 {
            return Err(libc::EINVAL);
        }
        let sizes = init.cpuid.get(0x8000_0008, 0).ok_or(libc::EINVAL)?;
        let width = sizes.eax.wrapping_shr(16) & 0xff;
        if width != NARROW && (width != WIDE || !self.kernel.five_levels) {
            return Err(libc::EINVAL);
        }
        let mut copied = 0_usize;
        for row in &offered.cpuid.0 {
            if let Some(entry) = init.cpuid.get(row.leaf, row.subleaf.unwrap_or(0)) {
                if module::unsupported(entry) {
                    return Err(libc::EINVAL);
                }
                copied = copied.saturating_add(1);
            }
        }
        // Whatever has no place in TD_PARAMS, once too often or not at all, makes the count differ.
        if copied != init.cpuid.0.len() {
            return Err(libc::EINVAL);
        }
        Ok(width)
    }

    /// KVM_TDX_FINALIZE_VM (`tdx_td_finalize`); flags and data are not looked at.
    ///
    /// # Errors
    /// Errno and `hw_error`.
    pub fn raw_finalize(&mut self, cmd: RawCmd) -> Result<(), Failure> {
        self.locked(cmd)?;
        if self.state != State::Initialised {
            return Err((libc::EINVAL, 0));
        }
        if self.module.busy != 0 {
            self.module.busy = self.module.busy.saturating_sub(1);
            return Err((libc::EBUSY, 0));
        }
        if self.module.fails() {
            return Err(self.bug());
        }
        self.module.finalise();
        self.state = State::Runnable;
        Ok(())
    }

    /// A command that does not exist.
    ///
    /// # Errors
    /// Always.
    pub fn raw_unknown(&self, cmd: RawCmd) -> Result<(), Failure> {
        self.locked(cmd)?;
        Err((libc::EINVAL, 0))
    }
}

#[cfg(test)]
mod tests;
