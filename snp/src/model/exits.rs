//! What leaves the guest on its behalf: page-state changes, memory faults, certificates for extended reports.

use crate::model::Model;

/// Entries in a GHCB's page-state-change buffer (GHCB standardisation 2.03, "SNP Page State Change").
const PSC_ENTRIES_MAX: usize = 253;
const LARGE: u64 = 512;
/// Answers in SW_EXITINFO2.
const PSC_DONE: u64 = 0;
const PSC_INVALID_HEADER: u64 = 1 << 32 | 1;
const PSC_INVALID_ENTRY: u64 = 1 << 32 | 2;
const PSC_GENERIC: u64 = 0x100 << 32;

/// What a guest asks for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PscOperation {
    /// Private to the guest.
    Private,
    /// Shared with the host.
    Shared,
    /// PSMASH, UNSMASH: KVM does nothing.
    Other,
}

/// One entry of a page-state change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PscEntry {
    /// Pages that are done already.
    pub done: u64,
    /// Its frame.
    pub gfn: u64,
    /// What is asked for.
    pub operation: PscOperation,
    /// 512 pages.
    pub large: bool,
}

/// A page-state change under way.
#[derive(Clone, Debug)]
pub struct Psc {
    entries: Vec<PscEntry>,
    next: usize,
    in_flight: usize,
}

/// What `KVM_RUN` does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `KVM_EXIT_HYPERCALL` with these three arguments.
    Exit([u64; 3]),
    /// The guest goes on with this answer.
    Guest(u64),
    /// `KVM_RUN` fails.
    Errno(i32),
}

impl Psc {
    /// The next range that user space converts (`snp_do_psc`), adjacent entries of one kind taken together.
    fn step(&mut self) -> Step {
        loop {
            let (mut gfn, mut pages, mut large) = (0, 0, false);
            while let Some(entry) = self.entries.get(self.next) {
                let size = if entry.large { LARGE } else { 1 };
                if entry.done > size || !entry.gfn.is_multiple_of(size) {
                    return Step::Guest(PSC_INVALID_ENTRY);
                }
                gfn = entry.gfn.saturating_add(entry.done);
                pages = size.saturating_sub(entry.done);
                // What is half done goes on by small pages, on its own.
                large = entry.large && entry.done == 0;
                if pages != 0 {
                    break;
                }
                self.next = self.next.saturating_add(1);
            }
            let Some(first) = self.entries.get(self.next).copied() else {
                return Step::Guest(PSC_DONE);
            };
            self.in_flight = 1;
            let rest = self.entries.iter().skip(self.next.saturating_add(1));
            for entry in rest {
                let adjoins = entry.operation == first.operation
                    && entry.gfn == first.gfn.saturating_add(pages)
                    && entry.done == 0
                    && entry.large == large;
                if !adjoins {
                    break;
                }
                self.in_flight = self.in_flight.saturating_add(1);
                pages = pages.saturating_add(if large { LARGE } else { 1 });
            }
            let private = match first.operation {
                PscOperation::Private => 1 << 4,
                PscOperation::Shared => 0,
                PscOperation::Other => {
                    self.next = self.next.saturating_add(self.in_flight);
                    continue;
                }
            };
            return Step::Exit([gfn << 12, pages, private | u64::from(first.large)]);
        }
    }

    /// User space has answered `ret` (`snp_complete_one_psc`); `hypercall.ret` is checked before.
    pub fn complete(&mut self, ret: u64) -> Step {
        match i32::try_from(ret) {
            Ok(0) => {
                self.next = self.next.saturating_add(self.in_flight);
                self.step()
            }
            Ok(libc::EINVAL | libc::EAGAIN) => Step::Guest(PSC_GENERIC),
            _ => Step::Errno(libc::EINVAL),
        }
    }
}

/// How an access of the guest ends that KVM cannot serve (mmu.c:kvm_mmu_faultin_pfn, kvm_mmu_faultin_pfn_gmem).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is served.
    Served,
    /// No slot: it becomes `KVM_EXIT_MMIO`.
    Mmio,
    /// `KVM_RUN` fails with this errno and `KVM_EXIT_MEMORY_FAULT`: flags, address, size.
    Fault {
        /// Errno.
        errno: i32,
        /// Bit 3: the access was private.
        flags: u64,
        /// The page.
        gpa: u64,
    },
}

/// An extended report request that waits for certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CertExit {
    /// Where they go.
    pub gpa: u64,
    /// Pages that there are.
    pub pages: u64,
}

/// What comes of it once user space has answered (`snp_complete_req_certs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertOutcome {
    /// Firmware makes the report; with `immediate_exit`, `KVM_RUN` fails with `EINTR` right after.
    Report {
        /// Which it does.
        interrupted: bool,
    },
    /// The guest is told how many pages it takes.
    TooSmall(u64),
    /// The guest is told to try again.
    Busy,
    /// The guest is told that it failed.
    Failed,
    /// `KVM_RUN` fails.
    Errno(i32),
}

impl Model {
    /// The guest asks for page-state changes by its GHCB (`snp_begin_psc`); `capability` is what
    /// `KVM_CAP_EXIT_HYPERCALL` was given.
    pub fn page_state_change(&self, entries: Vec<PscEntry>, capability: u64) -> (Psc, Step) {
        let mut psc = Psc {
            entries,
            next: 0,
            in_flight: 0,
        };
        let step = if capability >> 12 & 1 == 0 {
            Step::Guest(PSC_GENERIC)
        } else if psc.entries.len() > PSC_ENTRIES_MAX {
            Step::Guest(PSC_INVALID_HEADER)
        } else {
            psc.step()
        };
        (psc, step)
    }

    /// The guest touches a page; `broken` is what its guest_memfd answers, if anything is wrong with that.
    pub fn access(&self, gpa: u64, private: bool, broken: Option<i32>) -> Access {
        const FLAG_PRIVATE: u64 = 1 << 3;
        let gfn = gpa >> 12;
        let fault = |errno| Access::Fault {
            errno,
            flags: if private { FLAG_PRIVATE } else { 0 },
            gpa: gfn << 12,
        };
        let slot = self.slots.iter().find(|slot| slot.frames.contains(&gfn));
        if private != self.private.contains(&gfn) {
            return fault(libc::EFAULT);
        }
        match (private, slot) {
            (false, None) => Access::Mmio,
            (false, Some(_)) => Access::Served,
            (true, Some(slot)) if slot.gmem => broken.map_or(Access::Served, fault),
            (true, _) => fault(libc::EFAULT),
        }
    }

    /// The guest asks for a report with certificates (`snp_handle_ext_guest_req`): `None` if KVM serves it alone.
    pub fn extended_request(&self, gpa: u64, pages: u64) -> Option<CertExit> {
        self.requests_certificates().then_some(CertExit { gpa, pages })
    }

    /// User space has answered; `pages` is `npages` as it left it.
    pub fn certificates(&self, ret: u32, pages: u64, immediate_exit: bool) -> CertOutcome {
        match i32::try_from(ret) {
            Ok(0) if !self.sev_fd_open => CertOutcome::Errno(libc::EBADF),
            Ok(0) => CertOutcome::Report {
                interrupted: immediate_exit,
            },
            Ok(libc::ENOSPC) => CertOutcome::TooSmall(pages),
            Ok(libc::EAGAIN) => CertOutcome::Busy,
            Ok(libc::EIO) => CertOutcome::Failed,
            _ => CertOutcome::Errno(libc::EINVAL),
        }
    }
}
