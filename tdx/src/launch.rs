//! The launch as a state machine over [`TdxCommands`]: begin, add pages and vCPUs, finish.
//!
//! KVM adds memory by way of a vCPU, so pages wait for the first one; the order among them is that in which they were
//! added, and only that is measured.

use std::thread;
use std::time::Duration;

use arch::addr::{Gpa, PAGE_SIZE};
use arch::platform::{LaunchPage, PageKind};
use arch::x86::cpuid::CpuidTable;

use crate::attributes;
use crate::commands::{Capabilities, InitVm, MemRegion, Page, TdxCommands};
use crate::cpuid;
use crate::error::{Refusal, TdxError};
use crate::measure::{Measurement, Mrtd};

/// What is fixed when the launch begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// ATTRIBUTES.
    pub attributes: u64,
    /// MRCONFIGID.
    pub mrconfigid: [u8; 48],
    /// MROWNER.
    pub mrowner: [u8; 48],
    /// MROWNERCONFIG.
    pub mrownerconfig: [u8; 48],
}

impl Default for LaunchConfig {
    fn default() -> Self {
        Self {
            attributes: attributes::SEPT_VE_DISABLE,
            mrconfigid: [0; 48],
            mrowner: [0; 48],
            mrownerconfig: [0; 48],
        }
    }
}

/// How often in a row a command may ask to be tried again, and the pause between: a second in all.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// CPUID entries that there is room for at first, and at most. KVM takes 256 back.
const FIRST_ROOM: usize = 256;
const MOST_ROOM: usize = 4096;

