//! The TDX module's side of a launch (Intel TDX Module 1.5 ABI specification, "TDH.MNG.INIT", "TDH.MEM.PAGE.ADD",
//! "TDH.MR.EXTEND", "TDH.MR.FINALIZE"). MRTD is computed here on its own, without `measure`, so that the two check
//! each other.

use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use sha2::{Digest, Sha384};

use crate::commands::{Capabilities, InitVm};

/// `TDX_OPERAND_INVALID`; the operand's number is in the low half.
const OPERAND_INVALID: u64 = 0xc000_0100_0000_0000;
const OPERAND_ATTRIBUTES: u64 = 64;
const OPERAND_XFAM: u64 = 65;
const OPERAND_CPUID_CONFIG: u64 = 69;
const SEPT_VE_DISABLE: u64 = 1 << 28;
/// x87 and SSE, which XFAM cannot leave out.
const XFAM_ALWAYS: u64 = 3;
/// R11 of GetTdVmCallInfo, leaf 1: SetupEventNotifyInterrupt.
const USER_CALLS: u64 = 2;
const EXTEND_BYTES: usize = 256;

/// The module, with the faults that a test wants.
#[derive(Clone, Debug)]
pub struct Module {
    /// Bits of ATTRIBUTES that KVM and module offer.
    pub attributes: u64,
    /// Bits of XFAM that are offered.
    pub xfam: u64,
    /// Configurable CPUID bits as the module states them; KVM leaves some out of its capabilities.
    pub configurable: CpuidTable,
    /// CPUID of a TD where nothing is configurable.
    pub native: CpuidTable,
    /// This many TDH.MNG.INITs (really TDH.MNG.KEY.CONFIGs) find no entropy.
    pub without_entropy: u32,
    /// This many TDH.MR.FINALIZEs find the TD busy.
    pub busy: u32,
    /// `Some(n)`: the SEAMCALL after n others fails for no reason that KVM knows.
    pub fails_after: Option<u32>,
    /// TDH.MNG.INIT refuses this operand.
    pub refuses: Option<u64>,
    /// TDG.VP.INFO shows these ATTRIBUTES, whatever the TD was made with.
    pub shows: Option<u64>,
    /// Metadata of CPUID cannot be read.
    pub cpuid_unreadable: bool,
    configured: CpuidTable,
    granted: u64,
    chain: Sha384,
    mrtd: Option<[u8; 48]>,
}

