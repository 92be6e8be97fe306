//! One VM of the program: its model, and the ordinary VM behind it.

use std::io;

use crate::call::Call;
use crate::scenario::Scenario;
use crate::state::{self, REGS, Reg, SREGS};
use crate::tdcall::{self, Served, Stop, Td, Waiting};
use crate::trace::Program;
use crate::vm::{Region, Vm};
use crate::{snp_vm, tables, tdx_vm};
use tdx::model::Entry;

const CAP_MAX_VCPUS: u32 = 66;
const CAP_SPLIT_IRQCHIP: u32 = 121;
const CAP_EXIT_HYPERCALL: u32 = 201;
const CAP_BUS_CYCLES: u32 = 237;
/// `KVM_SET_MP_STATE`, `KVM_MP_STATE_RUNNABLE`, `KVM_MP_STATE_HALTED`.
const SET_MP_STATE: u64 = 0x4004_ae99;
const RUNNABLE: u32 = 0;
const HALTED: u32 = 3;
const SET_CPUID2: u64 = 0x4008_ae90;
const PRE_FAULT: u64 = 0xc040_aed5;
const SMI: u64 = 0xaeb7;
const SET_REGS: u64 = 0x4090_ae82;
const SET_SREGS: u64 = 0x4138_ae84;
const SET_FPU: u64 = 0x41a0_ae8d;
const SET_XCRS: u64 = 0x4188_aea7;
const SET_MSRS: u64 = 0x4008_ae89;
/// GET and SET of REGS, SREGS, SREGS2, DEBUGREGS, XCRS, and SET_GUEST_DEBUG.
const REGISTERS: [u64; 11] = [
    0x8090_ae81,
    SET_REGS,
    0x8138_ae83,
    SET_SREGS,
    0x8140_aecc,
    0x4140_aecd,
    0x8080_aea1,
    0x4080_aea2,
    0x8188_aea6,
    SET_XCRS,
    0x4048_ae9b,
];
/// GET and SET of FPU, XSAVE and LAPIC, which a TD refuses too.
const STATE: [u64; 6] = [
    0x81a0_ae8c,
    SET_FPU,
    0x9000_aea4,
    0x5000_aea5,
    0x8400_ae8e,
    0x4400_ae8f,
];
const MSR_PAT: u32 = 0x277;

/// Which model.
#[derive(Debug)]
enum Kind {
    Plain,
    Tdx(Box<tdx::model::Model>, Box<Td>),
    Snp(Box<snp::model::Model>),
}

/// One vCPU as the program holds it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) fd: i32,
    /// Where the program has mapped `struct kvm_run`.
    pub(crate) run_page: Option<u64>,
    /// It has the registers that it starts with.
    pub(crate) primed: bool,
    /// The XMM register that an instruction which KVM could not emulate clears.
    pub(crate) cleared: Option<usize>,
    /// What its last call waits for.
    waiting: Option<Waiting>,
}

/// A return of `KVM_RUN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Index of the vCPU.
    pub vcpu: usize,
    /// What the ioctl gave.
    pub result: i64,
    /// `exit_reason`.
    pub reason: u32,
    /// The exit's own fields, in words of 32 bits.
    pub body: [u32; 8],
    /// Where the guest is now.
    pub rip: u64,
    /// RAX.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// What lies there in memory, if there is any.
    pub code: Vec<u8>,
}

/// One VM.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) fd: i32,
    pub(crate) vm: Vm,
    kind: Kind,
    pub(crate) vcpus: Vec<Vcpu>,
}

