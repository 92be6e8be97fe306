//! vCPUs of the model: which ioctls still work, and what entering one does.

use arch::x86::regs::{BootState, General};

use crate::model::Model;
use crate::vmsa::{SevFeatures, Vmsa};

/// `KVM_SET_MP_STATE` values that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MpState {
    /// Running or ready to.
    Runnable,
    /// Fresh, not the first vCPU.
    Uninitialized,
    /// Waiting.
    Halted,
}

/// An ioctl on a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuIoctl {
    /// REGS, SREGS, SREGS2, XCRS, DEBUGREGS.
    Registers,
    /// FPU, XSAVE.
    Fpu,
    /// A list of MSRs that begins with one that passes through to the guest.
    Msrs,
    /// LAPIC.
    Lapic,
    /// SMI.
    Smi,
    /// SET_GUEST_DEBUG.
    GuestDebug,
    /// KVM_RUN with `kvm_valid_regs`.
    RunWithValidRegs,
}

/// What `KVM_RUN` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Enters the guest.
    Runs,
    /// Returns 0 with KVM_EXIT_FAIL_ENTRY and hardware reason -1.
    FailEntry,
    /// Fails with this errno.
    Errno(i32),
}

/// One vCPU.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its registers.
    pub state: BootState,
    /// Its run state.
    pub mp_state: MpState,
    /// A debugger is attached.
    pub guest_debug: bool,
    /// Another thread is in `KVM_RUN`.
    pub running: bool,
    /// Its registers are encrypted.
    pub protected: bool,
    /// A save area that the guest gave it; `Some(false)` after the guest took it away.
    vmsa: Option<bool>,
}

impl Vcpu {
    /// `sev_es_sync_vmsa`.
    pub(super) fn sync_vmsa(&self, features: u64) -> Result<Vmsa, i32> {
        if self.protected || self.guest_debug || self.state.control.dr7 != 0x400 {
            return Err(libc::EINVAL);
        }
        Ok(Vmsa::new(&self.state, SevFeatures::from_bits(features)))
    }
}

impl Model {
    /// `KVM_CREATE_VCPU`, with the registers of a fresh vCPU in long mode at zero.
    #[expect(clippy::indexing_slicing, reason = "it was pushed just before")]
    pub fn create_vcpu(&mut self) -> &mut Vcpu {
        let first = self.vcpus.is_empty();
        let vcpu = Vcpu {
            state: BootState::long_mode(General::default(), 0),
            mp_state: if first {
                MpState::Runnable
            } else {
                MpState::Uninitialized
            },
            guest_debug: false,
            running: false,
            protected: false,
            vmsa: None,
        };
        let index = self.vcpus.len();
        self.vcpus.push(vcpu);
        &mut self.vcpus[index]
    }

    /// An ioctl on vCPU `index` (`kvm_arch_vcpu_ioctl`, `sev_es_prevent_msr_access`). The number is what the call
    /// returns: for MSRs how many were handled of two.
    ///
    /// # Errors
    /// Errno.
    pub fn vcpu_ioctl(&self, index: usize, ioctl: VcpuIoctl) -> Result<u32, i32> {
        let protected = self.vcpus.get(index).is_some_and(|v| v.protected);
        let typed = self.vm_type == 4;
        match ioctl {
            VcpuIoctl::Smi if typed => Err(libc::ENOTTY),
            // KVM_CAP_SYNC_REGS is 0 for VMs with protected state.
            VcpuIoctl::RunWithValidRegs if typed => Err(libc::EINVAL),
            VcpuIoctl::Registers | VcpuIoctl::GuestDebug if protected => Err(libc::EINVAL),
            VcpuIoctl::Msrs => Ok(if protected { 0 } else { 2 }),
            VcpuIoctl::Registers
            | VcpuIoctl::GuestDebug
            | VcpuIoctl::Smi
            | VcpuIoctl::RunWithValidRegs
            | VcpuIoctl::Fpu
            | VcpuIoctl::Lapic => Ok(0),
        }
    }

    /// The guest's AP_CREATE for vCPU `index` (`sev_snp_ap_creation`).
    pub fn ap_create(&mut self, index: usize) {
        if let Some(vcpu) = self.vcpus.get_mut(index) {
            vcpu.vmsa = Some(true);
            if vcpu.mp_state == MpState::Halted {
                vcpu.mp_state = MpState::Runnable;
            }
        }
    }

    /// The guest's AP_DESTROY.
    pub fn ap_destroy(&mut self, index: usize) {
        if let Some(vcpu) = self.vcpus.get_mut(index) {
            vcpu.vmsa = Some(false);
            vcpu.mp_state = MpState::Halted;
        }
    }

    /// `KVM_RUN` on vCPU `index` (`svm_vcpu_pre_run`, `kvm_arch_vcpu_ioctl_run`, `pre_sev_run`).
    pub fn run(&self, index: usize) -> Entry {
        let Some(vcpu) = self.vcpus.get(index) else {
            return Entry::Errno(libc::EBADF);
        };
        if !self.is_snp() {
            return Entry::Errno(libc::EINVAL);
        }
        match vcpu.mp_state {
            MpState::Uninitialized => Entry::Errno(libc::EAGAIN),
            // Waits in the kernel until a kick.
            MpState::Halted => Entry::Errno(libc::EINTR),
            MpState::Runnable if !vcpu.protected || vcpu.vmsa == Some(false) => Entry::FailEntry,
            MpState::Runnable => Entry::Runs,
        }
    }
}
