//! The launch commands as ioctls of a KVM VM (Linux 7.2, arch/x86/include/uapi/asm/kvm.h), and the platform status
//! from `/dev/sev` (include/uapi/linux/psp-sev.h). The only unsafe code of this crate.
// UNSAFETY: raw ioctls whose arguments carry addresses.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use arch::kvm::vm::Vm;

use crate::bytes::put;
use crate::commands::{Command, Identity, SevCommands};
use crate::error::Refusal;
use crate::measure::PageType;
use crate::policy::Policy;

/// `KVM_MEMORY_ENCRYPT_OP`, whose argument is [`SevCmd`] whatever size the number encodes.
const MEMORY_ENCRYPT_OP: libc::c_ulong = 0xc008_aeba;
const INIT2: u32 = 22;
const LAUNCH_START: u32 = 100;
const LAUNCH_UPDATE: u32 = 101;
const LAUNCH_FINISH: u32 = 102;
const ENABLE_REQ_CERTS: u32 = 103;
/// GHCB protocol 2: the only one that SNP guests speak.
const GHCB_VERSION: u16 = 2;
/// `SEV_ISSUE_CMD` on `/dev/sev`.
const SEV_ISSUE_CMD: libc::c_ulong = 0xc010_5300;
const SNP_PLATFORM_STATUS: u32 = 9;

/// `struct kvm_sev_cmd`.
#[repr(C)]
#[derive(Debug, Default)]
struct SevCmd {
    id: u32,
    pad0: u32,
    data: u64,
    error: u32,
    sev_fd: u32,
}
const _: () = assert!(size_of::<SevCmd>() == 24 && std::mem::offset_of!(SevCmd, error) == 16);

/// `struct kvm_sev_init`.
#[repr(C)]
#[derive(Debug, Default)]
struct SevInit {
    vmsa_features: u64,
    flags: u32,
    ghcb_version: u16,
    pad1: u16,
    pad2: [u32; 8],
}
const _: () = assert!(size_of::<SevInit>() == 48 && std::mem::offset_of!(SevInit, ghcb_version) == 12);

/// `struct kvm_sev_snp_launch_start`.
#[repr(C)]
#[derive(Debug, Default)]
struct LaunchStart {
    policy: u64,
    gosvw: [u8; 16],
    flags: u16,
    pad0: [u8; 6],
    pad1: [u64; 4],
}
const _: () = assert!(size_of::<LaunchStart>() == 64 && std::mem::offset_of!(LaunchStart, flags) == 24);

/// `struct kvm_sev_snp_launch_update`.
#[repr(C)]
#[derive(Debug, Default)]
struct LaunchUpdate {
    gfn_start: u64,
    uaddr: u64,
    len: u64,
    kind: u8,
    pad0: u8,
    flags: u16,
    pad1: u32,
    pad2: [u64; 4],
}
const _: () = assert!(size_of::<LaunchUpdate>() == 64 && std::mem::offset_of!(LaunchUpdate, flags) == 26);

/// `struct kvm_sev_snp_launch_finish`.
#[repr(C)]
#[derive(Debug, Default)]
struct LaunchFinish {
    id_block_uaddr: u64,
    id_auth_uaddr: u64,
    id_block_en: u8,
    auth_key_en: u8,
    vcek_disabled: u8,
    host_data: [u8; 32],
    pad0: [u8; 3],
    flags: u16,
    pad1: [u64; 4],
}
const _: () = assert!(size_of::<LaunchFinish>() == 88);
const _: () = assert!(std::mem::offset_of!(LaunchFinish, vcek_disabled) == 18);
const _: () = assert!(std::mem::offset_of!(LaunchFinish, host_data) == 19);
const _: () = assert!(std::mem::offset_of!(LaunchFinish, flags) == 54);

/// Commands to a real VM.
#[derive(Debug)]
pub struct KvmSev {
    vm: Arc<Vm>,
    /// KVM remembers the number of this descriptor and uses it for the VM's whole life.
    sev: Arc<File>,
}

impl KvmSev {
    /// Commands to `vm` by way of the open `/dev/sev`, which must stay open under the same number for as long as
    /// the VM lives.
    pub fn new(vm: Arc<Vm>, sev: Arc<File>) -> Self {
        Self { vm, sev }
    }

