//! The modelled host: every KVM ioctl of the program is checked against a model, and then answered or passed on to
//! an ordinary VM of the real KVM.

use std::collections::BTreeMap;
use std::io;

use arch::x86::cpuid::CpuidTable;

use crate::call::Call;
use crate::machine::{Machine, Ran, Vcpu};
use crate::scenario::{Progress, Scenario};
use crate::state::{self, REGS_AND_SREGS, Reg};
use crate::tdcall::{Served, Td};
use crate::tdx_vm;
use crate::trace::{Program, Regs, Tid};
use crate::vm::Region;

pub(crate) const MEMORY_ENCRYPT_OP: u64 = 0xc008_aeba;
const CREATE_VM: u64 = 0xae01;
const CHECK_EXTENSION: u64 = 0xae03;
const GET_SUPPORTED_CPUID: u64 = 0xc008_ae05;
const GET_DEVICE_ATTR: u64 = 0x4018_aee2;
const HAS_DEVICE_ATTR: u64 = 0x4018_aee3;
const SEV_ISSUE_CMD: u64 = 0xc010_5300;
const CREATE_VCPU: u64 = 0xae41;
const CREATE_IRQCHIP: u64 = 0xae60;
const SET_REGION: u64 = 0x4020_ae46;
const SET_REGION2: u64 = 0x40a0_ae49;
const SET_ATTRIBUTES: u64 = 0x4020_aed2;
const CREATE_GMEM: u64 = 0xc040_aed4;
const ENABLE_CAP: u64 = 0x4068_aea3;

/// What follows a call that the kernel makes.
#[derive(Clone, Copy, Debug)]
enum After {
    /// Only registers to put back.
    Nothing,
    VmCreated(u64),
    VcpuCreated {
        machine: usize,
        id: u32,
    },
    GmemCreated {
        machine: usize,
        size: u64,
    },
    Mapped {
        machine: usize,
        vcpu: usize,
    },
    Supported(u64),
    Primed {
        machine: usize,
        vcpu: usize,
    },
    Ran {
        machine: usize,
        vcpu: usize,
    },
}

/// The host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) scenario: Scenario,
    pub(crate) machines: Vec<Machine>,
    pending: BTreeMap<Tid, (After, Regs)>,
    /// Launch commands in order, with what they came to.
    pub(crate) commands: Vec<(String, i32)>,
    /// Returns of `KVM_RUN` in order.
    pub(crate) exits: Vec<Ran>,
}

fn errno(answer: Result<(), i32>) -> i64 {
    answer.map_or_else(|errno| -i64::from(errno), |()| 0)
}

