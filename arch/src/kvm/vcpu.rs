//! A vCPU: its state, entering it, and what came out.
// UNSAFETY: the shared `kvm_run` page, and a signal handler that writes to it.
#![expect(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MP_STATE_HALTED, Msrs, kvm_cpuid_entry2,
    kvm_dtable, kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::uapi;
use crate::addr::{Gpa, PAGE_SIZE, PageRange};
use crate::exit::{Exit, PlatformExit, Reply};
use crate::mem::Visibility;
use crate::x86::cpuid::CpuidTable;
use crate::x86::regs::{BootState, Segment, Table};

/// A vCPU. Enter it from one thread only; that thread calls [`Vcpu::listen_for_kicks`] first.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
}

/// Why a vCPU could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// `KVM_RUN` failed.
    #[error("KVM_RUN on vCPU {index}")]
    Run {
        /// Index of the vCPU.
        index: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// KVM left with a reason that no configuration of cvmm can produce.
    #[error("KVM_RUN on vCPU {index} left with reason {reason}, which cvmm does not know")]
    UnknownExit {
        /// Index of the vCPU.
        index: u32,
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
}

const MSR_IA32_CR_PAT: u32 = 0x277;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

impl Vcpu {
    pub(super) fn new(index: u32, fd: VcpuFd) -> Self {
        Self { fd, index }
    }

    /// Index, equal to the APIC id.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The descriptor, for a platform's own commands.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.fd` owns the descriptor and keeps it open for as long as the borrow of `self` lasts.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }

    /// `KVM_SET_CPUID2`.
    ///
    /// # Errors
    /// The kernel's; `E2BIG` for more than 256 entries.
    pub fn set_cpuid(&self, table: &CpuidTable) -> io::Result<()> {
        let entries: Vec<_> = table
            .0
            .iter()
            .map(|e| kvm_cpuid_entry2 {
                function: e.leaf,
                index: e.subleaf.unwrap_or(0),
                flags: if e.subleaf.is_some() {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
                padding: [0; 3],
            })
            .collect();
        let table = CpuId::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok(self.fd.set_cpuid2(&table)?)
    }

    /// Gives the vCPU its boot state. CPUID must be set before, because it decides which bits are legal.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_state(&self, state: &BootState) -> io::Result<()> {
        let (segments, control, general) = (&state.segments, &state.control, &state.general);
        let mut sregs = self.fd.get_sregs()?;
        sregs.cs = segment(segments.cs);
        sregs.ds = segment(segments.ds);
        sregs.es = segment(segments.es);
        sregs.fs = segment(segments.fs);
        sregs.gs = segment(segments.gs);
        sregs.ss = segment(segments.ss);
        sregs.tr = segment(segments.tr);
        sregs.ldt = segment(segments.ldtr);
        sregs.gdt = table(segments.gdtr);
        sregs.idt = table(segments.idtr);
        sregs.cr0 = control.cr0;
        sregs.cr3 = control.cr3;
        sregs.cr4 = control.cr4;
        sregs.efer = control.efer;
        self.fd.set_sregs(&sregs)?;
        self.fd.set_regs(&kvm_regs {
            rip: general.rip,
            rsp: general.rsp,
            rflags: general.rflags,
            rdx: general.rdx,
            rsi: general.rsi,
            rdi: general.rdi,
            ..Default::default()
        })?;
        self.fd.set_fpu(&kvm_fpu {
            fcw: control.fcw,
            mxcsr: control.mxcsr,
            ..Default::default()
        })?;
        self.set_xcr0(control.xcr0)?;
        self.set_msrs(&[
            (MSR_IA32_CR_PAT, control.pat),
            (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
        ])
    }

    fn set_msrs(&self, values: &[(u32, u64)]) -> io::Result<()> {
        let entries: Vec<_> = values
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        let done = self.fd.set_msrs(&msrs)?;
        match values.get(done) {
            None => Ok(()),
            Some((index, value)) => Err(io::Error::other(format!(
                "KVM refuses value {value:#x} for MSR {index:#x}"
            ))),
        }
    }

    fn set_xcr0(&self, value: u64) -> io::Result<()> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        if let Some(first) = xcrs.xcrs.first_mut() {
            *first = kvm_xcr {
                xcr: 0,
                value,
                ..Default::default()
            };
        }
        Ok(self.fd.set_xcrs(&xcrs)?)
    }

    /// Frequency of the time-stamp counter as the vCPU has it (`KVM_GET_TSC_KHZ`).
    ///
    /// # Errors
    /// The kernel's.
    pub fn tsc_khz(&self) -> io::Result<u32> {
        Ok(self.fd.get_tsc_khz()?)
    }

    /// Lets the vCPU wait as if halted, until another one starts it. An SNP guest's AP needs this.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_halted(&self) -> io::Result<()> {
        Ok(self.fd.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_HALTED,
        })?)
    }

    /// Fills the guest's page tables for `range` (`KVM_PRE_FAULT_MEMORY`), so that first touches do not exit.
    ///
    /// # Errors
    /// The kernel's; `EOPNOTSUPP` before the launch is sealed.
    pub fn pre_fault(&self, range: PageRange) -> io::Result<()> {
        let mut request = uapi::PreFaultMemory {
            gpa: range.start().0,
            size: range.bytes(),
            ..Default::default()
        };
        while request.size != 0 {
            match uapi::pre_fault(self.as_fd(), &mut request) {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Makes this thread's kicks end `KVM_RUN` of this vCPU. Call it on the thread that enters the vCPU and
    /// keep the guard while it does.
    ///
    /// # Errors
    /// The signal handler could not be installed.
    pub fn listen_for_kicks(&mut self) -> io::Result<KickGuard> {
        hear_kicks()?;
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points at the live kvm_run page; only the field's address is taken, nothing is read.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        IMMEDIATE_EXIT.set(flag);
        Ok(KickGuard(()))
    }

    /// Enters the guest until it needs something.
    ///
    /// # Errors
    /// `KVM_RUN` failed in a way that is not an exit.
    pub fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        let index = self.index;
        self.fd.get_kvm_run().exit_reason = uapi::EXIT_UNKNOWN;
        let failure = self.fd.run().err();
        self.fd.set_kvm_immediate_exit(0);
        let reason = self.fd.get_kvm_run().exit_reason;
        if let Some(errno) = failure
            && !is_wrong_side(errno.errno(), reason)
        {
            return match errno.errno() {
                libc::EINTR | libc::EAGAIN => Ok(Exit::Interrupted),
                _ => Err(RunError::Run {
                    index,
                    source: errno.into(),
                }),
            };
        }
        if reason == KVM_EXIT_IO {
            return Ok(self.port_io());
        }
        decode(index, reason, self.body()).ok_or(RunError::UnknownExit { index, reason })
    }

    /// Lets KVM finish what the last exit interrupted, without running the guest. Usually that leaves nothing to
    /// serve ([`Exit::Interrupted`]), but it may be the next part of a long request.
    ///
    /// # Errors
    /// As for [`enter`](Self::enter).
    pub fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        self.fd.set_kvm_immediate_exit(1);
        self.enter()
    }

    /// The union of `kvm_run` as bytes.
    fn body(&mut self) -> &mut [u8; 256] {
        let union = &raw mut self.fd.get_kvm_run().__bindgen_anon_1;
        // SAFETY: `union` points at the 256-byte union in the live kvm_run page, any bytes of which are valid
        // u8; the kernel writes it only during KVM_RUN, which needs the `&mut self` that the result borrows.
        unsafe { &mut *union.cast::<[u8; 256]>() }
    }

    fn port_io(&mut self) -> Exit<'_> {
        let body = self.body();
        let (direction, size, port) = (u32::from(body[0]), usize::from(body[1]), word(body, 2));
        let count = usize::try_from(dword(body, 4)).unwrap_or(0);
        let offset = usize::try_from(qword(body, 8)).unwrap_or(0);
        let run = ptr::from_mut(self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: KVM keeps the data of an I/O exit `data_offset` bytes into the mapping that starts at `run`,
        // inside the part that VcpuFd mapped.
        let data = unsafe { run.add(offset) };
        // SAFETY: `count * size` bytes lie there; the kernel touches them only during KVM_RUN, which needs the
        // `&mut self` that the result borrows.
        let data = unsafe { std::slice::from_raw_parts_mut(data, count.saturating_mul(size)) };
        if direction == KVM_EXIT_IO_OUT {
            Exit::PioOut { port, size, data }
        } else {
            Exit::PioIn { port, size, data }
        }
    }
}

