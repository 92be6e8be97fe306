//! The CPUID table a guest sees, as plain data: KVM, the SNP CPUID page and TDX all take it from here.

/// One answer of the CPUID instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the architecture's register names")]
pub struct CpuidEntry {
    /// Input EAX.
    pub leaf: u32,
    /// Input ECX; `None` where the leaf does not look at it.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidEntry {
    /// An answer with its registers in the order EAX, EBX, ECX, EDX.
    pub const fn new(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self {
            leaf,
            subleaf,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

/// All answers for one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CpuidTable(pub Vec<CpuidEntry>);

impl CpuidTable {
    /// The entry for `leaf` and `subleaf` (0 where the leaf has none).
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.0
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.unwrap_or(subleaf) == subleaf)
    }

    /// The table of vCPU 0 as vCPU `index` sees it: with its own APIC id (Intel SDM volume 2, "CPUID"; AMD64 APM
    /// volume 3, function 0x8000001E).
    #[must_use]
    pub fn for_vcpu(mut self, index: u32) -> Self {
        const TOPOLOGY: u32 = 0xb;
        const AMD_TOPOLOGY: u32 = 0x8000_001e;
        for entry in &mut self.0 {
            match entry.leaf {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | index.min(255) << 24,
                TOPOLOGY => entry.edx = index,
                AMD_TOPOLOGY => {
                    entry.eax = index;
                    entry.ebx = index.min(255);
                }
                _ => {}
            }
        }
        self
    }

    /// All entries of `leaf`, to change them.
    pub fn leaf_mut(&mut self, leaf: u32) -> impl Iterator<Item = &mut CpuidEntry> {
        self.0.iter_mut().filter(move |e| e.leaf == leaf)
    }

    /// Replaces all entries of the leaf that `entry` names.
    pub fn replace(&mut self, entry: CpuidEntry) {
        self.0.retain(|e| e.leaf != entry.leaf);
        self.0.push(entry);
    }
}