    /// Issues one command with argument `data`, which the kernel may write.
    fn issue<T>(&mut self, command: Command, id: u32, data: &mut T) -> Result<(), Refusal> {
        let data = (&raw mut *data) as u64;
        let sev_fd = u32::try_from(self.sev.as_raw_fd()).unwrap_or(u32::MAX);
        // KVM leaves `error` alone on success and on some errors, hence zero.
        let mut cmd = SevCmd {
            id,
            data,
            sev_fd,
            ..SevCmd::default()
        };
        // SAFETY:
        // - `cmd` is a live, initialised 24-byte `struct kvm_sev_cmd`; the kernel reads and writes it during the
        //   call and keeps no pointer to it;
        // - `cmd.data` points at the caller's argument struct of the layout that `id` calls for (sizes asserted
        //   above), exclusively borrowed for the call. Addresses inside it are the callers' matter.
        // A wrong descriptor is not a safety matter: the kernel answers ENOTTY.
        let rc = unsafe { libc::ioctl(self.vm.as_fd().as_raw_fd(), MEMORY_ENCRYPT_OP, &raw mut cmd) };
        if rc == 0 {
            return Ok(());
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Err(Refusal::new(command, errno, cmd.error))
    }
}

impl SevCommands for KvmSev {
    fn init2(&mut self, vmsa_features: u64) -> Result<(), Refusal> {
        let mut init = SevInit {
            vmsa_features,
            ghcb_version: GHCB_VERSION,
            ..SevInit::default()
        };
        self.issue(Command::Init2, INIT2, &mut init)
    }

    fn enable_req_certs(&mut self) -> Result<(), Refusal> {
        self.issue(Command::EnableReqCerts, ENABLE_REQ_CERTS, &mut [0_u64; 0])
    }

    fn launch_start(&mut self, policy: Policy) -> Result<(), Refusal> {
        let mut start = LaunchStart {
            policy: policy.bits(),
            ..LaunchStart::default()
        };
        self.issue(Command::Start, LAUNCH_START, &mut start)
    }

    fn launch_update(
        &mut self,
        kind: PageType,
        gfn: u64,
        pages: u64,
        source: &mut [u8],
    ) -> Result<u64, Refusal> {
        let len = pages.saturating_mul(4096);
        // The kernel reads (and for CPUID pages writes) `len` bytes at `uaddr`: never more than there are.
        if kind != PageType::Zero && (source.len() as u64) < len {
            return Err(Refusal::new(Command::Update, libc::EFAULT, 0));
        }
        let uaddr = if kind == PageType::Zero {
            0
        } else {
            source.as_mut_ptr() as u64
        };
        let mut update = LaunchUpdate {
            gfn_start: gfn,
            uaddr,
            len,
            kind: kind as u8,
            ..LaunchUpdate::default()
        };
        self.issue(Command::Update, LAUNCH_UPDATE, &mut update)?;
        Ok(update.gfn_start.saturating_sub(gfn))
    }

    fn launch_finish(&mut self, identity: &Identity) -> Result<(), Refusal> {
        let mut finish = LaunchFinish {
            host_data: identity.host_data,
            vcek_disabled: identity.vcek_disabled.into(),
            ..LaunchFinish::default()
        };
        // Both live until after the command; the kernel copies 96 and 4096 bytes from them.
        let block = identity
            .id_block
            .as_ref()
            .map(|(block, auth)| (block.to_bytes(), auth));
        if let Some((block, auth)) = &block {
            finish.id_block_uaddr = block.as_ptr() as u64;
            finish.id_auth_uaddr = auth.bytes().as_ptr() as u64;
            finish.id_block_en = 1;
            finish.auth_key_en = auth.has_author_key().into();
        }
        self.issue(Command::Finish, LAUNCH_FINISH, &mut finish)
    }
}

/// `struct sev_user_data_snp_status`, 32 packed bytes.
pub(crate) const STATUS_LEN: usize = 32;

/// `SNP_PLATFORM_STATUS`, raw.
pub(crate) fn platform_status(sev: &File) -> Result<[u8; STATUS_LEN], Refusal> {
    let mut status = [0; STATUS_LEN];
    // `struct sev_issue_cmd` is packed: u32 cmd, u64 data, u32 error.
    let mut issue = [0_u8; 16];
    put(&mut issue, 0, &SNP_PLATFORM_STATUS.to_ne_bytes());
    put(&mut issue, 4, &(status.as_mut_ptr() as u64).to_ne_bytes());
    // SAFETY:
    // - `issue` is a live 16-byte array with the layout of `struct sev_issue_cmd`; the kernel reads and writes it
    //   during the call only;
    // - its `data` points at `status`, 32 live bytes that this command fills and nothing else refers to.
    let rc = unsafe { libc::ioctl(sev.as_raw_fd(), SEV_ISSUE_CMD, issue.as_mut_ptr()) };
    if rc == 0 {
        return Ok(status);
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    let firmware = crate::bytes::le32(&issue, 12).unwrap_or(0);
    Err(Refusal::new(Command::PlatformStatus, errno, firmware))
}
