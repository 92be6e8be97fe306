//! The commands as ioctls of a KVM VM and its vCPUs (Linux 7.2, arch/x86/include/uapi/asm/kvm.h). The only unsafe
//! code of this crate.
// UNSAFETY: raw ioctls whose arguments carry addresses.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use arch::kvm::vcpu::Vcpu;
use arch::kvm::vm::Vm;
use arch::x86::cpuid::{CpuidEntry, CpuidTable};

use crate::commands::{Capabilities, Command, InitVm, MemRegion, TdxCommands};
use crate::error::Refusal;

/// `KVM_MEMORY_ENCRYPT_OP`, whose argument is [`TdxCmd`] whatever size the number encodes.
const MEMORY_ENCRYPT_OP: libc::c_ulong = 0xc008_aeba;
const CAPABILITIES: u32 = 0;
const INIT_VM: u32 = 1;
const INIT_VCPU: u32 = 2;
const INIT_MEM_REGION: u32 = 3;
const FINALIZE_VM: u32 = 4;
const GET_CPUID: u32 = 5;
/// `KVM_TDX_MEASURE_MEMORY_REGION`.
const MEASURE: u32 = 1;

/// `struct kvm_tdx_cmd`.
#[repr(C)]
#[derive(Debug, Default)]
struct TdxCmd {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}
const _: () = assert!(size_of::<TdxCmd>() == 24 && std::mem::offset_of!(TdxCmd, hw_error) == 16);

/// `struct kvm_tdx_init_mem_region`.
#[repr(C)]
#[derive(Debug)]
struct InitMemRegion {
    source_addr: u64,
    gpa: u64,
    nr_pages: u64,
}
const _: () = assert!(size_of::<InitMemRegion>() == 24);

/// `struct kvm_tdx_capabilities` before its CPUID list, in words of 64 bits.
const CAPABILITIES_HEAD: usize = 256;
/// `struct kvm_tdx_init_vm` before its CPUID list, in words of 64 bits.
const INIT_VM_HEAD: usize = 32;
/// `struct kvm_cpuid_entry2` in words of 64 bits.
const ENTRY: usize = 5;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const SUBLEAF: u32 = 1;

/// Commands to a real VM.
#[derive(Debug)]
pub struct KvmTdx {
    vm: Arc<Vm>,
}

impl KvmTdx {
    /// Commands to `vm`, which is of the TDX type.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm }
    }

    fn vm(&self, command: Command, id: u32, data: *mut u64) -> Result<(), Refusal> {
        let cmd = TdxCmd {
            id,
            data: data as u64,
            ..TdxCmd::default()
        };
        issue(self.vm.as_fd(), command, cmd)
    }
}