impl Host {
    pub(crate) fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            machines: Vec::new(),
            pending: BTreeMap::new(),
            commands: Vec::new(),
            exits: Vec::new(),
        }
    }

    /// The TD of the last VM.
    pub(crate) fn td(&self) -> Option<&Td> {
        self.machines.last()?.td()
    }

    /// The guest has come as far as the scenario wants.
    pub(crate) fn enough(&self) -> bool {
        (self.scenario.enough)(&Progress {
            exits: &self.exits,
            tdcalls: self.td().map_or(&[], |td| &td.calls),
        })
    }

    /// A thread is about to make a call.
    pub(crate) fn enter(&mut self, program: &Program, tid: Tid) -> io::Result<()> {
        let call = Call::new(program, tid)?;
        match call.number() {
            libc::SYS_ioctl => self.ioctl(call),
            libc::SYS_open => self.open(call, 0),
            libc::SYS_openat => self.open(call, 1),
            libc::SYS_mmap => {
                let fd = i32::try_from(call.args()[4].cast_signed()).unwrap_or(-1);
                match self.vcpu_of(fd) {
                    Some((machine, vcpu)) => self.follow(call, After::Mapped { machine, vcpu }),
                    None => call.pass(),
                }
                Ok(())
            }
            _ => {
                call.pass();
                Ok(())
            }
        }
    }

    fn follow(&mut self, call: Call<'_>, after: After) {
        self.pending.insert(call.tid, (after, call.regs));
        call.watch();
    }

    /// Files that the scenario has replace the host's.
    fn open(&mut self, mut call: Call<'_>, argument: usize) -> io::Result<()> {
        let mut path = call.vector(call.args()[argument], 4096);
        path.truncate(path.iter().position(|byte| *byte == 0).unwrap_or(0));
        match self.scenario.file(&path) {
            Some(file) => {
                let at = call.scratch(&file)?;
                call.change(argument, at)?;
                self.follow(call, After::Nothing);
            }
            None => call.pass(),
        }
        Ok(())
    }

    fn machine_of(&self, fd: i32) -> Option<usize> {
        self.machines.iter().rposition(|machine| machine.fd == fd)
    }

    fn vcpu_of(&self, fd: i32) -> Option<(usize, usize)> {
        let find = |machine: &Machine| machine.vcpus.iter().position(|vcpu| vcpu.fd == fd);
        let machine = self
            .machines
            .iter()
            .rposition(|machine| find(machine).is_some())?;
        Some((machine, find(&self.machines[machine])?))
    }

    fn ioctl(&mut self, call: Call<'_>) -> io::Result<()> {
        let [fd, request, argument, ..] = call.args();
        let fd = i32::try_from(fd).unwrap_or(-1);
        // The request is an int to the kernel; libraries may sign-extend it.
        let request = request & 0xffff_ffff;
        if let Some((machine, vcpu)) = self.vcpu_of(fd) {
            return self.vcpu_ioctl(call, request, machine, vcpu);
        }
        if let Some(machine) = self.machine_of(fd) {
            return self.vm_ioctl(call, request, machine);
        }
        self.system_ioctl(call, request, argument)
    }

    fn system_ioctl(&mut self, mut call: Call<'_>, request: u64, argument: u64) -> io::Result<()> {
        match request {
            CHECK_EXTENSION => match self.scenario.extension(argument) {
                Some(value) => call.answer(i64::from(value)),
                None => {
                    call.pass();
                    Ok(())
                }
            },
            CREATE_VM => {
                if !self.scenario.offers(argument) {
                    return call.answer(-i64::from(libc::EINVAL));
                }
                call.change(2, 0)?;
                self.follow(call, After::VmCreated(argument));
                Ok(())
            }
            GET_SUPPORTED_CPUID => {
                let room = call.u32(argument).unwrap_or(0);
                self.follow(call, After::Supported(room.into()));
                Ok(())
            }
            GET_DEVICE_ATTR | HAS_DEVICE_ATTR => {
                let answer = self
                    .scenario
                    .device_attribute(&call, argument, request == GET_DEVICE_ATTR);
                call.answer(errno(answer))
            }
            SEV_ISSUE_CMD => {
                let answer = platform_status(&call, argument);
                call.answer(errno(answer))
            }
            _ => {
                call.pass();
                Ok(())
            }
        }
    }

    fn vm_ioctl(&mut self, call: Call<'_>, request: u64, index: usize) -> io::Result<()> {
        let machine = &mut self.machines[index];
        let argument = call.args()[2];
        let answer = match request {
            CHECK_EXTENSION => {
                let number = u32::try_from(argument).unwrap_or(u32::MAX);
                let known = self.scenario.extension(argument);
                return match machine
                    .extension(number)
                    .or(known)
                    .filter(|_| !machine.is_plain())
                {
                    Some(value) => call.answer(i64::from(value)),
                    None => {
                        call.pass();
                        Ok(())
                    }
                };
            }
            CREATE_VCPU => {
                let id = u32::try_from(argument).unwrap_or(u32::MAX);
                match machine.create_vcpu(id) {
                    Err(errno) => Err(errno),
                    Ok(()) => {
                        self.follow(call, After::VcpuCreated { machine: index, id });
                        return Ok(());
                    }
                }
            }
            CREATE_IRQCHIP => machine.create_irqchip(),
            ENABLE_CAP => enable_cap(machine, &call, argument),
            CREATE_GMEM => match gmem(machine, &call, argument) {
                Err(errno) => Err(errno),
                Ok(size) => {
                    self.follow(call, After::GmemCreated { machine: index, size });
                    return Ok(());
                }
            },
            SET_REGION | SET_REGION2 => region(machine, &call, argument, request == SET_REGION),
            SET_ATTRIBUTES if !machine.is_plain() => {
                let answer = attributes(machine, &call, argument);
                return call.answer(errno(answer));
            }
            MEMORY_ENCRYPT_OP if !machine.is_plain() => {
                let (name, answer) = machine.command(&call);
                self.commands.push((name, answer.err().unwrap_or(0)));
                return call.answer(errno(answer));
            }
            _ => Ok(()),
        };
        match answer {
            Ok(()) => {
                call.pass();
                Ok(())
            }
            refused => call.answer(errno(refused)),
        }
    }

    fn vcpu_ioctl(
        &mut self,
        mut call: Call<'_>,
        request: u64,
        machine: usize,
        vcpu: usize,
    ) -> io::Result<()> {
        const RUN: u64 = 0xae80;
        let on = &mut self.machines[machine];
        if request == RUN {
            return self.run(call, machine, vcpu);
        }
        if request == MEMORY_ENCRYPT_OP && !on.is_plain() {
            let (name, answer) = on.vcpu_command(&call, vcpu);
            self.commands.push((name, answer.err().unwrap_or(0)));
            return on.after_vcpu_command(call, vcpu, answer);
        }
        match on.vcpu_ioctl(&call, request, vcpu) {
            None => {
                if let Some(sregs) = on.without_c_bit(&call, request) {
                    let at = call.scratch(&sregs)?;
                    call.change(2, at)?;
                    self.follow(call, After::Nothing);
                    return Ok(());
                }
                call.pass();
                Ok(())
            }
            Some(answer) => call.answer(errno(answer)),
        }
    }

    fn run(&mut self, call: Call<'_>, machine: usize, vcpu: usize) -> io::Result<()> {
        let on = &mut self.machines[machine];
        if let Err(refused) = on.enter(vcpu) {
            return call.answer(-i64::from(refused));
        }
        if on.complete(call.program, vcpu)? {
            self.exits.push(on.ran(call.program, vcpu, 0)?);
            return call.answer(0);
        }
        let record = &on.vcpus[vcpu];
        let Some(page) = record.run_page else {
            call.pass();
            return Ok(());
        };
        call.program
            .write(page + state::VALID_REGS, &REGS_AND_SREGS.to_ne_bytes())?;
        if on.is_td() && !record.primed {
            // Come out at once, with all registers, so that those of a TD can be put in.
            call.program.write(page + state::IMMEDIATE_EXIT, &[1])?;
            self.follow(call, After::Primed { machine, vcpu });
        } else {
            self.follow(call, After::Ran { machine, vcpu });
        }
        Ok(())
    }

    /// A thread has stopped for something else; if it was on its way into a call that is followed, it still is.
    pub(crate) fn stopped(&self, program: &Program, tid: Tid, signal: i32) {
        if self.pending.contains_key(&tid) {
            program.watch(tid, signal);
        } else {
            program.resume(tid, signal);
        }
    }

    /// A thread has come back from a call.
    pub(crate) fn leave(&mut self, program: &Program, tid: Tid) -> io::Result<()> {
        let mut regs = program.regs(tid)?;
        let Some((after, before)) = self.pending.remove(&tid) else {
            program.resume(tid, 0);
            return Ok(());
        };
        (regs.rdi, regs.rsi, regs.rdx) = (before.rdi, before.rsi, before.rdx);
        let result = regs.rax.cast_signed();
        let fd = i32::try_from(result).unwrap_or(-1);
        match after {
            After::VmCreated(vm_type) if result >= 0 => {
                let machine = Machine::new(fd, vm_type, &self.scenario);
                if !machine.is_plain() {
                    foreign_msrs_exit(Call::after(program, tid, before), result.cast_unsigned())?;
                }
                self.machines.push(machine);
            }
            After::VcpuCreated { machine, id } => self.machines[machine].vcpu_created(id, fd),
            After::GmemCreated { machine, size } if result >= 0 => {
                let fd = u32::try_from(fd).unwrap_or(u32::MAX);
                self.machines[machine].vm.add_gmem(fd, size);
            }
            After::Mapped { machine, vcpu } if result > 0 => {
                self.machines[machine].vcpus[vcpu].run_page = Some(regs.rax);
            }
            After::Supported(room) if result == 0 => self.more_cpuid(program, tid, before.rdx, room)?,
            After::Primed { machine, vcpu } => {
                self.machines[machine].prime(program, vcpu)?;
                regs.rip -= 2;
                regs.rax = before.orig_rax;
            }
            After::Ran { machine, vcpu }
                if result == 0 && self.machines[machine].serve(program, vcpu)? == Served::Again =>
            {
                regs.rip -= 2;
                regs.rax = before.orig_rax;
            }
            After::Ran { machine, vcpu } if self.machines[machine].clears_xmm(program, vcpu, result)? => {
                clear_xmm(
                    Call::after(program, tid, before),
                    &self.machines[machine].vcpus[vcpu],
                )?;
                regs.rip -= 2;
                regs.rax = before.orig_rax;
            }
            After::Ran { machine, vcpu } => {
                let ran = self.machines[machine].ran(program, vcpu, result)?;
                self.exits.push(ran);
            }
            _ => {}
        }
        program.set_regs(tid, &regs)?;
        program.resume(tid, 0);
        Ok(())
    }

    /// Adds what only this scenario's CPU has.
    fn more_cpuid(&self, program: &Program, tid: Tid, at: u64, room: u64) -> io::Result<()> {
        if self.scenario.cpuid.is_empty() {
            return Ok(());
        }
        let call = Call::new(program, tid)?;
        let fault = io::Error::from_raw_os_error;
        let mut table = tdx_vm::read_table(&call, at).map_err(fault)?;
        let added = &self.scenario.cpuid;
        table
            .0
            .retain(|have| !added.iter().any(|new| new.leaf == have.leaf));
        table.0.extend(added.iter().copied());
        assert!(
            table.0.len() as u64 <= room,
            "the program leaves no room for more CPUID"
        );
        tdx_vm::write_table(&call, at, &CpuidTable(table.0)).map_err(fault)
    }
}

