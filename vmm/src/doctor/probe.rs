//! Runs a guest of a few instructions that a KVM of paravirtual nesting gets wrong: there, early kernel code is
//! emulated and an SSE instruction ends the VM, and a hypercall never leaves the guest.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::exit::{Answer, Exit};
use arch::kvm::system::Host;
use arch::kvm::vcpu::{Vcpu, kick_signal};
use arch::kvm::vm::Vm;
use arch::mem::map::HostRam;
use arch::x86::regs::{BootState, General};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::Killable;

/// What the tiny guest showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All of it ran.
    Good,
    /// KVM could not make or enter the VM.
    Failed {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        cause: String,
    },
    /// It stopped at a step.
    Stuck {
        /// Where.
        at: Step,
        /// How.
        how: String,
    },
}

/// Steps of the guest's program, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A few plain instructions and a port write.
    Start,
    /// An SSE instruction.
    Sse,
    /// A hypercall that has to reach user space.
    Hypercall,
}

/// For each step of the guest; an emulated host on a busy machine needs a good part of a second.
const LIMIT: Duration = Duration::from_secs(2);
/// For everything before the guest is entered.
const PREPARATION_LIMIT: Duration = Duration::from_secs(10);
const RAM_BYTES: u64 = 0x20_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
const PORT: u16 = 0x80;
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const CR4_OSFXSR: u64 = 1 << 9;

/// The program; each `out` to port 0x80 says that a step is behind it. `KVM_HC_MAP_GPA_RANGE` is 12, with address,
/// pages and attributes in rbx, rcx and rdx.
fn program(hypercall: [u8; 3]) -> Vec<u8> {
    let mut code = vec![
        0xb0, 0x01, 0xe6, 0x80, // mov al, 1; out 0x80, al
        0x66, 0x0f, 0xfc, 0xc0, // paddb xmm0, xmm0
        0xb0, 0x02, 0xe6, 0x80, // mov al, 2; out 0x80, al
        0xb8, 0x0c, 0x00, 0x00, 0x00, // mov eax, 12
        0xbb, 0x00, 0x00, 0x10, 0x00, // mov ebx, 0x100000
        0xb9, 0x01, 0x00, 0x00, 0x00, // mov ecx, 1
        0x31, 0xd2, // xor edx, edx
    ];
    code.extend(hypercall);
    code.extend([0xb0, 0x03, 0xe6, 0x80]); // mov al, 3; out 0x80, al
    code
}

const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

/// Runs the guest; takes a few milliseconds where all is well, and a few seconds at most.
pub(super) fn run() -> Outcome {
    run_program(program)
}

/// Code for a CPU whose hypercall instruction this is.
type Program = fn([u8; 3]) -> Vec<u8>;

fn run_program(program: Program) -> Outcome {
    let (report, progress) = channel();
    let worker = thread::Builder::new()
        .name("probe".into())
        .spawn(move || attempt(program, &report));
    let worker = match worker {
        Ok(worker) => worker,
        Err(e) => return failed("starting a thread", &e),
    };
    // Before it listens for kicks, a kick would end the process.
    let mut at = match progress.recv_timeout(PREPARATION_LIMIT) {
        Ok(Progress::Passed(step)) => step,
        Ok(Progress::Ended(outcome)) => return outcome,
        Err(_) => return failed("creating a VM", &"took too long"),
    };
    let mut kicked = false;
    loop {
        match progress.recv_timeout(LIMIT) {
            Ok(Progress::Passed(next)) => at = next,
            Ok(Progress::Ended(outcome)) => return outcome,
            Err(RecvTimeoutError::Timeout) if !kicked => {
                kicked = true;
                // It may have ended just now.
                let _ = worker.kill(kick_signal());
            }
            // A thread that not even a signal gets out of the kernel is left to the end of the process.
            Err(_) => {
                return Outcome::Stuck {
                    at,
                    how: "never came back".into(),
                };
            }
        }
    }
}

enum Progress {
    Passed(Step),
    Ended(Outcome),
}

fn failed(doing: &'static str, cause: &dyn std::fmt::Display) -> Outcome {
    Outcome::Failed {
        doing,
        cause: cause.to_string(),
    }
}

fn attempt(program: Program, report: &Sender<Progress>) {
    let outcome = match prepare(program) {
        Ok((mut vcpu, _vm)) => watch(&mut vcpu, report),
        Err((doing, e)) => failed(doing, &e),
    };
    // The other end waits for this, or has given up.
    let _ = report.send(Progress::Ended(outcome));
}

