//! `KVM_MEMORY_ENCRYPT_OP` of a TD, between the program's memory and the model.

use std::ops::Range;

use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use tdx::commands::InitVm;
use tdx::model::{Model, RawCmd, RawInit, RawRegion};

use crate::call::Call;
use crate::vm::Vm;

/// `struct kvm_cpuid_entry2`.
const ENTRY: usize = 40;
const SUBLEAF: u32 = 1;
/// `struct kvm_tdx_capabilities` and `kvm_tdx_init_vm` before their lists.
const CAPABILITIES_HEAD: u64 = 2048;
const INIT_VM_HEAD: u64 = 256;
/// What follows a list's head.
const LIST: u64 = 8;
/// `nent` may be anything.
const ENTRIES_MAX: usize = 257;

/// `struct kvm_tdx_cmd`.
#[derive(Clone, Copy, Debug)]
struct Cmd {
    at: u64,
    id: u32,
    data: u64,
    raw: RawCmd,
}

impl Cmd {
    fn read(call: &Call<'_>) -> Result<Self, i32> {
        let at = call.args()[2];
        Ok(Self {
            at,
            id: call.u32(at)?,
            data: call.u64(at + 8)?,
            raw: RawCmd {
                flags: call.u32(at + 4)?,
                hw_error: call.u64(at + 16)?,
            },
        })
    }
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    std::array::from_fn(|n| u32::from_ne_bytes(bytes[4 * n..4 * n + 4].try_into().expect("four bytes")))
}

/// The `struct kvm_cpuid2` at `at`.
pub(crate) fn read_table(call: &Call<'_>, at: u64) -> Result<CpuidTable, i32> {
    let count = (call.u32(at)? as usize).min(ENTRIES_MAX);
    let bytes = call.vector(at + LIST, count * ENTRY);
    if bytes.len() != count * ENTRY {
        return Err(libc::EFAULT);
    }
    let entry = |bytes: &[u8]| {
        let [leaf, index, flags, eax, ebx, ecx, edx] = words(bytes);
        let subleaf = (flags & SUBLEAF != 0).then_some(index);
        CpuidEntry::new(leaf, subleaf, [eax, ebx, ecx, edx])
    };
    Ok(CpuidTable(bytes.chunks_exact(ENTRY).map(entry).collect()))
}

/// Writes `table` behind the head of the list at `at`, and its length.
pub(crate) fn write_table(call: &Call<'_>, at: u64, table: &CpuidTable) -> Result<(), i32> {
    let mut bytes = u32::try_from(table.0.len()).unwrap_or(0).to_ne_bytes().to_vec();
    bytes.extend([0; 4]);
    for e in &table.0 {
        let flags = if e.subleaf.is_some() { SUBLEAF } else { 0 };
        let words = [
            e.leaf,
            e.subleaf.unwrap_or(0),
            flags,
            e.eax,
            e.ebx,
            e.ecx,
            e.edx,
            0,
            0,
            0,
        ];
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }
    call.write(at, &bytes)
}

/// A command on the VM; what it was, and the errno.
pub(crate) fn on_vm(model: &mut Model, call: &Call<'_>) -> (String, Result<(), i32>) {
    let cmd = match Cmd::read(call) {
        Ok(cmd) => cmd,
        Err(errno) => return ("?".into(), Err(errno)),
    };
    let (name, answer) = match cmd.id {
        0 => ("CAPABILITIES".into(), capabilities(model, call, cmd)),
        1 => match read_init(call, cmd.data) {
            Ok(raw) => (words_of(&raw), model.raw_init_vm(cmd.raw, &raw)),
            Err(errno) => ("INIT_VM".into(), Err((errno, 0))),
        },
        4 => ("FINALIZE_VM".into(), model.raw_finalize(cmd.raw)),
        other => (format!("command {other}"), model.raw_unknown(cmd.raw)),
    };
    let status = answer.err().map_or(cmd.raw.hw_error, |(_, status)| status);
    // Copied back whether it succeeded or not; a VM that is dead, or none, is refused before.
    let written = call.write(cmd.at + 16, &status.to_ne_bytes());
    (name, answer.map_err(|(errno, _)| errno).and(written))
}

fn words_of(raw: &RawInit) -> String {
    let init = &raw.init;
    let (attributes, xfam, entries) = (init.attributes, init.xfam, init.cpuid.0.len());
    format!("INIT_VM attributes {attributes:#x} xfam {xfam:#x} cpuid {entries}")
}