/// True if `KVM_RUN` failed because the guest touched memory on its wrong side. With any other error the host failed at
/// giving the guest its page: it has no memory left, or what it has is broken (`EHWPOISON`).
fn is_wrong_side(errno: i32, reason: u32) -> bool {
    reason == KVM_EXIT_MEMORY_FAULT && errno == libc::EFAULT
}

fn word(body: &[u8; 256], at: usize) -> u16 {
    body.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |b| u16::from_ne_bytes(*b))
}

fn dword(body: &[u8; 256], at: usize) -> u32 {
    body.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |b| u32::from_ne_bytes(*b))
}

fn qword(body: &[u8; 256], at: usize) -> u64 {
    body.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |b| u64::from_ne_bytes(*b))
}

/// Turns `kvm_run` into an [`Exit`]. Offsets are those of the structs in Linux 7.2, include/uapi/linux/kvm.h.
fn decode(vcpu: u32, reason: u32, body: &mut [u8; 256]) -> Option<Exit<'_>> {
    Some(match reason {
        KVM_EXIT_MMIO => {
            let gpa = Gpa(qword(body, 0));
            let len = usize::try_from(dword(body, 16)).ok()?.min(8);
            let is_write = body[20] != 0;
            let data = body.get_mut(8..)?.get_mut(..len)?;
            if is_write {
                Exit::MmioWrite { gpa, data }
            } else {
                Exit::MmioRead { gpa, data }
            }
        }
        KVM_EXIT_HYPERCALL if qword(body, 0) == uapi::HC_MAP_GPA_RANGE => {
            let (gpa, pages, attributes) = (qword(body, 8), qword(body, 16), qword(body, 24));
            let to = if attributes & uapi::MAP_GPA_RANGE_ENCRYPTED != 0 {
                Visibility::Private
            } else {
                Visibility::Shared
            };
            let reply = Reply(body.get_mut(56..)?.first_chunk_mut()?);
            Exit::Convert {
                gpa,
                pages,
                to,
                reply,
            }
        }
        KVM_EXIT_MEMORY_FAULT => {
            let private = qword(body, 0) & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
            let (gpa, bytes) = (qword(body, 8), qword(body, 16).max(PAGE_SIZE));
            let wants = if private {
                Visibility::Private
            } else {
                Visibility::Shared
            };
            Exit::WrongSide {
                range: PageRange::new(Gpa(gpa), bytes).ok()?,
                wants,
            }
        }
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_FAIL_ENTRY => Exit::EntryFailed(qword(body, 0)),
        KVM_EXIT_INTERNAL_ERROR => Exit::Internal {
            suberror: dword(body, 0),
            data: [qword(body, 8), qword(body, 16), qword(body, 24), qword(body, 32)],
        },
        KVM_EXIT_SYSTEM_EVENT | uapi::EXIT_TDX | uapi::EXIT_SNP_REQ_CERTS => {
            Exit::Platform(PlatformExit { vcpu, reason, body })
        }
        _ => return None,
    })
}

