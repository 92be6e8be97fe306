//! What a TD asks of its host by TDG.VP.VMCALL, as far as it leaves the kernel, and what comes back to the TD
//! (`handle_tdvmcall`; Intel Guest-Host-Communication Interface 1.5, "TDG.VP.VMCALL").

use super::Model;
use crate::model::RawCmd;

/// Status codes in R10.
const SUCCESS: u64 = 0;
const RETRY: u64 = 1;
const INVALID_OPERAND: u64 = 0x8000_0000_0000_0000;
const ALIGN_ERROR: u64 = 0x8000_0000_0000_0002;
const UNSUPPORTED: u64 = 0x8000_0000_0000_0003;
/// `TDX_MAP_GPA_MAX_LEN`.
const CHUNK: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// A call of the TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// MapGPA: range with or without the shared bit, in bytes.
    MapGpa {
        /// R12.
        gpa: u64,
        /// R13.
        bytes: u64,
    },
    /// GetQuote.
    GetQuote {
        /// R12.
        gpa: u64,
        /// R13.
        bytes: u64,
    },
    /// GetTdVmCallInfo.
    Info {
        /// R12.
        leaf: u64,
    },
    /// SetupEventNotifyInterrupt.
    SetupNotify {
        /// R12.
        vector: u64,
    },
    /// ReportFatalError, with the TD's registers in encoding order.
    FatalError {
        /// RAX to R15.
        registers: [u64; 16],
    },
}

/// How `KVM_RUN` returns to user space, as `struct kvm_run` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdxExit {
    /// `KVM_EXIT_HYPERCALL`, number 12.
    MapGpaRange {
        /// `args[0]`.
        gpa: u64,
        /// `args[1]`.
        pages: u64,
        /// `args[2]`.
        attributes: u64,
    },
    /// `KVM_EXIT_TDX`: number and body from `ret` on.
    Tdx {
        /// `nr`.
        nr: u64,
        /// What follows; the first is `ret` as preset.
        body: [u64; 6],
    },
    /// `KVM_EXIT_SYSTEM_EVENT`, TDX_FATAL.
    Fatal([u64; 16]),
}

/// What a call comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// User space has to do something.
    Exit(TdxExit),
    /// The TD goes on with R10 and R11.
    Guest {
        /// Status.
        r10: u64,
        /// Detail.
        r11: u64,
    },
    /// `KVM_RUN` fails.
    Errno(i32),
}

/// A call that waits for user space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    vcpu: usize,
    what: Waiting,
}

#[derive(Clone, Copy, Debug)]
enum Waiting {
    MapGpa { next: u64, end: u64 },
    Status,
}

fn guest(r10: u64, r11: u64) -> Completion {
    Completion::Guest { r10, r11 }
}

fn tdx(nr: u64, body: [u64; 6]) -> Completion {
    Completion::Exit(TdxExit::Tdx { nr, body })
}

impl Model {
    /// The TD on vCPU `index` makes a call.
    pub fn call(&mut self, index: usize, call: Call) -> Completion {
        if let Err((errno, _)) = self.begin(RawCmd::default()) {
            return Completion::Errno(errno);
        }
        match call {
            Call::MapGpa { gpa, bytes } => self.map_gpa(index, gpa, bytes),
            Call::GetQuote { gpa, bytes } => {
                // `tdx_get_quote`
                if gpa & self.shared_bit() == 0 {
                    return guest(INVALID_OPERAND, 0);
                }
                self.wait(index, Waiting::Status);
                tdx(0x1_0002, [UNSUPPORTED, gpa & !self.shared_bit(), bytes, 0, 0, 0])
            }
            // `tdx_get_td_vm_call_info`
            Call::Info { leaf: 0 } => guest(SUCCESS, 0),
            Call::Info { leaf: 1 } => {
                self.wait(index, Waiting::Status);
                tdx(0x1_0000, [SUCCESS, 1, 0, 0, 0, 0])
            }
            Call::Info { .. } => guest(INVALID_OPERAND, 0),
            // `tdx_setup_event_notify_interrupt`
            Call::SetupNotify { vector } if (32..=255).contains(&vector) => {
                self.wait(index, Waiting::Status);
                tdx(0x1_0004, [UNSUPPORTED, vector, 0, 0, 0, 0])
            }
            Call::SetupNotify { .. } => guest(INVALID_OPERAND, 0),
            Call::FatalError { registers } => fatal(registers),
        }
    }

    fn wait(&mut self, vcpu: usize, what: Waiting) {
        self.calls.retain(|pending| pending.vcpu != vcpu);
        self.calls.push(Pending { vcpu, what });
    }

    /// `tdx_map_gpa`.
    fn map_gpa(&mut self, index: usize, gpa: u64, bytes: u64) -> Completion {
        let shared = self.shared_bit();
        if !self.exit_hypercall {
            return guest(UNSUPPORTED, gpa);
        }
        let end = gpa.checked_add(bytes).filter(|end| *end > gpa);
        let legal = |at: u64| at.checked_shr(self.width).unwrap_or(0) == 0;
        let Some(end) = end.filter(|end| {
            let last = end.saturating_sub(1);
            legal(gpa) && legal(last) && gpa & shared == last & shared
        }) else {
            return guest(INVALID_OPERAND, gpa);
        };
        if !gpa.is_multiple_of(PAGE) || !bytes.is_multiple_of(PAGE) {
            return guest(ALIGN_ERROR, gpa);
        }
        self.map_chunk(index, gpa, end)
    }

    /// `__tdx_map_gpa`.
    fn map_chunk(&mut self, index: usize, next: u64, end: u64) -> Completion {
        let shared = self.shared_bit();
        self.wait(index, Waiting::MapGpa { next, end });
        let private = u64::from(next & shared == 0);
        Completion::Exit(TdxExit::MapGpaRange {
            gpa: next & !shared,
            pages: end.saturating_sub(next).min(CHUNK) / PAGE,
            attributes: private << 4,
        })
    }

    /// User space has answered `ret` and enters vCPU `index` again; an interrupt may be pending meanwhile
    /// (`tdx_complete_vmcall_map_gpa`, `tdx_complete_simple`).
    pub fn complete(&mut self, index: usize, ret: u64, interrupt: bool) -> Completion {
        let at = self.calls.iter().position(|pending| pending.vcpu == index);
        let Some(pending) = at.map(|at| self.calls.swap_remove(at)) else {
            return Completion::Errno(libc::EINVAL);
        };
        match pending.what {
            Waiting::Status => guest(ret, 0),
            Waiting::MapGpa { next, end } => match i32::try_from(ret) {
                Ok(0) => {
                    let next = next.saturating_add(CHUNK);
                    if next >= end {
                        guest(SUCCESS, 0)
                    } else if interrupt {
                        guest(RETRY, next)
                    } else {
                        self.map_chunk(index, next, end)
                    }
                }
                Ok(libc::EAGAIN) => guest(RETRY, next),
                Ok(libc::EINVAL) => guest(INVALID_OPERAND, next),
                _ => Completion::Errno(libc::EINVAL),
            },
        }
    }
}

/// `tdx_report_fatal_error`: all registers but RSP and RBP, which the TD keeps; RAX is the status of TDH.VP.ENTER.
fn fatal(registers: [u64; 16]) -> Completion {
    let mut data = registers;
    for kept in data.iter_mut().skip(4).take(2) {
        *kept = 0;
    }
    Completion::Exit(TdxExit::Fatal(data))
}