/// Sends `command` until it asks for no other try. `EINTR` is a signal before anything was done; `retry` are the
/// errors that pass by themselves.
fn patiently<T>(retry: &[i32], mut command: impl FnMut() -> Result<T, Refusal>) -> Result<T, Refusal> {
    let mut tries = 0;
    loop {
        match command() {
            Err(refusal) if tries < TRIES && is_passing(refusal, retry) => {
                tries = tries.saturating_add(1);
                thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

fn is_passing(refusal: Refusal, retry: &[i32]) -> bool {
    refusal.errno() == libc::EINTR || retry.contains(&refusal.errno())
}

/// Sends a command that fails with `E2BIG` if it has no room for its answer, with more and more.
fn roomily<T>(mut command: impl FnMut(usize) -> Result<T, Refusal>) -> Result<T, Refusal> {
    let mut room = FIRST_ROOM;
    loop {
        match patiently(&[libc::EBUSY], || command(room)) {
            Err(refusal) if refusal.errno() == libc::E2BIG && room < MOST_ROOM => {
                room = room.saturating_mul(2);
            }
            other => return other,
        }
    }
}

/// What TDs of `commands`' VM may have.
///
/// # Errors
/// The kernel's.
pub fn capabilities(commands: &mut impl TdxCommands) -> Result<Capabilities, Refusal> {
    roomily(|room| commands.capabilities(room))
}

/// A launch under way. Dropping it leaves a VM that cannot run and must be destroyed.
#[derive(Debug)]
pub struct Launching<C> {
    commands: C,
    /// What the host offers to the first vCPU.
    offered: CpuidTable,
    /// What was configured in INIT_VM.
    configured: CpuidTable,
    /// What the vCPUs get, once it has been negotiated.
    agreed: Option<CpuidTable>,
    waiting: Vec<LaunchPage>,
    mrtd: Mrtd,
    user_calls: u64,
}

impl<C: TdxCommands> Launching<C> {
    /// Creates the TD. `offered` is the first vCPU's CPUID, already [adapted](cpuid::adapt). No vCPU may exist yet.
    ///
    /// # Errors
    /// What kernel or module refuses.
    pub fn begin(mut commands: C, config: &LaunchConfig, offered: CpuidTable) -> Result<Self, TdxError> {
        let may = capabilities(&mut commands)?;
        attributes::check(config.attributes, may.attributes)?;
        let init = InitVm {
            attributes: config.attributes,
            xfam: attributes::xfam(may.xfam, &offered),
            mrconfigid: config.mrconfigid,
            mrowner: config.mrowner,
            mrownerconfig: config.mrownerconfig,
            cpuid: cpuid::configure(&may.cpuid, &offered),
        };
        log::debug!("TD: attributes {:#x}, XFAM {:#x}", init.attributes, init.xfam);
        for entry in &init.cpuid.0 {
            log::debug!("TD: configures CPUID {entry:x?}");
        }
        // EBUSY is the cgroup's limit here, and does not pass.
        patiently(&[libc::EAGAIN], || commands.init_vm(&init))?;
        Ok(Self {
            commands,
            offered,
            configured: init.cpuid,
            agreed: None,
            waiting: Vec::new(),
            mrtd: Mrtd::new(),
            user_calls: may.user_calls,
        })
    }

    /// The commands, e.g. to a model.
    pub fn commands(&mut self) -> &mut C {
        &mut self.commands
    }

    /// Bits of GetTdVmCallInfo's answer that user space may set.
    pub fn user_calls(&self) -> u64 {
        self.user_calls
    }

    /// Adds the pages of one range. They must be private and backed by guest_memfd once the first vCPU is added.
    ///
    /// # Errors
    /// A kind of page that TDs do not have; contents that do not fill the range.
    pub fn add(&mut self, page: &LaunchPage) -> Result<(), TdxError> {
        let fills = match page.kind {
            PageKind::Measured | PageKind::Unmeasured => page.bytes.len() as u64 == page.range.bytes(),
            PageKind::Zero => page.bytes.is_empty(),
            PageKind::Secrets | PageKind::Cpuid => return Err(TdxError::PageKind { name: page.name }),
        };
        if !fills {
            return Err(TdxError::Contents {
                gpa: page.range.start(),
                bytes: page.bytes.len(),
            });
        }
        self.waiting.push(page.clone());
        Ok(())
    }

    /// Makes the vCPU with this index ready to run, and loads all pages by way of the first one.
    ///
    /// # Errors
    /// What kernel or module refuses; a CPUID that the machine cannot have.
    pub fn add_vcpu(&mut self, vcpu: &mut C::Vcpu, index: u32) -> Result<(), TdxError> {
        let table = match &self.agreed {
            Some(table) => table.clone(),
            None => self.negotiate(vcpu)?,
        };
        let table = table.for_vcpu(index);
        patiently(&[libc::EBUSY], || self.commands.set_cpuid(vcpu, &table))?;
        patiently(&[libc::EBUSY], || self.commands.init_vcpu(vcpu, 0))?;
        for page in std::mem::take(&mut self.waiting) {
            self.load(vcpu, &page)?;
        }
        Ok(())
    }

    /// Asks what the TD will see, and settles what its vCPUs get.
    fn negotiate(&mut self, vcpu: &mut C::Vcpu) -> Result<CpuidTable, TdxError> {
        let effective = roomily(|room| self.commands.get_cpuid(vcpu, room))?;
        match cpuid::gpaw(&effective) {
            cpuid::GPAW => {}
            found => return Err(TdxError::Gpaw { found }),
        }
        let missing = cpuid::differences(&cpuid::needed(), &effective);
        if !missing.is_empty() {
            return Err(TdxError::Cpuid(missing));
        }
        for dropped in cpuid::differences(&self.configured, &effective) {
            log::debug!("the TDX module does not show what was configured: CPUID {dropped}");
        }
        let agreed = cpuid::reconcile(&effective, &self.offered);
        self.agreed = Some(agreed.clone());
        Ok(agreed)
    }

    fn load(&mut self, vcpu: &mut C::Vcpu, page: &LaunchPage) -> Result<(), TdxError> {
        let source = pages(page);
        let mut region = MemRegion {
            gpa: page.range.start().0,
            source: &source,
            measured: page.kind != PageKind::Unmeasured,
        };
        for (contents, at) in source.iter().zip((region.gpa..).step_by(4096)) {
            self.mrtd.add(Gpa(at));
            if region.measured {
                self.mrtd.extend(Gpa(at), &contents.0);
            }
        }
        let mut stalled = 0;
        while !region.source.is_empty() {
            let before = region.source.len();
            let answer = self.commands.init_mem_region(vcpu, &mut region);
            let moved = region.source.len() != before;
            stalled = if moved { 0 } else { stalled };
            match answer {
                Ok(()) if !moved => {
                    return Err(TdxError::NoProgress {
                        gpa: page.range.start(),
                    });
                }
                Ok(()) => {}
                Err(refusal) if stalled < TRIES && is_passing(refusal, &[libc::EAGAIN, libc::EBUSY]) => {
                    stalled = stalled.saturating_add(1);
                    if !moved {
                        thread::sleep(PAUSE);
                    }
                }
                Err(refusal) => return Err(refusal.into()),
            }
        }
        Ok(())
    }

    /// Seals the TD. The commands come back, with the MRTD that its reports will state.
    ///
    /// # Errors
    /// What kernel or module refuses. The VM must be destroyed then.
    pub fn finish(mut self) -> Result<(C, Measurement), TdxError> {
        if self.agreed.is_none() {
            return Err(TdxError::NoVcpu);
        }
        patiently(&[libc::EBUSY], || self.commands.finalize_vm())?;
        Ok((self.commands, self.mrtd.digest()))
    }
}

/// Contents of a range as the command wants them.
fn pages(page: &LaunchPage) -> Vec<Page> {
    let count = usize::try_from(page.range.bytes() / PAGE_SIZE).unwrap_or(0);
    let mut pages = vec![Page([0; 4096]); count];
    for (to, from) in pages.iter_mut().zip(page.bytes.chunks_exact(4096)) {
        to.0.copy_from_slice(from);
    }
    pages
}

#[cfg(test)]
mod on_model;
#[cfg(test)]
mod tests;