type Prepared = Result<(Vcpu, Vm), (&'static str, io::Error)>;

fn prepare(program: Program) -> Prepared {
    let step = |doing| move |e| (doing, e);
    let host = Host::open(Path::new("/dev/kvm")).map_err(step("opening /dev/kvm"))?;
    let vm = Vm::create(&host, 0).map_err(step("creating a VM"))?;
    let range = PageRange::new(Gpa(0), RAM_BYTES).map_err(|e| ("placing memory", io::Error::other(e)))?;
    let ram = HostRam::allocate(&[range]).map_err(step("reserving memory"))?;
    let cpuid = host.supported_cpuid().map_err(step("asking for CPUID"))?;
    // KVM mends the other vendor's instruction only where it can write to the guest's code.
    let amd = cpuid
        .0
        .iter()
        .any(|e| e.leaf == 0 && e.ebx == u32::from_le_bytes(*b"Auth"));
    let code = program(if amd { VMMCALL } else { VMCALL });
    let map = ram.map();
    let written = map
        .write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))
        .and_then(|()| map.write_obj(DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT)))
        .and_then(|()| map.write_obj(PRESENT_WRITABLE | LARGE_PAGE, GuestAddress(DIRECTORY)))
        .and_then(|()| map.write_slice(&code, GuestAddress(CODE)));
    written.map_err(|e| ("writing the program", io::Error::other(e)))?;
    for (slot, region) in (0..).zip(ram.regions()) {
        vm.map_slot(slot, Arc::clone(region), None)
            .map_err(step("mapping memory"))?;
    }
    let vcpu = vm.create_vcpu(0).map_err(step("creating a vCPU"))?;
    vcpu.set_cpuid(&cpuid).map_err(step("setting CPUID"))?;
    let general = General {
        rip: CODE,
        rsp: RAM_BYTES.saturating_sub(PAGE_SIZE),
        ..General::default()
    };
    let mut state = BootState::long_mode(general, PML4);
    state.control.cr4 |= CR4_OSFXSR;
    vcpu.set_state(&state).map_err(step("setting registers"))?;
    Ok((vcpu, vm))
}

fn watch(vcpu: &mut Vcpu, report: &Sender<Progress>) -> Outcome {
    let _guard = match vcpu.listen_for_kicks() {
        Ok(guard) => guard,
        Err(e) => return failed("handling signals", &e),
    };
    let mut at = Step::Start;
    // Nobody waits any longer once the time is up; the same below.
    let _ = report.send(Progress::Passed(at));
    let mut asked = false;
    let stuck = |at, how: String| Outcome::Stuck { at, how };
    // The program makes four exits; a KVM that makes many more is no good either.
    for _ in 0..64 {
        match vcpu.enter() {
            Ok(Exit::PioOut { port: PORT, data, .. }) => {
                at = match data {
                    [1] => Step::Sse,
                    [2] => Step::Hypercall,
                    _ if asked => return Outcome::Good,
                    _ => return stuck(Step::Hypercall, "was not sent to user space".into()),
                };
                let _ = report.send(Progress::Passed(at));
            }
            Ok(Exit::Convert { reply, .. }) => {
                asked = true;
                reply.set(Answer::Done);
            }
            Ok(Exit::Interrupted) => return stuck(at, "never came back".into()),
            Ok(other) => return stuck(at, format!("ended the VM with {}", name(&other))),
            Err(e) => return stuck(at, e.to_string()),
        }
    }
    stuck(at, "made no progress".into())
}

fn name(exit: &Exit<'_>) -> String {
    let text = format!("{exit:?}");
    let end = text.find(['{', '(']).unwrap_or(text.len());
    text.get(..end).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_guest_that_never_exits_is_kicked_out() {
        if Host::open(Path::new("/dev/kvm")).is_err() {
            println!("skipped: /dev/kvm cannot be opened");
            return;
        }
        // jmp to itself
        let outcome = run_program(|_| vec![0xeb, 0xfe]);
        let how = "never came back".to_owned();
        assert_eq!(outcome, Outcome::Stuck { at: Step::Start, how });
    }

    #[test]
    fn the_probe_ends_in_time_whatever_the_host_is() {
        let start = Instant::now();
        let outcome = run();
        assert!(start.elapsed() < Duration::from_secs(20), "{outcome:?}");
        if !Path::new("/dev/kvm").exists() {
            assert!(matches!(
                outcome,
                Outcome::Failed {
                    doing: "opening /dev/kvm",
                    ..
                }
            ));
        }
    }
}
