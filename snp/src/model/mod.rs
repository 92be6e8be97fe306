//! KVM's SNP interface and the security processor behind it, as a model: the same answers, errno for errno, to what
//! a VMM does right or wrong (Linux 7.2, arch/x86/kvm/svm/sev.c and virt/kvm/guest_memfd.c, by function). For tests
//! only; it protects nothing and needs no hardware. Nothing here is called by a launch on a real host.

mod exits;
mod firmware;
mod vcpu;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use arch::addr::PAGE_SIZE;

use crate::commands::{Command, Identity, SevCommands};
use crate::error::Refusal;
use crate::measure::{Measurement, PAGE, PageType};
use crate::policy::Policy;

pub use exits::{Access, CertExit, CertOutcome, Psc, PscEntry, PscOperation, Step};
pub use firmware::{CpuidRule, Firmware};
pub use vcpu::{Entry, MpState, Vcpu, VcpuIoctl};

const SECURE_TSC: u64 = 1 << 9;
/// Types that a VMM may name in SNP_LAUNCH_UPDATE.
const UPDATE_TYPES: [u8; 5] = [1, 3, 4, 5, 6];

/// What the kernel on this host has.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// kvm_amd was loaded with SEV.
    pub sev: bool,
    /// ASIDs left for SNP guests; `None` if the range is empty.
    pub asids: Option<u32>,
    /// `KVM_X86_SEV_VMSA_FEATURES`.
    pub vmsa_features: u64,
    /// `KVM_X86_SNP_POLICY_BITS`.
    pub policy_bits: u64,
    /// `KVM_X86_SEV_SNP_REQ_CERTS`; absent on older kernels.
    pub req_certs: Option<bool>,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            sev: true,
            asids: Some(1),
            vmsa_features: 1 << 5 | SECURE_TSC,
            policy_bits: 0x1b_ffff,
            req_certs: Some(true),
        }
    }
}

impl Kernel {
    /// `KVM_GET_DEVICE_ATTR` on `/dev/kvm` (`sev_dev_get_attr`).
    ///
    /// # Errors
    /// `ENXIO` for groups and attributes that do not exist.
    pub fn attribute(&self, group: u32, attribute: u64) -> Result<u64, i32> {
        match (group, attribute) {
            (1, 0) => Ok(self.vmsa_features),
            (1, 1) => Ok(self.policy_bits),
            (1, 2) => self.req_certs.map(u64::from).ok_or(libc::ENXIO),
            _ => Err(libc::ENXIO),
        }
    }
}

/// `struct kvm_sev_init`.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct RawInit {
    pub vmsa_features: u64,
    pub flags: u32,
    pub ghcb_version: u16,
}

/// `struct kvm_sev_snp_launch_update`, with the memory that `uaddr` points to.
#[derive(Debug)]
#[expect(missing_docs, reason = "the kernel's names")]
pub struct RawUpdate<'a> {
    pub gfn_start: u64,
    pub uaddr: u64,
    pub len: u64,
    pub kind: u8,
    pub flags: u16,
    /// `None`: nothing is mapped at `uaddr`.
    pub source: Option<&'a mut [u8]>,
    /// The mapping can be written.
    pub writable: bool,
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
    /// The security processor.
    pub firmware: Firmware,
    /// vCPUs by index.
    pub vcpus: Vec<Vcpu>,
    /// This many launch commands find a signal pending.
    pub signals: u32,
    /// `sev_fd` names an open `/dev/sev`.
    pub sev_fd_open: bool,
    vm_type: u64,
    features: Option<u64>,
    req_certs: bool,
    /// A guest context exists.
    context: bool,
    slots: Vec<Slot>,
    private: BTreeSet<u64>,
    /// Pages that the guest owns, by frame.
    assigned: BTreeMap<u64, PageType>,
}

/// Errno and firmware status.
type Answer = Result<(), (i32, u32)>;

impl Model {
    /// A VM of `vm_type` (2 SEV, 3 SEV-ES, 4 SNP) on a host that has everything.
    pub fn new(vm_type: u64) -> Self {
        Self {
            kernel: Kernel::default(),
            firmware: Firmware::default(),
            vcpus: Vec::new(),
            signals: 0,
            sev_fd_open: true,
            vm_type,
            features: None,
            req_certs: false,
            context: false,
            slots: Vec::new(),
            private: BTreeSet::new(),
            assigned: BTreeMap::new(),
        }
    }

