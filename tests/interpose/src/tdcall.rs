//! The TDX module as a TD's vCPU meets it by TDCALL, and KVM behind it by TDG.VP.VMCALL. On the ordinary VM an OUT
//! stands where the shim has a TDCALL; it ends here, and the program sees what KVM would have made of it.

use std::collections::BTreeSet;
use std::io;

use sha2::{Digest, Sha384};
use tdx::model::{Call, Completion, Model, TdxExit};

use crate::state::{self, REGS, Reg, reg, set_reg};
use crate::tables::{CPUID_OUT, CPUID_PORT, OUT, TDCALL_PORT};
use crate::trace::Program;
use crate::vm::Vm;

/// TDG.VP.VMCALL.
const VMCALL: u64 = 0;
/// TDG.VP.INFO.
pub const INFO: u64 = 1;
/// TDG.MR.RTMR.EXTEND.
pub const RTMR_EXTEND: u64 = 2;
/// TDG.MEM.PAGE.ACCEPT.
pub const PAGE_ACCEPT: u64 = 6;
/// Status codes.
const OPERAND_INVALID: u64 = 0xc000_0100_0000_0000;
const ALREADY_ACCEPTED: u64 = 0x0000_0b0a_0000_0000;
const SIZE_MISMATCH: u64 = 0xc000_0b0b_0000_0000;
/// Functions of VMCALL.
const CALL_IO: u64 = 30;
const CALL_MAP_GPA: u64 = 0x1_0001;
const CALL_GET_QUOTE: u64 = 0x1_0002;
const CALL_INFO: u64 = 0x1_0000;
const CALL_FATAL: u64 = 0x1_0003;
const CALL_NOTIFY: u64 = 0x1_0004;
/// `struct kvm_run`.
const EXIT_IO: u32 = 2;
const EXIT_HYPERCALL: u32 = 3;
const EXIT_SYSTEM_EVENT: u32 = 24;
const EXIT_TDX: u32 = 40;
const DATA_OFFSET: u64 = 40;

/// What follows an exit that user space serves, when the vCPU is entered again.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Waiting {
    /// A port was written.
    Out,
    /// A port was read: this many bytes.
    In(usize),
    /// Where `hypercall.ret` or the status of a TDX exit lies.
    Ret(u64),
}

/// What a stop of the vCPU was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Nothing of this kind.
    Other,
    /// The vCPU can go on at once.
    Again,
    /// The program has something to do.
    Exit,
}

/// A TDCALL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdCall {
    /// Index of the vCPU.
    pub vcpu: usize,
    /// RAX.
    pub leaf: u64,
    /// RCX.
    pub rcx: u64,
}

/// One TD as its module knows it.
#[derive(Debug)]
pub(crate) struct Td {
    accepted: BTreeSet<u64>,
    pub(crate) rtmrs: [[u8; 48]; 4],
    /// TDCALLs in order.
    pub(crate) calls: Vec<TdCall>,
}

/// Where a vCPU has stopped.
#[derive(Debug)]
pub(crate) struct Stop<'a> {
    pub(crate) program: &'a Program,
    pub(crate) vm: &'a Vm,
    /// The program's `struct kvm_run`.
    pub(crate) page: u64,
    pub(crate) vcpu: usize,
    pub(crate) vcpus: usize,
}

