//! vCPUs of the model: creating, initialising and entering them, and which ioctls work at all.

use arch::x86::cpuid::CpuidTable;

use super::{CPUID_ENTRIES_MAX, Failure, Model, RawCmd, State, TDX_VM};

/// CPUID leaf 1, ECX.
const X2APIC: u32 = 1 << 21;

/// One vCPU.
#[derive(Clone, Debug, Default)]
pub struct Vcpu {
    /// Its id.
    pub id: u32,
    /// What KVM takes its CPUID to be.
    pub cpuid: CpuidTable,
    /// RCX and R8 at its first instruction; `None` before INIT_VCPU.
    pub rcx: Option<u64>,
    /// `KVM_MP_STATE_INIT_RECEIVED` was forced on it.
    pub init_received: bool,
    ran: bool,
}

impl Vcpu {
    /// CPUID offers x2APIC.
    fn x2apic(&self) -> bool {
        self.cpuid.get(1, 0).is_some_and(|leaf| leaf.ecx & X2APIC != 0)
    }
}

/// What `KVM_RUN` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Enters the guest.
    Runs,
    /// Waits in the kernel for ever.
    Blocks,
    /// Fails with this errno.
    Errno(i32),
}

impl Model {
    /// `KVM_CREATE_VCPU` (km:kvm_vm_ioctl_create_vcpu, `tdx_vcpu_create`); the vCPU's index.
    ///
    /// # Errors
    /// Errno.
    pub fn create_vcpu(&mut self, id: u32) -> Result<usize, i32> {
        self.alive()?;
        let index = self.vcpus.len();
        if index as u64 >= u64::from(self.kernel.max_vcpus) {
            return Err(libc::EINVAL);
        }
        if self.vcpus.iter().any(|vcpu| vcpu.id == id) {
            return Err(libc::EEXIST);
        }
        if self.vm_type == TDX_VM {
            if self.state != State::Initialised {
                return Err(libc::EIO);
            }
            if !self.split_irqchip {
                return Err(libc::EINVAL);
            }
        }
        self.vcpus.push(Vcpu {
            id,
            ..Vcpu::default()
        });
        Ok(index)
    }

    /// `KVM_SET_CPUID2` (cpuid.c:kvm_vcpu_ioctl_set_cpuid2).
    ///
    /// # Errors
    /// Errno.
    pub fn vcpu_set_cpuid(&mut self, index: usize, table: &CpuidTable) -> Result<(), i32> {
        self.alive()?;
        if table.0.len() > CPUID_ENTRIES_MAX {
            return Err(libc::E2BIG);
        }
        let vcpu = self.vcpus.get_mut(index).ok_or(libc::EBADF)?;
        if vcpu.ran && vcpu.cpuid != *table {
            return Err(libc::EINVAL);
        }
        vcpu.cpuid = table.clone();
        Ok(())
    }

    /// What every command to a vCPU checks first (`tdx_vcpu_unlocked_ioctl`, `tdx_vcpu_ioctl`). `hw_error` is never
    /// copied back, so there is none.
    pub(super) fn vcpu_begin(&self, index: usize, cmd: RawCmd) -> Result<&Vcpu, i32> {
        let no_status = |(errno, _): Failure| errno;
        self.alive()?;
        if self.vm_type != TDX_VM {
            return Err(libc::EINVAL);
        }
        self.locked(cmd).map_err(no_status)?;
        if self.state != State::Initialised {
            return Err(libc::EINVAL);
        }
        self.vcpus.get(index).ok_or(libc::EBADF)
    }

    /// KVM_TDX_INIT_VCPU (`tdx_vcpu_init`, lapic.c:kvm_apic_set_base, `tdx_td_vcpu_init`).
    ///
    /// # Errors
    /// Errno.
    pub fn raw_init_vcpu(&mut self, index: usize, cmd: RawCmd, rcx: u64) -> Result<(), i32> {
        let vcpu = self.vcpu_begin(index, cmd)?;
        if cmd.flags != 0 || vcpu.rcx.is_some() || !vcpu.x2apic() {
            return Err(libc::EINVAL);
        }
        if self.module.fails() {
            return Err(self.bug().0);
        }
        if let Some(vcpu) = self.vcpus.get_mut(index) {
            vcpu.rcx = Some(rcx);
        }
        Ok(())
    }

    /// KVM_TDX_GET_CPUID (`tdx_vcpu_get_cpuid`): the table, or how many entries it has.
    ///
    /// # Errors
    /// Errno, and the number of entries with `E2BIG`.
    pub fn raw_get_cpuid(&self, index: usize, cmd: RawCmd, room: usize) -> Result<CpuidTable, (i32, usize)> {
        self.vcpu_begin(index, cmd).map_err(|errno| (errno, room))?;
        if self.module.cpuid_unreadable {
            return Err((libc::EIO, room));
        }
        let table = self.module.cpuid();
        let entries = table.0.len();
        if entries > room {
            return Err((libc::E2BIG, entries));
        }
        Ok(table)
    }

    /// Ioctls on a vCPU's registers, FPU, debug state and LAPIC (x86.c, `guest_state_protected` from creation).
    ///
    /// # Errors
    /// `EINVAL` for a TD.
    pub fn registers(&self) -> Result<(), i32> {
        self.alive()?;
        if self.vm_type == TDX_VM {
            Err(libc::EINVAL)
        } else {
            Ok(())
        }
    }

    /// `KVM_PRE_FAULT_MEMORY` (mmu.c:kvm_arch_vcpu_pre_fault_memory).
    ///
    /// # Errors
    /// Errno.
    pub fn pre_fault(&self, gpa: u64, bytes: u64, flags: u64) -> Result<(), i32> {
        self.alive()?;
        let page = arch::addr::PAGE_SIZE;
        let end = gpa.checked_add(bytes);
        let refused = flags != 0
            || bytes == 0
            || !gpa.is_multiple_of(page)
            || !bytes.is_multiple_of(page)
            || gpa & self.shared_bit() != 0;
        let Some(end) = end.filter(|_| !refused) else {
            return Err(libc::EINVAL);
        };
        if self.state != State::Runnable {
            return Err(libc::EOPNOTSUPP);
        }
        self.back(gpa / page..end / page)
    }

    /// `KVM_RUN` (x86.c:kvm_x86_vcpu_pre_run, `tdx_vcpu_pre_run`).
    pub fn run(&mut self, index: usize) -> Entry {
        if let Err(errno) = self.alive() {
            return Entry::Errno(errno);
        }
        let runnable = self.state == State::Runnable;
        let Some(vcpu) = self.vcpus.get_mut(index) else {
            return Entry::Errno(libc::EBADF);
        };
        if vcpu.init_received {
            return Entry::Errno(libc::EINVAL);
        }
        // A further vCPU is UNINITIALIZED until INIT_VCPU makes it runnable.
        if vcpu.rcx.is_none() && vcpu.id != 0 {
            return Entry::Blocks;
        }
        if vcpu.rcx.is_none() || !runnable {
            return Entry::Errno(libc::EINVAL);
        }
        vcpu.ran = true;
        Entry::Runs
    }
}
