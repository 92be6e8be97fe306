//! The launch as a state machine over [`SevCommands`]: begin, add pages and vCPUs, finish. Each step keeps the
//! digest that firmware keeps, so that a mismatch with an ID block is known before firmware is asked.

use arch::addr::{PAGE_SIZE, PageRange};
use arch::platform::{LaunchPage, PageKind};
use arch::x86::regs::BootState;

use crate::commands::{Identity, SevCommands};
use crate::cpuid_page;
use crate::error::{FirmwareStatus, Refusal, SnpError};
use crate::measure::{Chain, Measurement, PAGE, PageType};
use crate::policy::Policy;
use crate::vmsa::{SevFeatures, Vmsa};

/// What firmware answers to CPUID values that it does not allow.
const INVALID_PARAM: FirmwareStatus = FirmwareStatus(0x16);

/// What is fixed when the launch begins.
#[derive(Clone, Debug)]
pub struct LaunchConfig {
    /// Features of all save areas, with [`SevFeatures::SNP`].
    pub features: SevFeatures,
    /// The guest policy.
    pub policy: Policy,
    /// Identity beside the digest.
    pub identity: Identity,
    /// Extended report requests come to user space.
    pub certificates: bool,
}

impl Default for LaunchConfig {
    fn default() -> Self {
        Self {
            features: SevFeatures::SNP,
            policy: Policy::default(),
            identity: Identity::default(),
            certificates: false,
        }
    }
}

/// A launch under way. Dropping it leaves a VM that cannot run and must be destroyed.
#[derive(Debug)]
pub struct Launching<C> {
    commands: C,
    config: LaunchConfig,
    chain: Chain,
}

impl<C: SevCommands> Launching<C> {
    /// Initialises the VM and creates the guest context. No vCPU may exist yet.
    ///
    /// # Errors
    /// What kernel or firmware refuses.
    pub fn begin(mut commands: C, config: LaunchConfig) -> Result<Self, SnpError> {
        commands.init2(config.features.request())?;
        if config.certificates {
            commands.enable_req_certs()?;
        }
        commands.launch_start(config.policy)?;
        Ok(Self {
            commands,
            config,
            chain: Chain::new(),
        })
    }

    /// Adds the pages of one range. They must be private and backed by guest_memfd.
    ///
    /// After [`SnpError::CpuidRejected`], `page` holds what firmware would accept, and may be added again once the
    /// vCPUs are given the same values.
    ///
    /// # Errors
    /// What kernel or firmware refuses; contents that do not fill the range.
    pub fn add(&mut self, page: &mut LaunchPage) -> Result<(), SnpError> {
        let kind = PageType::from(page.kind);
        let mut chain = self.chain;
        chain.range(kind, page.range, &page.bytes)?;
        let mut source = Source::new(page);
        let sent = (page.kind == PageKind::Cpuid).then(|| source.bytes().to_vec());
        let loaded = self.load(kind, page.range, &mut source);
        if let Err(SnpError::Refused(Refusal {
            firmware: Some(INVALID_PARAM),
            ..
        })) = &loaded
            && let Some(sent) = sent
        {
            let corrections = cpuid_page::corrections(&sent, source.bytes());
            if !corrections.is_empty() {
                page.bytes = source.bytes().to_vec();
                return Err(SnpError::CpuidRejected {
                    gpa: page.range.start(),
                    corrections,
                });
            }
        }
        loaded?;
        self.chain = chain;
        Ok(())
    }

    fn load(&mut self, kind: PageType, range: PageRange, source: &mut Source) -> Result<(), SnpError> {
        let first = range.start().0 / PAGE_SIZE;
        let pages = range.bytes() / PAGE_SIZE;
        let mut done = 0;
        let mut retried = false;
        while done < pages {
            let (gfn, left) = (first.saturating_add(done), pages.saturating_sub(done));
            match self.commands.launch_update(kind, gfn, left, source.rest(done)) {
                Ok(0) => return Err(SnpError::NoProgress { gpa: range.start() }),
                Ok(added) => {
                    // KVM stops at the end of a memory slot and before a page that fails.
                    done = done.saturating_add(added);
                    retried = false;
                }
                // A signal at the first page looks like this, and like nothing else.
                Err(refusal) if !retried && refusal.errno() == libc::EIO && refusal.firmware.is_none() => {
                    retried = true;
                }
                Err(refusal) => return Err(refusal.into()),
            }
        }
        Ok(())
    }

    /// Counts the next vCPU, which starts with `state`; its registers must be set before [`Self::finish`].
    pub fn add_vcpu(&mut self, state: &BootState) {
        self.chain.vmsa(&Vmsa::new(state, self.config.features));
    }

    /// The commands, e.g. to a model.
    pub fn commands(&mut self) -> &mut C {
        &mut self.commands
    }

    /// The digest of what was added so far.
    pub fn digest(&self) -> Measurement {
        self.chain.digest()
    }

    /// Seals the guest. The commands come back with the digest that its reports will state.
    ///
    /// # Errors
    /// An ID block for something else; what kernel or firmware refuses. The VM must be destroyed then.
    pub fn finish(mut self) -> Result<(C, Measurement), SnpError> {
        let digest = self.digest();
        if let Some((block, _)) = &self.config.identity.id_block {
            block.check(&digest, self.config.policy)?;
        }
        self.commands.launch_finish(&self.config.identity)?;
        Ok((self.commands, digest))
    }
}

/// Page-aligned copy of a range's contents, as the command wants it.
struct Source {
    buffer: Vec<u8>,
    start: usize,
    len: usize,
}

impl Source {
    fn new(page: &LaunchPage) -> Self {
        let len = match page.kind {
            PageKind::Zero => 0,
            PageKind::Measured | PageKind::Unmeasured | PageKind::Secrets | PageKind::Cpuid => {
                usize::try_from(page.range.bytes()).unwrap_or(usize::MAX)
            }
        };
        let align = PAGE;
        let mut buffer = vec![0; len.saturating_add(align)];
        let start = buffer.as_ptr().align_offset(align).min(align);
        for (slot, byte) in buffer.iter_mut().skip(start).take(len).zip(&page.bytes) {
            *slot = *byte;
        }
        Self { buffer, start, len }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer
            .get(self.start..)
            .and_then(|b| b.get(..self.len))
            .unwrap_or_default()
    }

    /// Contents from page `done` on.
    fn rest(&mut self, done: u64) -> &mut [u8] {
        let skip = usize::try_from(done.saturating_mul(PAGE_SIZE)).unwrap_or(usize::MAX);
        let bytes = self
            .buffer
            .get_mut(self.start..)
            .and_then(|b| b.get_mut(..self.len));
        bytes.and_then(|b| b.get_mut(skip..)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