impl Stop<'_> {
    fn word(&self, at: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.program.read(self.page + at, &mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn long(&self, at: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.program.read(self.page + at, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.program.write(self.page + at, bytes)
    }

    fn regs(&self) -> io::Result<[u8; REGS]> {
        let mut regs = [0; REGS];
        self.program.read(self.page + state::SYNC_REGS, &mut regs)?;
        Ok(regs)
    }

    /// Lets the vCPU go on with these registers.
    fn set_regs(&self, regs: &[u8; REGS]) -> io::Result<()> {
        self.put(state::SYNC_REGS, regs)?;
        self.put(state::DIRTY_REGS, &1_u64.to_ne_bytes())
    }

    /// The address of the OUT to `port`, spelled `code`, if that is why it stopped.
    fn at(&self, regs: &[u8; REGS], port: u8, code: &[u8]) -> io::Result<Option<u64>> {
        let out = self.word(state::BODY)? == 1 | 1 << 8 | u32::from(port) << 16;
        if self.word(state::EXIT_REASON)? != EXIT_IO || !out {
            return Ok(None);
        }
        // KVM may or may not have stepped over it already.
        let rip = reg(regs, Reg::Rip);
        let is_here = |at: u64| {
            let mut found = vec![0; code.len()];
            let hva = self.vm.hva(at);
            hva.is_some_and(|hva| self.program.read(hva, &mut found).is_ok()) && found == code
        };
        Ok([rip, rip.wrapping_sub(2)].into_iter().find(|at| is_here(*at)))
    }

    fn exit(&self, reason: u32, body: &[u8]) -> io::Result<()> {
        self.put(state::EXIT_REASON, &reason.to_ne_bytes())?;
        self.put(state::BODY, body)
    }
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

impl Td {
    pub(crate) fn new() -> Self {
        Self {
            accepted: BTreeSet::new(),
            rtmrs: [[0; 48]; 4],
            calls: Vec::new(),
        }
    }

    /// Serves a TDCALL, if that is why the vCPU stopped.
    pub(crate) fn serve(
        &mut self,
        model: &mut Model,
        stop: &Stop<'_>,
    ) -> io::Result<(Served, Option<Waiting>)> {
        let mut regs = stop.regs()?;
        if let Some(at) = stop.at(&regs, CPUID_PORT, &CPUID_OUT)? {
            cpuid(model, stop.vcpu, &mut regs);
            set_reg(&mut regs, Reg::Rip, at + CPUID_OUT.len() as u64);
            stop.set_regs(&regs)?;
            return Ok((Served::Again, None));
        }
        let Some(at) = stop.at(&regs, TDCALL_PORT, &OUT)? else {
            return Ok((Served::Other, None));
        };
        set_reg(&mut regs, Reg::Rip, at + OUT.len() as u64);
        let (leaf, rcx) = (reg(&regs, Reg::Rax), reg(&regs, Reg::Rcx));
        self.calls.push(TdCall {
            vcpu: stop.vcpu,
            leaf,
            rcx,
        });
        let status = match leaf {
            VMCALL => return vmcall(model, stop, &mut regs),
            INFO => {
                set_reg(&mut regs, Reg::Rcx, model.width().into());
                set_reg(&mut regs, Reg::Rdx, model.module.granted());
                let vcpus = stop.vcpus as u64;
                set_reg(&mut regs, Reg::R8, vcpus | vcpus << 32);
                set_reg(&mut regs, Reg::R9, stop.vcpu as u64);
                0
            }
            RTMR_EXTEND => self.extend(stop, rcx, reg(&regs, Reg::Rdx))?,
            PAGE_ACCEPT => self.accept(model, stop, rcx)?,
            _ => OPERAND_INVALID,
        };
        set_reg(&mut regs, Reg::Rax, status);
        stop.set_regs(&regs)?;
        Ok((Served::Again, None))
    }

    /// TDG.MR.RTMR.EXTEND.
    fn extend(&mut self, stop: &Stop<'_>, at: u64, index: u64) -> io::Result<u64> {
        let register = usize::try_from(index)
            .ok()
            .and_then(|index| self.rtmrs.get_mut(index));
        let (Some(register), Some(hva), true) = (register, stop.vm.hva(at), at.is_multiple_of(64)) else {
            return Ok(OPERAND_INVALID | 1);
        };
        let mut digest = [0; 48];
        stop.program.read(hva, &mut digest)?;
        *register = Sha384::digest([*register, digest].as_flattened()).into();
        Ok(0)
    }

    /// TDG.MEM.PAGE.ACCEPT. KVM backs a TD's private memory by pages of 4 KiB only.
    fn accept(&mut self, model: &Model, stop: &Stop<'_>, operand: u64) -> io::Result<u64> {
        let (gpa, level) = (operand & !0xfff, operand & 7);
        if level != 0 {
            return Ok(SIZE_MISMATCH | 1);
        }
        if model.is_added(gpa) || !self.accepted.insert(gpa) {
            return Ok(ALREADY_ACCEPTED | 1);
        }
        match stop.vm.hva(gpa) {
            Some(hva) => stop.program.write(hva, &[0; 4096]).map(|()| 0),
            None => Ok(OPERAND_INVALID | 1),
        }
    }
}

/// CPUID as the vCPU was given it.
fn cpuid(model: &Model, vcpu: usize, regs: &mut [u8; REGS]) {
    let [leaf, subleaf] = [Reg::Rax, Reg::Rcx].map(|which| reg(regs, which) as u32);
    let found = model.vcpus[vcpu]
        .cpuid
        .get(leaf, subleaf)
        .copied()
        .unwrap_or_default();
    for (which, value) in [
        (Reg::Rax, found.eax),
        (Reg::Rbx, found.ebx),
        (Reg::Rcx, found.ecx),
        (Reg::Rdx, found.edx),
    ] {
        set_reg(regs, which, value.into());
    }
}

/// TDG.VP.VMCALL: an exit as KVM makes it, or an answer at once.
fn vmcall(
    model: &mut Model,
    stop: &Stop<'_>,
    regs: &mut [u8; REGS],
) -> io::Result<(Served, Option<Waiting>)> {
    let [function, r12, r13, r14, r15] =
        [Reg::R11, Reg::R12, Reg::R13, Reg::R14, Reg::R15].map(|which| reg(regs, which));
    if function == CALL_IO {
        stop.set_regs(regs)?;
        return port(stop, [r12, r13, r14, r15]);
    }
    let call = match function {
        CALL_MAP_GPA => Call::MapGpa { gpa: r12, bytes: r13 },
        CALL_GET_QUOTE => Call::GetQuote { gpa: r12, bytes: r13 },
        CALL_INFO => Call::Info { leaf: r12 },
        CALL_NOTIFY => Call::SetupNotify { vector: r12 },
        CALL_FATAL => Call::FatalError {
            registers: state::in_encoding_order(regs),
        },
        _ => {
            set_reg(regs, Reg::R10, 0x8000_0000_0000_0003);
            set_reg(regs, Reg::Rax, 0);
            stop.set_regs(regs)?;
            return Ok((Served::Again, None));
        }
    };
    let completion = model.call(stop.vcpu, call);
    settle(stop, regs, completion)
}

/// Puts what a call came to into registers or `struct kvm_run`.
fn settle(
    stop: &Stop<'_>,
    regs: &mut [u8; REGS],
    completion: Completion,
) -> io::Result<(Served, Option<Waiting>)> {
    stop.set_regs(regs)?;
    match completion {
        Completion::Guest { r10, r11 } => {
            for (which, value) in [(Reg::Rax, 0), (Reg::R10, r10), (Reg::R11, r11)] {
                set_reg(regs, which, value);
            }
            stop.set_regs(regs)?;
            Ok((Served::Again, None))
        }
        Completion::Exit(TdxExit::MapGpaRange {
            gpa,
            pages,
            attributes,
        }) => {
            stop.exit(
                EXIT_HYPERCALL,
                &longs(&[12, gpa, pages, attributes, 0, 0, 0, 0, 0]),
            )?;
            Ok((Served::Exit, Some(Waiting::Ret(state::BODY + 56))))
        }
        Completion::Exit(TdxExit::Tdx { nr, body }) => {
            stop.exit(EXIT_TDX, &[longs(&[0, nr]), longs(&body)].concat())?;
            Ok((Served::Exit, Some(Waiting::Ret(state::BODY + 16))))
        }
        Completion::Exit(TdxExit::Fatal(data)) => {
            // type 7, ndata 16
            stop.exit(
                EXIT_SYSTEM_EVENT,
                &[longs(&[7 | 16 << 32]), longs(&data)].concat(),
            )?;
            Ok((Served::Exit, None))
        }
        Completion::Errno(errno) => Err(io::Error::other(format!(
            "the model ends a call with errno {errno}"
        ))),
    }
}

/// A port access by call: size, direction, port, value (`tdx_emulate_io`).
fn port(stop: &Stop<'_>, [size, write, number, value]: [u64; 4]) -> io::Result<(Served, Option<Waiting>)> {
    let bytes = usize::try_from(size).unwrap_or(0).min(4);
    let offset = stop.long(DATA_OFFSET)?;
    let head = write & 1 | size << 8 | number << 16 | 1 << 32;
    stop.exit(EXIT_IO, &longs(&[head, offset]))?;
    if write == 0 {
        return Ok((Served::Exit, Some(Waiting::In(bytes))));
    }
    stop.put(offset, &value.to_ne_bytes()[..bytes])?;
    Ok((Served::Exit, Some(Waiting::Out)))
}

/// The program enters the vCPU again after it has served an exit; true if that leads to another one at once.
pub(crate) fn complete(
    model: &mut Model,
    stop: &Stop<'_>,
    waiting: Waiting,
) -> io::Result<(Served, Option<Waiting>)> {
    let mut regs = stop.regs()?;
    let done = |r11| Completion::Guest { r10: 0, r11 };
    let completion = match waiting {
        Waiting::Out => done(0),
        Waiting::In(bytes) => {
            let mut value = [0; 8];
            stop.program
                .read(stop.page + stop.long(DATA_OFFSET)?, &mut value[..bytes])?;
            done(u64::from_ne_bytes(value))
        }
        Waiting::Ret(at) => model.complete(stop.vcpu, stop.long(at)?, false),
    };
    settle(stop, &mut regs, completion)
}