/// Issues one command. `hw_error` goes in as zero, as the kernel demands, every time.
///
/// `cmd.data` must be what `cmd.id` calls for: a number, or the address of a structure that is alive and exclusively
/// borrowed by the caller for the call, with as many CPUID entries behind it as its `nent` says.
fn issue(fd: BorrowedFd<'_>, command: Command, mut cmd: TdxCmd) -> Result<(), Refusal> {
    // SAFETY:
    // - `cmd` is a live, initialised 24-byte `struct kvm_tdx_cmd`; the kernel reads and writes it during the call
    //   and keeps no pointer to it;
    // - what `cmd.data` points at is the caller's, as required above; the kernel uses it during the call only.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), MEMORY_ENCRYPT_OP, &raw mut cmd) };
    if rc == 0 {
        return Ok(());
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    Err(Refusal::new(command, errno, cmd.hw_error))
}

fn halves(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// The two halves of a word: low, high.
fn split(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// Room for `head` words and a `struct kvm_cpuid2` of `room` entries whose `nent` says so.
fn with_room(head: usize, room: usize) -> Vec<u64> {
    let words = room.saturating_mul(ENTRY).saturating_add(head).saturating_add(1);
    let mut buffer = vec![0; words];
    if let Some(nent) = buffer.get_mut(head) {
        *nent = room as u64;
    }
    buffer
}

/// The `struct kvm_cpuid2` that begins at word `head`.
///
/// The kernel sets no flags in its list of configurable leaves; the index always counts there.
fn read_configurable(buffer: &[u64], head: usize) -> CpuidTable {
    let mut table = read_table(buffer, head);
    for (entry, index) in table.0.iter_mut().zip(indices(buffer, head)) {
        entry.subleaf = Some(index);
    }
    table
}

/// The indices of all entries, whether they count or not.
fn indices(buffer: &[u64], head: usize) -> impl Iterator<Item = u32> {
    let firsts = buffer.iter().skip(head.saturating_add(1)).step_by(ENTRY);
    firsts.map(|word| split(*word).1)
}

/// The `struct kvm_cpuid2` that begins at word `head`.
fn read_table(buffer: &[u64], head: usize) -> CpuidTable {
    let count = buffer.get(head).map_or(0, |word| split(*word).0);
    let entries = buffer.get(head.saturating_add(1)..).unwrap_or_default();
    let entries = entries
        .chunks_exact(ENTRY)
        .take(usize::try_from(count).unwrap_or(0));
    CpuidTable(entries.filter_map(read_entry).collect())
}

fn read_entry(words: &[u64]) -> Option<CpuidEntry> {
    let [a, b, c, d, _] = words.first_chunk::<ENTRY>()?;
    let ((leaf, index), (flags, eax)) = (split(*a), split(*b));
    let ((ebx, ecx), (edx, _)) = (split(*c), split(*d));
    let subleaf = (flags & SUBLEAF != 0).then_some(index);
    Some(CpuidEntry::new(leaf, subleaf, [eax, ebx, ecx, edx]))
}

fn write_entry(entry: &CpuidEntry) -> [u64; ENTRY] {
    let flags = if entry.subleaf.is_some() { SUBLEAF } else { 0 };
    [
        halves(entry.leaf, entry.subleaf.unwrap_or(0)),
        halves(flags, entry.eax),
        halves(entry.ebx, entry.ecx),
        entry.edx.into(),
        0,
    ]
}

/// `struct kvm_tdx_init_vm` with its list.
fn encode_init(init: &InitVm) -> Vec<u64> {
    let ids = [&init.mrconfigid, &init.mrowner, &init.mrownerconfig];
    let ids = ids.into_iter().flat_map(|id| id.chunks_exact(8));
    let words = ids.filter_map(|word| word.first_chunk().map(|word| u64::from_ne_bytes(*word)));
    let mut buffer: Vec<u64> = [init.attributes, init.xfam].into_iter().chain(words).collect();
    buffer.resize(INIT_VM_HEAD, 0);
    buffer.push(init.cpuid.0.len() as u64);
    buffer.extend(init.cpuid.0.iter().flat_map(write_entry));
    buffer
}

impl TdxCommands for KvmTdx {
    type Vcpu = Vcpu;

    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal> {
        let mut buffer = with_room(CAPABILITIES_HEAD, room);
        self.vm(Command::Capabilities, CAPABILITIES, buffer.as_mut_ptr())?;
        let word = |at: usize| buffer.get(at).copied().unwrap_or(0);
        Ok(Capabilities {
            attributes: word(0),
            xfam: word(1),
            user_calls: word(3),
            cpuid: read_configurable(&buffer, CAPABILITIES_HEAD),
        })
    }

    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal> {
        let mut buffer = encode_init(init);
        self.vm(Command::InitVm, INIT_VM, buffer.as_mut_ptr())
    }

    fn get_cpuid(&mut self, vcpu: &mut Vcpu, room: usize) -> Result<CpuidTable, Refusal> {
        let mut buffer = with_room(0, room);
        let cmd = TdxCmd {
            id: GET_CPUID,
            data: buffer.as_mut_ptr() as u64,
            ..TdxCmd::default()
        };
        issue(vcpu.as_fd(), Command::GetCpuid, cmd)?;
        Ok(read_table(&buffer, 0))
    }

    fn set_cpuid(&mut self, vcpu: &mut Vcpu, table: &CpuidTable) -> Result<(), Refusal> {
        vcpu.set_cpuid(table)
            .map_err(|e| Refusal::new(Command::SetCpuid, e.raw_os_error().unwrap_or(libc::E2BIG), 0))
    }

    fn init_vcpu(&mut self, vcpu: &mut Vcpu, rcx: u64) -> Result<(), Refusal> {
        let cmd = TdxCmd {
            id: INIT_VCPU,
            data: rcx,
            ..TdxCmd::default()
        };
        issue(vcpu.as_fd(), Command::InitVcpu, cmd)
    }

    fn init_mem_region(&mut self, vcpu: &mut Vcpu, region: &mut MemRegion<'_>) -> Result<(), Refusal> {
        let pages = region.source.len() as u64;
        // The kernel only reads the `nr_pages` pages at `source_addr`, which outlive the call.
        let mut request = InitMemRegion {
            source_addr: region.source.as_ptr() as u64,
            gpa: region.gpa,
            nr_pages: pages,
        };
        let cmd = TdxCmd {
            id: INIT_MEM_REGION,
            flags: if region.measured { MEASURE } else { 0 },
            data: (&raw mut request) as u64,
            ..TdxCmd::default()
        };
        let answer = issue(vcpu.as_fd(), Command::InitMemRegion, cmd);
        region.advance(pages.saturating_sub(request.nr_pages));
        answer
    }

    fn finalize_vm(&mut self) -> Result<(), Refusal> {
        self.vm(Command::FinalizeVm, FINALIZE_VM, std::ptr::null_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_vm_has_the_kernels_layout() {
        let entry = CpuidEntry::new(0x8000_0008, None, [48 << 16, 1, 2, 3]);
        let init = InitVm {
            attributes: 1 << 28,
            xfam: 0x207,
            mrconfigid: [0x11; 48],
            mrowner: [0x22; 48],
            mrownerconfig: [0x33; 48],
            cpuid: CpuidTable(vec![
                entry,
                CpuidEntry {
                    subleaf: Some(7),
                    ..entry
                },
            ]),
        };
        let bytes: Vec<u8> = encode_init(&init)
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(bytes.len(), 256 + 8 + 2 * 40);
        for (at, value) in [
            (16, 0x11),
            (63, 0x11),
            (64, 0x22),
            (112, 0x33),
            (159, 0x33),
            (160, 0),
        ] {
            assert_eq!(bytes[at], value, "offset {at}");
        }
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let fields = [
            (0, 1 << 28),
            (8, 0x207),
            (256, 2),
            (264, 0x8000_0008),
            (268, 0),
            (272, 0),
            (276, 48 << 16),
        ];
        for (at, value) in fields
            .into_iter()
            .chain([(280, 1), (284, 2), (288, 3), (308, 7), (312, 1)])
        {
            assert_eq!(word(at), value, "offset {at}");
        }
        assert_eq!(read_table(&encode_init(&init), INIT_VM_HEAD), init.cpuid);
    }

    #[test]
    fn room_is_what_the_kernel_is_told() {
        let buffer = with_room(CAPABILITIES_HEAD, 3);
        assert_eq!(buffer.len() * 8, 2048 + 8 + 3 * 40);
        assert_eq!(buffer[256], 3);
        let mut lies = with_room(0, 2);
        lies[0] = u64::MAX;
        assert_eq!(read_table(&lies, 0).0.len(), 2);
    }

    #[test]
    fn sub_leaves_count_in_the_list_of_configurable_leaves_without_their_flag() {
        let mut buffer = with_room(0, 2);
        buffer[1] = halves(7, 1);
        buffer[6] = halves(0x1f, 2);
        let of = |table: CpuidTable| -> Vec<_> { table.0.iter().map(|e| (e.leaf, e.subleaf)).collect() };
        assert_eq!(of(read_configurable(&buffer, 0)), [(7, Some(1)), (0x1f, Some(2))]);
        assert_eq!(of(read_table(&buffer, 0)), [(7, None), (0x1f, None)]);
    }
}