fn capabilities(model: &Model, call: &Call<'_>, cmd: Cmd) -> Result<(), (i32, u64)> {
    let fault = |errno| (errno, 0);
    let room = call.u32(cmd.data + CAPABILITIES_HEAD).map_err(fault)?;
    let offered = model.raw_capabilities(cmd.raw, room as usize)?;
    let mut head = vec![0; CAPABILITIES_HEAD as usize];
    for (word, value) in [
        (0, offered.attributes),
        (1, offered.xfam),
        (3, offered.user_calls),
    ] {
        head[8 * word..8 * word + 8].copy_from_slice(&value.to_ne_bytes());
    }
    call.write(cmd.data, &head).map_err(fault)?;
    write_table(call, cmd.data + CAPABILITIES_HEAD, &offered.cpuid).map_err(fault)
}

fn read_init(call: &Call<'_>, at: u64) -> Result<RawInit, i32> {
    let reserved = call.vector(at + 160, 96);
    let list = at + INIT_VM_HEAD;
    Ok(RawInit {
        init: InitVm {
            attributes: call.u64(at)?,
            xfam: call.u64(at + 8)?,
            mrconfigid: call.bytes(at + 16)?,
            mrowner: call.bytes(at + 64)?,
            mrownerconfig: call.bytes(at + 112)?,
            cpuid: read_table(call, list)?,
        },
        reserved: reserved.iter().any(|byte| *byte != 0),
        padding: call.u32(list + 4)?,
    })
}

/// A command on vCPU `index`.
pub(crate) fn on_vcpu(
    model: &mut Model,
    vm: &Vm,
    index: usize,
    call: &Call<'_>,
) -> (String, Result<(), i32>) {
    let cmd = match Cmd::read(call) {
        Ok(cmd) => cmd,
        Err(errno) => return ("?".into(), Err(errno)),
    };
    match cmd.id {
        2 => {
            let answer = model.raw_init_vcpu(index, cmd.raw, cmd.data);
            (format!("INIT_VCPU {index} rcx {:#x}", cmd.data), answer)
        }
        3 => region(model, vm, index, call, cmd),
        5 => (format!("GET_CPUID {index}"), get_cpuid(model, index, call, cmd)),
        other => (format!("command {other}"), Err(libc::EINVAL)),
    }
}

fn get_cpuid(model: &Model, index: usize, call: &Call<'_>, cmd: Cmd) -> Result<(), i32> {
    let room = call.u32(cmd.data)? as usize;
    match model.raw_get_cpuid(index, cmd.raw, room) {
        Ok(table) => write_table(call, cmd.data, &table),
        Err((errno, entries)) => {
            call.write(
                cmd.data,
                &u32::try_from(entries).unwrap_or(u32::MAX).to_ne_bytes(),
            )?;
            Err(errno)
        }
    }
}

fn region(model: &mut Model, vm: &Vm, index: usize, call: &Call<'_>, cmd: Cmd) -> (String, Result<(), i32>) {
    let fields = [0, 8, 16].map(|at| call.u64(cmd.data + at));
    let [Ok(source_addr), Ok(gpa), Ok(nr_pages)] = fields else {
        return ("INIT_MEM_REGION".into(), Err(libc::EFAULT));
    };
    let name = format!(
        "INIT_MEM_REGION {gpa:#x} pages {nr_pages} flags {}",
        cmd.raw.flags
    );
    let bytes = usize::try_from(nr_pages.saturating_mul(4096)).unwrap_or(usize::MAX);
    // More than any program under test asks for in one go.
    let source = call.vector(source_addr, bytes.min(256 << 20));
    let mut raw = RawRegion {
        source_addr,
        gpa,
        nr_pages,
        source: &source,
    };
    let answer = model.raw_init_mem_region(index, cmd.raw, &mut raw);
    let done = gpa..raw.gpa;
    let advanced = [raw.source_addr, raw.gpa, raw.nr_pages]
        .map(u64::to_ne_bytes)
        .concat();
    let written = call
        .write(cmd.data, &advanced)
        .and_then(|()| place(vm, call, done, &source));
    (name, answer.and(written))
}

/// Shows the guest what was added: an ordinary VM has one memory for both sides.
pub(crate) fn place(vm: &Vm, call: &Call<'_>, gpas: Range<u64>, source: &[u8]) -> Result<(), i32> {
    for (gpa, page) in gpas.step_by(4096).zip(source.chunks(4096)) {
        let hva = vm.hva(gpa).ok_or(libc::EFAULT)?;
        call.write(hva, page)?;
    }
    Ok(())
}
