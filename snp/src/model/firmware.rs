//! The security processor's side of a launch (SEV-SNP Firmware ABI, revision 1.58, "SNP_LAUNCH_START", "…_UPDATE",
//! "…_FINISH").

use arch::addr::{Gpa, PAGE_SIZE};

use crate::bytes::{le32, put};
use crate::commands::Identity;
use crate::error::FirmwareStatus;
use crate::id_block::IdBlockError;
use crate::measure::{Chain, Measurement, PAGE, PageType, sha384};
use crate::policy::Policy;
use crate::vmsa::Vmsa;

const INVALID_GUEST_STATE: u32 = 2;
const POLICY_FAILURE: u32 = 7;
const BAD_SIGNATURE: u32 = 0xa;
const BAD_MEASUREMENT: u32 = 0xb;
const INVALID_PARAM: u32 = 0x16;

/// Registers of a CPUID answer that firmware clears.
#[derive(Clone, Copy, Debug)]
pub struct CpuidRule {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Bits that must be clear in EAX, EBX, ECX, EDX.
    pub clear: [u32; 4],
}

/// Firmware and its context for one guest.
#[derive(Debug)]
pub struct Firmware {
    /// ABI version, major and minor.
    pub abi: (u8, u8),
    /// CPUID values that are refused.
    pub cpuid: Vec<CpuidRule>,
    /// The next command fails with this status.
    pub fail_next: Option<FirmwareStatus>,
    chain: Chain,
    policy: u64,
    finished: bool,
}

impl Default for Firmware {
    fn default() -> Self {
        Self {
            abi: (1, 58),
            cpuid: Vec::new(),
            fail_next: None,
            chain: Chain::new(),
            policy: 0,
            finished: false,
        }
    }
}

impl Firmware {
    pub(super) fn digest(&self) -> Measurement {
        self.chain.digest()
    }

    fn injected(&mut self) -> Result<(), u32> {
        self.fail_next.take().map_or(Ok(()), |status| Err(status.0))
    }

    pub(super) fn start(&mut self, policy: u64) -> Result<(), u32> {
        self.injected()?;
        if Policy::stated(policy).min_abi() > self.abi {
            return Err(POLICY_FAILURE);
        }
        self.policy = policy;
        Ok(())
    }

    pub(super) fn update(
        &mut self,
        kind: PageType,
        gfn: u64,
        source: Option<&mut [u8; PAGE]>,
    ) -> Result<(), u32> {
        self.injected()?;
        if self.finished {
            return Err(INVALID_GUEST_STATE);
        }
        let mut contents = [0; 48];
        match (kind, source) {
            (PageType::Normal, Some(page)) => contents = sha384(page.as_slice()),
            (PageType::Cpuid, Some(page)) => self.check_cpuid(page)?,
            _ => {}
        }
        self.chain
            .page(kind, Gpa(gfn.saturating_mul(PAGE_SIZE)), &contents);
        Ok(())
    }

    /// Corrects the page in place and refuses it if anything had to be corrected.
    fn check_cpuid(&self, page: &mut [u8; PAGE]) -> Result<(), u32> {
        let mut answer = Ok(());
        for entry in page.split_at_mut(16).1.chunks_exact_mut(48).take(64) {
            let word = |entry: &[u8], at| le32(entry, at).unwrap_or(0);
            let key = (word(entry, 0), word(entry, 4));
            for rule in self.cpuid.iter().filter(|r| (r.leaf, r.subleaf) == key) {
                for (at, clear) in [24, 28, 32, 36].into_iter().zip(rule.clear) {
                    let value = word(entry, at);
                    if value & clear != 0 {
                        put(entry, at, &(value & !clear).to_le_bytes());
                        answer = Err(INVALID_PARAM);
                    }
                }
            }
        }
        answer
    }

    pub(super) fn vmsa(&mut self, vmsa: &Vmsa) {
        self.chain.vmsa(vmsa);
    }

    pub(super) fn finish(&mut self, identity: &Identity) -> Result<(), u32> {
        self.injected()?;
        if let Some((block, auth)) = &identity.id_block {
            auth.check(block).map_err(|_| BAD_SIGNATURE)?;
            match block.check(&self.digest(), Policy::stated(self.policy)) {
                Err(IdBlockError::OtherPolicy { .. }) => return Err(POLICY_FAILURE),
                Err(_) => return Err(BAD_MEASUREMENT),
                Ok(()) => {}
            }
        }
        self.finished = true;
        Ok(())
    }
}