/// What an ordinary VM knows no MSR for comes to user space, as the first thing that a protected guest does.
fn foreign_msrs_exit(mut call: Call<'_>, vm: u64) -> io::Result<()> {
    const USER_SPACE_MSR: u32 = 188;
    const INVALID_AND_UNKNOWN: u64 = 3;
    let mut request = [0; 104];
    request[..4].copy_from_slice(&USER_SPACE_MSR.to_ne_bytes());
    request[8..16].copy_from_slice(&INVALID_AND_UNKNOWN.to_ne_bytes());
    let at = call.scratch(&request)?;
    let result = call.run(libc::SYS_ioctl, [vm, ENABLE_CAP, at])?;
    assert_eq!(result, 0, "the real KVM hands no MSRs to user space");
    Ok(())
}

/// Does what `xorps` of a register with itself does, which KVM's instruction emulator lacks: a paravirtually nested
/// KVM runs the shim by it.
fn clear_xmm(mut call: Call<'_>, vcpu: &Vcpu) -> io::Result<()> {
    const GET_FPU: u64 = 0x81a0_ae8c;
    const SET_FPU: u64 = 0x41a0_ae8d;
    const FPU: usize = 416;
    const XMM: usize = 152;
    let Some((register, page)) = vcpu.cleared.zip(vcpu.run_page) else {
        return Ok(());
    };
    let fd = u64::from(vcpu.fd.cast_unsigned());
    let at = call.scratch(&[0; FPU])?;
    for request in [GET_FPU, SET_FPU] {
        let result = call.run(libc::SYS_ioctl, [fd, request, at])?;
        assert_eq!(result, 0, "the real KVM keeps the FPU to itself");
        call.program.write(at + (XMM + 16 * register) as u64, &[0; 16])?;
    }
    let rip = page + state::SYNC_REGS + Reg::Rip as u64;
    let mut next = [0; 8];
    call.program.read(rip, &mut next)?;
    let next = u64::from_ne_bytes(next) + 3;
    call.program.write(rip, &next.to_ne_bytes())?;
    call.program.write(page + state::DIRTY_REGS, &1_u64.to_ne_bytes())
}