impl Machine {
    pub(crate) fn new(fd: i32, vm_type: u64, scenario: &Scenario) -> Self {
        let kind = match vm_type {
            5 => Kind::Tdx(Box::new(scenario.tdx_model()), Box::new(Td::new())),
            2..=4 => Kind::Snp(Box::new(scenario.snp_model(vm_type))),
            _ => Kind::Plain,
        };
        Self {
            fd,
            vm: Vm::new(vm_type),
            kind,
            vcpus: Vec::new(),
        }
    }

    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.kind, Kind::Plain)
    }

    pub(crate) fn is_td(&self) -> bool {
        matches!(self.kind, Kind::Tdx(..))
    }

    /// MRTD, or the SNP launch digest.
    pub(crate) fn measurement(&self) -> Option<[u8; 48]> {
        match &self.kind {
            Kind::Plain => None,
            Kind::Tdx(model, _) => model.module.mrtd(),
            Kind::Snp(model) => Some(model.digest().0),
        }
    }

    pub(crate) fn create_vcpu(&mut self, id: u32) -> Result<(), i32> {
        match &mut self.kind {
            Kind::Plain => Ok(()),
            Kind::Tdx(model, _) => model.create_vcpu(id).map(|_| ()),
            Kind::Snp(model) => {
                model.create_vcpu();
                Ok(())
            }
        }
    }

    pub(crate) fn vcpu_created(&mut self, id: u32, fd: i32) {
        assert!(fd >= 0, "the real KVM refuses vCPU {id}, which the model allowed");
        self.vcpus.push(Vcpu {
            fd,
            run_page: None,
            primed: false,
            cleared: None,
            waiting: None,
        });
    }

    /// `KVM_CHECK_EXTENSION` on the VM where its type decides.
    pub(crate) fn extension(&self, number: u32) -> Option<u32> {
        match &self.kind {
            Kind::Plain => None,
            Kind::Tdx(model, _) if number == CAP_MAX_VCPUS => Some(model.kernel.max_vcpus),
            Kind::Tdx(..) | Kind::Snp(_) => u32::try_from(self.vm.extension(number)?).ok(),
        }
    }

    pub(crate) fn create_irqchip(&self) -> Result<(), i32> {
        match &self.kind {
            Kind::Tdx(model, _) => model.create_irqchip(),
            Kind::Plain | Kind::Snp(_) => Ok(()),
        }
    }

    pub(crate) fn enable(&mut self, number: u32, value: u64) -> Result<(), i32> {
        let Kind::Tdx(model, _) = &mut self.kind else {
            return Ok(());
        };
        match number {
            CAP_SPLIT_IRQCHIP => model.split_irqchip(value),
            CAP_EXIT_HYPERCALL => model.exit_hypercall(value),
            CAP_BUS_CYCLES => model.bus_cycles(value),
            _ => Ok(()),
        }
    }

    pub(crate) fn set_region(&mut self, region: Region, open: impl Fn(u32) -> bool) -> Result<(), i32> {
        self.vm.set_region(region, open)?;
        let frames = region.gpa >> 12..(region.gpa + region.size) >> 12;
        let gmem = region.flags & crate::vm::GUEST_MEMFD != 0;
        match &mut self.kind {
            _ if frames.is_empty() => Ok(()),
            Kind::Plain => Ok(()),
            Kind::Tdx(model, _) => model.slot(frames, gmem),
            Kind::Snp(model) => {
                model.slot(frames, gmem);
                Ok(())
            }
        }
    }

    pub(crate) fn set_attributes(
        &mut self,
        at: u64,
        size: u64,
        attributes: u64,
        flags: u64,
    ) -> Result<(), i32> {
        let (frames, private) = self.vm.set_attributes(at, size, attributes, flags)?;
        match (&mut self.kind, private) {
            (Kind::Plain, _) => {}
            (Kind::Tdx(model, _), true) => model.set_private(frames),
            (Kind::Tdx(model, _), false) => model.set_shared(frames),
            (Kind::Snp(model), true) => model.set_private(frames),
            (Kind::Snp(model), false) => model.set_shared(frames),
        }
        Ok(())
    }

    /// `KVM_MEMORY_ENCRYPT_OP` on the VM.
    pub(crate) fn command(&mut self, call: &Call<'_>) -> (String, Result<(), i32>) {
        let (name, answer) = match &mut self.kind {
            Kind::Plain => ("none".into(), Err(libc::ENOTTY)),
            Kind::Tdx(model, _) => tdx_vm::on_vm(model, call),
            Kind::Snp(model) => snp_vm::on_vm(model, &self.vm, call),
        };
        let last = name.starts_with("FINALIZE") || name.starts_with("SNP_LAUNCH_FINISH");
        if last && answer.is_ok() {
            let mut adapted = tables::adapt(&self.vm, call);
            if self.is_td() {
                adapted = adapted.and_then(|()| tables::replace_instructions(&self.vm, call));
            }
            return (name, adapted);
        }
        (name, answer)
    }

    /// The same on a vCPU.
    pub(crate) fn vcpu_command(&mut self, call: &Call<'_>, vcpu: usize) -> (String, Result<(), i32>) {
        match &mut self.kind {
            Kind::Tdx(model, _) => tdx_vm::on_vcpu(model, &self.vm, vcpu, call),
            // x86.c:kvm_arch_vcpu_ioctl, where svm has no such commands
            Kind::Plain | Kind::Snp(_) => ("none".into(), Err(libc::ENOTTY)),
        }
    }

    /// Answers a command on a vCPU. INIT_VCPU makes it runnable, which an ordinary one is told by an ioctl.
    pub(crate) fn after_vcpu_command(
        &self,
        mut call: Call<'_>,
        vcpu: usize,
        answer: Result<(), i32>,
    ) -> io::Result<()> {
        const INIT_VCPU: u32 = 2;
        let initialised = call.u32(call.args()[2]) == Ok(INIT_VCPU) && answer.is_ok();
        if initialised && vcpu != 0 {
            let at = call.scratch(&RUNNABLE.to_ne_bytes())?;
            let fd = call.args()[0];
            let result = call.run(libc::SYS_ioctl, [fd, SET_MP_STATE, at])?;
            assert_eq!(result, 0, "the real KVM keeps vCPU {vcpu} from running");
        }
        call.answer(answer.map_or_else(|errno| -i64::from(errno), |()| 0))
    }

    /// An ordinary VM has no encryption bit in CR3: what `KVM_SET_SREGS` is to be given instead.
    pub(crate) fn without_c_bit(&self, call: &Call<'_>, request: u64) -> Option<[u8; SREGS]> {
        if request != SET_SREGS || !matches!(self.kind, Kind::Snp(_)) {
            return None;
        }
        let mut sregs = call.bytes(call.args()[2]).ok()?;
        state::clear_cr3(&mut sregs, shim::layout::C_BIT);
        Some(sregs)
    }

    /// Any other ioctl on a vCPU: `None` if the real KVM is to have it.
    pub(crate) fn vcpu_ioctl(
        &mut self,
        call: &Call<'_>,
        request: u64,
        vcpu: usize,
    ) -> Option<Result<(), i32>> {
        let argument = call.args()[2];
        if self.is_plain() {
            return None;
        }
        if request == SMI {
            return Some(Err(libc::ENOTTY));
        }
        if request == PRE_FAULT {
            return Some(self.pre_fault(call, argument));
        }
        match &mut self.kind {
            Kind::Plain => None,
            Kind::Tdx(model, _) => {
                if request == SET_CPUID2 {
                    let table = tdx_vm::read_table(call, argument);
                    let answer = table.and_then(|table| model.vcpu_set_cpuid(vcpu, &table));
                    return answer.is_err().then_some(answer);
                }
                let refused = REGISTERS.contains(&request) || STATE.contains(&request);
                refused.then(|| model.registers())
            }
            Kind::Snp(model) => {
                let on = model.vcpus.get_mut(vcpu)?;
                if on.protected && REGISTERS.contains(&request) {
                    return Some(Err(libc::EINVAL));
                }
                take_state(on, call, request, argument).err().map(Err)
            }
        }
    }

    fn pre_fault(&self, call: &Call<'_>, at: u64) -> Result<(), i32> {
        let [gpa, size, flags] = [0, 8, 16].map(|offset| call.u64(at + offset));
        let (gpa, size, flags) = (gpa?, size?, flags?);
        if let Kind::Tdx(model, _) = &self.kind {
            model.pre_fault(gpa, size, flags)?;
        }
        let done = [gpa + size, 0].map(u64::to_ne_bytes).concat();
        call.write(at, &done)
    }

    /// What `KVM_RUN` checks before it enters.
    pub(crate) fn enter(&mut self, vcpu: usize) -> Result<(), i32> {
        match &mut self.kind {
            Kind::Plain => Ok(()),
            Kind::Tdx(model, _) => match model.run(vcpu) {
                Entry::Errno(errno) => Err(errno),
                Entry::Runs | Entry::Blocks => Ok(()),
            },
            Kind::Snp(model) => match model.run(vcpu) {
                // A halted vCPU waits in the real KVM too.
                snp::model::Entry::Errno(errno) if errno != libc::EINTR => Err(errno),
                _ => Ok(()),
            },
        }
    }

    /// Gives a vCPU of a TD the registers of its first instruction; the real KVM has just shown its own.
    pub(crate) fn prime(&mut self, program: &Program, vcpu: usize) -> io::Result<()> {
        let Kind::Tdx(model, _) = &self.kind else {
            return Ok(());
        };
        let Some(page) = self.vcpus[vcpu].run_page else {
            return Ok(());
        };
        let (mut regs, mut sregs) = ([0; REGS], [0; SREGS]);
        program.read(page + state::SYNC_SREGS, &mut sregs)?;
        let (width, td) = (model.width(), &model.vcpus[vcpu]);
        let signature = td.cpuid.get(1, 0).map_or(0, |leaf| leaf.eax);
        state::td_reset(
            &mut regs,
            &mut sregs,
            vcpu as u64,
            width,
            td.rcx.unwrap_or(0),
            signature,
        );
        program.write(page + state::SYNC_REGS, &regs)?;
        program.write(page + state::SYNC_SREGS, &sregs)?;
        program.write(page + state::DIRTY_REGS, &state::REGS_AND_SREGS.to_ne_bytes())?;
        program.write(page + state::IMMEDIATE_EXIT, &[0])?;
        self.vcpus[vcpu].primed = true;
        Ok(())
    }

    fn stop<'a>(vm: &'a Vm, vcpus: &[Vcpu], program: &'a Program, vcpu: usize) -> Option<Stop<'a>> {
        Some(Stop {
            program,
            vm,
            page: vcpus[vcpu].run_page?,
            vcpu,
            vcpus: vcpus.len(),
        })
    }

    /// `KVM_RUN` has come back: serves what a TD's module or KVM itself would.
    pub(crate) fn serve(&mut self, program: &Program, vcpu: usize) -> io::Result<Served> {
        let (Kind::Tdx(model, td), Some(stop)) =
            (&mut self.kind, Self::stop(&self.vm, &self.vcpus, program, vcpu))
        else {
            return Ok(Served::Other);
        };
        let (served, waiting) = td.serve(model, &stop)?;
        self.vcpus[vcpu].waiting = waiting;
        Ok(served)
    }

    /// The program enters a vCPU again: true if what it has served leads to another exit at once.
    pub(crate) fn complete(&mut self, program: &Program, vcpu: usize) -> io::Result<bool> {
        let Some(waiting) = self.vcpus[vcpu].waiting.take() else {
            return Ok(false);
        };
        let (Kind::Tdx(model, _), Some(stop)) =
            (&mut self.kind, Self::stop(&self.vm, &self.vcpus, program, vcpu))
        else {
            return Ok(false);
        };
        let (served, waiting) = tdcall::complete(model, &stop, waiting)?;
        self.vcpus[vcpu].waiting = waiting;
        Ok(served == Served::Exit)
    }

    /// KVM stopped at an instruction that it cannot emulate, which clears an XMM register.
    pub(crate) fn clears_xmm(&mut self, program: &Program, vcpu: usize, result: i64) -> io::Result<bool> {
        const INTERNAL_ERROR: u32 = 17;
        const EMULATION: u32 = 1;
        if self.is_plain() {
            return Ok(false);
        }
        let ran = self.ran(program, vcpu, result)?;
        let cleared = match ran.code[..] {
            [0x0f, 0x57, operands, ..] if operands >= 0xc0 && operands >> 3 & 7 == operands & 7 => {
                Some(usize::from(operands & 7))
            }
            _ => None,
        };
        let stuck = result == 0 && ran.reason == INTERNAL_ERROR && ran.body[0] == EMULATION;
        self.vcpus[vcpu].cleared = cleared.filter(|_| stuck);
        Ok(self.vcpus[vcpu].cleared.is_some())
    }

    /// RTMRs, and TDCALLs in order.
    pub(crate) fn td(&self) -> Option<&Td> {
        match &self.kind {
            Kind::Tdx(_, td) => Some(td),
            Kind::Plain | Kind::Snp(_) => None,
        }
    }

    /// Reads how `KVM_RUN` came back.
    pub(crate) fn ran(&self, program: &Program, vcpu: usize, result: i64) -> io::Result<Ran> {
        let page = self.vcpus[vcpu].run_page.expect("it was mapped before it ran");
        let mut regs = [0; REGS];
        program.read(page + state::SYNC_REGS, &mut regs)?;
        let word = |at| {
            let mut bytes = [0; 4];
            program
                .read(page + at, &mut bytes)
                .map(|()| u32::from_ne_bytes(bytes))
        };
        let mut body = [0; 8];
        for (to, at) in body.iter_mut().zip((state::BODY..).step_by(4)) {
            *to = word(at)?;
        }
        let rip = state::reg(&regs, Reg::Rip);
        // The shim's tables map memory where it lies.
        let mut code = vec![0; 16];
        let there = self
            .vm
            .hva(rip)
            .is_some_and(|hva| program.read(hva, &mut code).is_ok());
        code.truncate(if there { 16 } else { 0 });
        Ok(Ran {
            vcpu,
            result,
            reason: word(state::EXIT_REASON)?,
            body,
            rip,
            rax: state::reg(&regs, Reg::Rax),
            rcx: state::reg(&regs, Reg::Rcx),
            code,
        })
    }
}

/// What an SNP launch will measure of a vCPU.
fn take_state(vcpu: &mut snp::model::Vcpu, call: &Call<'_>, request: u64, at: u64) -> Result<(), i32> {
    let control = &mut vcpu.state.control;
    match request {
        SET_REGS => state::take_regs(&mut vcpu.state, &call.bytes(at)?),
        SET_SREGS => state::take_sregs(&mut vcpu.state, &call.bytes(at)?),
        SET_FPU => {
            // struct kvm_fpu: fcw behind eight registers of 16 bytes, mxcsr at its end.
            control.fcw = u16::from_ne_bytes(call.bytes(at + 128)?);
            control.mxcsr = call.u32(at + 408)?;
        }
        SET_XCRS => control.xcr0 = call.u64(at + 16)?,
        SET_MSRS => {
            let count = call.u32(at)?.min(64);
            for entry in (0..u64::from(count)).map(|n| at + 8 + 16 * n) {
                if call.u32(entry)? == MSR_PAT {
                    control.pat = call.u64(entry + 8)?;
                }
            }
        }
        SET_MP_STATE if call.u32(at)? == HALTED => vcpu.mp_state = snp::model::MpState::Halted,
        _ => {}
    }
    Ok(())
}