impl Default for Module {
    fn default() -> Self {
        // Leaves, subleaves and masks of the kind that a module 1.5 states.
        let configurable = CpuidTable(vec![
            CpuidEntry::new(0x1, None, [0x0fff_3fff, 0x00ff_0000, 0x0100_0000, 0x1000_0000]),
            CpuidEntry::new(0x4, Some(0), [0xffff_c3ff, u32::MAX, u32::MAX, 7]),
            CpuidEntry::new(0x7, Some(0), [0, 0x0004_0810, 0x0000_0020, 0x0000_0010]),
            CpuidEntry::new(0x1f, Some(0), [0x1f, 0xffff, 0xff00, 0]),
            CpuidEntry::new(0x1f, Some(1), [0x1f, 0xffff, 0xff00, 0]),
            CpuidEntry::new(0x8000_0008, None, [0, 0x200, 0, 0]),
        ]);
        let native = CpuidTable(vec![
            CpuidEntry::new(0, None, [0x21, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            CpuidEntry::new(0x1, None, [0, 0x800, 0x8020_3203, 0x0f8b_fbff]),
            CpuidEntry::new(0x4, Some(0), [0x121, 0, 0, 0]),
            CpuidEntry::new(0x7, Some(0), [0, 0x219c_0529, 0, 0]),
            CpuidEntry::new(0xb, Some(0), [0, 1, 0x100, 0]),
            CpuidEntry::new(0xd, Some(0), [7, 0x340, 0x340, 0]),
            CpuidEntry::new(0x1f, Some(0), [0, 0, 0x100, 0]),
            CpuidEntry::new(0x1f, Some(1), [0, 0, 0x201, 0]),
            CpuidEntry::new(0x21, Some(0), [0, 0x6574_6e49, 0x2020_2020, 0x5844_546c]),
            CpuidEntry::new(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
            CpuidEntry::new(0x8000_0001, None, [0, 0, 0x121, 0x2c10_0800]),
            CpuidEntry::new(0x8000_0008, None, [0x3934, 0, 0, 0]),
        ]);
        Self {
            attributes: SEPT_VE_DISABLE,
            xfam: 0xe7,
            configurable,
            native,
            without_entropy: 0,
            busy: 0,
            fails_after: None,
            refuses: None,
            shows: None,
            cpuid_unreadable: false,
            configured: CpuidTable::default(),
            granted: 0,
            chain: Sha384::new(),
            mrtd: None,
        }
    }
}

/// TSX and WAITPKG, which KVM keeps from TDs (`tdx_unsupported_cpuid`).
pub(super) fn unsupported(entry: &CpuidEntry) -> bool {
    entry.leaf == 7 && entry.subleaf.unwrap_or(0) == 0 && (entry.ebx & TSX | entry.ecx & WAITPKG) != 0
}

const TSX: u32 = 1 << 4 | 1 << 11;
const WAITPKG: u32 = 1 << 5;

fn registers(entry: &CpuidEntry) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

impl Module {
    /// What KVM makes of it for user space (`init_kvm_tdx_caps`, `td_init_cpuid_entry2`).
    pub(super) fn capabilities(&self) -> Capabilities {
        let mut cpuid = self.configurable.clone();
        for entry in &mut cpuid.0 {
            if entry.leaf == 0x8000_0008 {
                entry.eax |= 0x00ff_0000;
            }
            if entry.leaf == 7 && entry.subleaf == Some(0) {
                entry.ebx &= !TSX;
                entry.ecx &= !WAITPKG;
            }
        }
        Capabilities {
            attributes: self.attributes,
            xfam: self.xfam,
            user_calls: USER_CALLS,
            cpuid,
        }
    }

    /// A SEAMCALL; true if it fails.
    pub(super) fn fails(&mut self) -> bool {
        match self.fails_after {
            Some(0) => true,
            Some(left) => {
                self.fails_after = left.checked_sub(1);
                false
            }
            None => false,
        }
    }

    /// TDH.MNG.INIT; the error is its status.
    pub(super) fn initialise(&mut self, init: &InitVm) -> Result<(), u64> {
        let invalid = |operand: u64| Err(OPERAND_INVALID | operand);
        if let Some(operand) = self.refuses {
            return invalid(operand);
        }
        if init.attributes & !self.attributes != 0 {
            return invalid(OPERAND_ATTRIBUTES);
        }
        if (init.xfam | XFAM_ALWAYS) & !self.xfam != 0 {
            return invalid(OPERAND_XFAM);
        }
        for mask in &self.configurable.0 {
            let Some(entry) = init.cpuid.get(mask.leaf, mask.subleaf.unwrap_or(0)) else {
                continue;
            };
            let mut wanted = *entry;
            if mask.leaf == 0x8000_0008 {
                // KVM takes the address width out before it passes the value on.
                wanted.eax &= 0xff00_ffff;
            }
            let beyond = registers(&wanted)
                .iter()
                .zip(registers(mask))
                .any(|(value, mask)| value & !mask != 0);
            if beyond {
                return invalid(OPERAND_CPUID_CONFIG);
            }
        }
        self.configured = init.cpuid.clone();
        self.granted = init.attributes;
        Ok(())
    }

    /// CPUID of the TD (`tdx_vcpu_get_cpuid`, `tdx_read_cpuid`).
    pub(super) fn cpuid(&self) -> CpuidTable {
        let show = |native: &CpuidEntry| {
            let subleaf = native.subleaf.unwrap_or(0);
            let mut shown = *native;
            if let Some(mask) = self.configurable.get(native.leaf, subleaf) {
                let wanted = self
                    .configured
                    .get(native.leaf, subleaf)
                    .copied()
                    .unwrap_or_default();
                let mix = |native: u32, wanted: u32, mask: u32| native & !mask | wanted & mask;
                shown.eax = mix(native.eax, wanted.eax, mask.eax);
                shown.ebx = mix(native.ebx, wanted.ebx, mask.ebx);
                shown.ecx = mix(native.ecx, wanted.ecx, mask.ecx);
                shown.edx = mix(native.edx, wanted.edx, mask.edx);
            }
            if native.leaf == 0x8000_0008 {
                let wanted = self.configured.get(native.leaf, 0).map_or(0, |e| e.eax);
                shown.eax = shown.eax & 0xff00_ffff | wanted & 0x00ff_0000;
            }
            shown
        };
        CpuidTable(self.native.0.iter().map(show).collect())
    }

    /// TDH.MEM.PAGE.ADD.
    pub(super) fn add(&mut self, gpa: u64) {
        self.chain.update(record(*b"MEM.PAGE.ADD\0\0\0\0", gpa));
    }

    /// TDH.MR.EXTEND of a whole page, chunk by chunk (`tdx_gmem_post_populate`).
    pub(super) fn extend(&mut self, gpa: u64, page: &[u8]) {
        for (chunk, at) in page.chunks(EXTEND_BYTES).zip((gpa..).step_by(EXTEND_BYTES)) {
            self.chain.update(record(*b"MR.EXTEND\0\0\0\0\0\0\0", at));
            self.chain.update(chunk);
        }
    }

    /// TDH.MR.FINALIZE.
    pub(super) fn finalise(&mut self) {
        self.mrtd = Some(self.chain.clone().finalize().into());
    }

    /// ATTRIBUTES of the TD, as it sees them.
    pub fn granted(&self) -> u64 {
        self.shows.unwrap_or(self.granted)
    }

    /// MRTD; `None` before it is final.
    pub fn mrtd(&self) -> Option<[u8; 48]> {
        self.mrtd
    }
}

/// The 128 bytes that name an operation and its address.
fn record(name: [u8; 16], gpa: u64) -> [u8; 128] {
    let mut record = [0; 128];
    for (to, from) in record.iter_mut().zip(name.into_iter().chain(gpa.to_le_bytes())) {
        *to = from;
    }
    record
}