/// `SNP_PLATFORM_STATUS`: ABI 1.58, initialised.
fn platform_status(call: &Call<'_>, at: u64) -> Result<(), i32> {
    const PLATFORM_STATUS: u32 = 9;
    if call.u32(at)? != PLATFORM_STATUS {
        return Err(libc::EINVAL);
    }
    let mut status = [0; 32];
    status[..4].copy_from_slice(&[1, 58, 1, 0]);
    call.write(call.u64(at + 4)?, &status)
}

fn enable_cap(machine: &mut Machine, call: &Call<'_>, at: u64) -> Result<(), i32> {
    let (number, value) = (call.u32(at)?, call.u64(at + 8)?);
    machine.enable(number, value)
}

fn gmem(machine: &Machine, call: &Call<'_>, at: u64) -> Result<u64, i32> {
    let (size, flags) = (call.u64(at)?, call.u64(at + 8)?);
    machine.vm.check_gmem(size, flags)?;
    Ok(size)
}

fn attributes(machine: &mut Machine, call: &Call<'_>, at: u64) -> Result<(), i32> {
    let [address, size, attributes, flags] = [0, 8, 16, 24].map(|offset| call.u64(at + offset));
    machine.set_attributes(address?, size?, attributes?, flags?)
}

fn region(machine: &mut Machine, call: &Call<'_>, at: u64, version1: bool) -> Result<(), i32> {
    let mut region = Region {
        slot: call.u32(at)?,
        flags: call.u32(at + 4)?,
        gpa: call.u64(at + 8)?,
        size: call.u64(at + 16)?,
        hva: call.u64(at + 24)?,
        version1,
        ..Region::default()
    };
    if !version1 {
        region.gmem_offset = call.u64(at + 32)?;
        region.gmem_fd = call.u32(at + 40)?;
    }
    let process = call.program.first();
    let open = |fd| std::path::Path::new(&format!("/proc/{process}/fd/{fd}")).exists();
    machine.set_region(region, open)
}