    /// Adds a memory slot.
    pub fn slot(&mut self, frames: Range<u64>, gmem: bool) {
        self.slots.push(Slot { frames, gmem });
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`, PRIVATE.
    pub fn set_private(&mut self, frames: Range<u64>) {
        self.private.extend(frames);
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES` without PRIVATE.
    pub fn set_shared(&mut self, frames: Range<u64>) {
        self.private.retain(|gfn| !frames.contains(gfn));
    }

    /// `fallocate` punches holes into the file behind private frames: they are the guest's no longer
    /// (`sev_gmem_invalidate`).
    pub fn punch(&mut self, frames: Range<u64>) {
        self.assigned.retain(|gfn, _| !frames.contains(gfn));
    }

    /// The frame is the guest's, validated or not.
    pub fn is_assigned(&self, gfn: u64) -> bool {
        self.assigned.contains_key(&gfn)
    }

    /// Removes the slots that lie in `frames`; what guest_memfd holds stays.
    pub fn remove_slots(&mut self, frames: &Range<u64>) {
        self.slots
            .retain(|slot| slot.frames.start < frames.start || slot.frames.end > frames.end);
    }

    /// The digest that firmware holds.
    pub fn digest(&self) -> Measurement {
        self.firmware.digest()
    }

    /// True once extended report requests exit.
    pub fn requests_certificates(&self) -> bool {
        self.req_certs
    }

    /// `KVM_MEMORY_ENCRYPT_OP` with a null argument (`sev_mem_enc_ioctl`).
    ///
    /// # Errors
    /// `ENOTTY` without SEV.
    pub fn probe(&self) -> Result<(), i32> {
        if self.kernel.sev {
            Ok(())
        } else {
            Err(libc::ENOTTY)
        }
    }

    /// What `sev_mem_enc_ioctl` checks before it looks at the command.
    fn enter(&self, id: u32) -> Answer {
        if !self.kernel.sev {
            return Err((libc::ENOTTY, 0));
        }
        if self.is_snp() && id < 100 {
            return Err((libc::EPERM, 0));
        }
        Ok(())
    }

    fn is_snp(&self) -> bool {
        self.vm_type == 4 && self.features.is_some()
    }

    fn signal(&mut self) -> bool {
        let pending = self.signals != 0;
        self.signals = self.signals.saturating_sub(1);
        pending
    }

    /// KVM_SEV_INIT2 (`sev_guest_init2`, `__sev_guest_init`).
    ///
    /// # Errors
    /// Errno and firmware status.
    pub fn raw_init2(&mut self, init: RawInit) -> Answer {
        self.enter(22)?;
        let snp = self.vm_type == 4;
        let known = if snp {
            self.kernel.vmsa_features
        } else {
            self.kernel.vmsa_features & !SECURE_TSC
        };
        let refused = !matches!(self.vm_type, 2..=4)
            || self.features.is_some()
            || !self.vcpus.is_empty()
            || init.flags != 0
            || init.vmsa_features & !known != 0
            || init.ghcb_version > 2
            || snp && init.ghcb_version == 1;
        if refused {
            return Err((libc::EINVAL, 0));
        }
        self.kernel.asids = match self.kernel.asids {
            None => return Err((libc::ENOTTY, 0)),
            Some(left) => Some(left.checked_sub(1).ok_or((libc::EBUSY, 0))?),
        };
        self.features = Some(init.vmsa_features | u64::from(snp));
        Ok(())
    }

    /// KVM_SEV_SNP_LAUNCH_START (`snp_launch_start`).
    ///
    /// # Errors
    /// Errno and firmware status.
    pub fn raw_start(&mut self, policy: u64, flags: u16) -> Answer {
        self.enter(100)?;
        if !self.is_snp() {
            return Err((libc::ENOTTY, 0));
        }
        let refused = policy & !self.kernel.policy_bits != 0 || policy >> 17 & 1 == 0;
        if self.context || flags != 0 || refused {
            return Err((libc::EINVAL, 0));
        }
        if !self.sev_fd_open {
            // The context cannot be created, and that is all the caller learns.
            return Err((libc::ENOTTY, 0));
        }
        self.firmware
            .start(policy)
            .map_err(|status| (libc::EIO, status))?;
        self.context = true;
        Ok(())
    }

    /// KVM_SEV_SNP_LAUNCH_UPDATE (`snp_launch_update`, `kvm_gmem_populate`); advances `update`.
    ///
    /// # Errors
    /// Errno and firmware status; nothing was added.
    pub fn raw_update(&mut self, update: &mut RawUpdate<'_>) -> Answer {
        self.enter(101)?;
        let zero = update.kind == PageType::Zero as u8;
        let page = PAGE_SIZE;
        let malformed = update.len == 0
            || !update.len.is_multiple_of(page)
            || update.flags != 0
            || !UPDATE_TYPES.contains(&update.kind)
            || !zero && !update.uaddr.is_multiple_of(page);
        let slot = self
            .slots
            .iter()
            .find(|s| s.gmem && s.frames.contains(&update.gfn_start));
        let (true, false, Some(slot)) = (self.context && self.is_snp(), malformed, slot) else {
            return Err((libc::EINVAL, 0));
        };
        // Cut to the slot, whatever was asked for.
        let pages = (update.len / PAGE_SIZE).min(slot.frames.end.saturating_sub(update.gfn_start));
        for done in 0..pages {
            let signalled = self.signal();
            let added = if signalled { Err(0) } else { self.populate(update) };
            match added {
                Ok(()) => {}
                Err(status) if done == 0 => return Err((libc::EIO, status)),
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    /// Adds the next page and advances `update` (`sev_gmem_post_populate`); the error is firmware's status.
    fn populate(&mut self, update: &mut RawUpdate<'_>) -> Result<(), u32> {
        let gfn = update.gfn_start;
        let kind = match update.kind {
            1 => PageType::Normal,
            3 => PageType::Zero,
            4 => PageType::Unmeasured,
            5 => PageType::Secrets,
            _ => PageType::Cpuid,
        };
        if !self.private.contains(&gfn) || self.assigned.contains_key(&gfn) || !self.sev_fd_open {
            return Err(0);
        }
        let source = update.source.take();
        let (page, rest) = match source {
            _ if kind == PageType::Zero => (None, None),
            Some(bytes) if update.uaddr != 0 && (update.writable || kind != PageType::Cpuid) => {
                let (page, rest) = bytes.split_first_chunk_mut::<PAGE>().ok_or(0_u32)?;
                (Some(page), Some(rest))
            }
            _ => return Err(0),
        };
        let added = self.firmware.update(kind, gfn, page);
        if added.is_ok() {
            update.source = rest;
            update.gfn_start = gfn.saturating_add(1);
            update.uaddr = if kind == PageType::Zero {
                update.uaddr
            } else {
                update.uaddr.saturating_add(PAGE_SIZE)
            };
            update.len = update.len.saturating_sub(PAGE_SIZE);
            self.assigned.insert(gfn, kind);
        }
        added
    }

    /// KVM_SEV_SNP_LAUNCH_FINISH (`snp_launch_finish`, `snp_launch_update_vmsa`).
    ///
    /// # Errors
    /// Errno and firmware status; vCPUs may be encrypted already.
    pub fn raw_finish(&mut self, identity: &Identity, flags: u16) -> Answer {
        self.enter(102)?;
        if !self.is_snp() {
            return Err((libc::ENOTTY, 0));
        }
        if !self.context || flags != 0 {
            return Err((libc::EINVAL, 0));
        }
        // `kvm_lock_all_vcpus` waits for a vCPU that runs; a model cannot, so the waiter is killed.
        if self.vcpus.iter().any(|v| v.running) {
            return Err((libc::EINTR, 0));
        }
        let features = self.features.unwrap_or(0);
        for vcpu in &mut self.vcpus {
            let vmsa = vcpu.sync_vmsa(features).map_err(|errno| (errno, 0))?;
            self.firmware.vmsa(&vmsa);
            vcpu.protected = true;
        }
        self.firmware
            .finish(identity)
            .map_err(|status| (libc::EIO, status))
    }
}

fn refusal(command: Command) -> impl FnOnce((i32, u32)) -> Refusal {
    move |(errno, firmware)| Refusal::new(command, errno, firmware)
}

impl SevCommands for Model {
    fn init2(&mut self, vmsa_features: u64) -> Result<(), Refusal> {
        let init = RawInit {
            vmsa_features,
            flags: 0,
            ghcb_version: 2,
        };
        self.raw_init2(init).map_err(refusal(Command::Init2))
    }

    /// `snp_enable_certs`.
    fn enable_req_certs(&mut self) -> Result<(), Refusal> {
        let answer = self.enter(103).and_then(|()| {
            let allowed = self.is_snp() && self.vcpus.is_empty() && self.kernel.req_certs == Some(true);
            if allowed { Ok(()) } else { Err((libc::EINVAL, 0)) }
        });
        self.req_certs = answer.is_ok();
        answer.map_err(refusal(Command::EnableReqCerts))
    }

    fn launch_start(&mut self, policy: Policy) -> Result<(), Refusal> {
        self.raw_start(policy.bits(), 0).map_err(refusal(Command::Start))
    }

    fn launch_update(
        &mut self,
        kind: PageType,
        gfn: u64,
        pages: u64,
        source: &mut [u8],
    ) -> Result<u64, Refusal> {
        let mut update = RawUpdate {
            gfn_start: gfn,
            uaddr: source.as_ptr() as u64,
            len: pages.saturating_mul(PAGE_SIZE),
            kind: kind as u8,
            flags: 0,
            source: Some(source),
            writable: true,
        };
        self.raw_update(&mut update).map_err(refusal(Command::Update))?;
        Ok(update.gfn_start.saturating_sub(gfn))
    }

    fn launch_finish(&mut self, identity: &Identity) -> Result<(), Refusal> {
        self.raw_finish(identity, 0).map_err(refusal(Command::Finish))
    }
}

#[cfg(test)]
pub(crate) mod tests;