fn segment(s: Segment) -> kvm_segment {
    let bit = |n: u16| u8::from(s.attributes.wrapping_shr(u32::from(n)) & 1 != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xf) as u8,
        s: bit(4),
        dpl: bit(5) | bit(6).wrapping_shl(1),
        present: bit(7),
        avl: bit(8),
        l: bit(9),
        db: bit(10),
        g: bit(11),
        ..Default::default()
    }
}

fn table(t: Table) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        ..Default::default()
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread enters; null if it enters none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// While it lives, a kick of this thread ends `KVM_RUN`.
#[derive(Debug)]
pub struct KickGuard(());

impl Drop for KickGuard {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Signal that means "come out of the guest".
pub fn kick_signal() -> i32 {
    vmm_sys_util::signal::SIGRTMIN()
}

/// Lets kicks interrupt this thread, also if whoever started cvmm had the signal blocked, which programs inherit.
fn hear_kicks() -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)?;
    vmm_sys_util::signal::unblock_signal(kick_signal()).map_err(|e| io::Error::other(e.to_string()))
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `flag` was taken from a kvm_run page by `listen_for_kicks` on this very thread, and the
        // guard that clears it is dropped before the vCPU. A signal in the middle of `enter` may race with
        // its own plain write of 0, which at worst loses a kick that the loop has already seen; volatile
        // keeps the store in place.
        unsafe { flag.write_volatile(1) };
    }
}

#[cfg(test)]
mod tests;
