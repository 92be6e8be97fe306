//! The registers a vCPU starts with. `KVM_SET_SREGS`, `KVM_SET_REGS` and the measured VMSA are all made from
//! this one struct, so what is predicted and what is launched cannot differ.

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Attributes as the VMCB packs them: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11
    /// (AMD64 APM volume 2, "VMCB State Save Area").
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Table {
    /// Limit in bytes.
    pub limit: u16,
    /// Linear base address.
    pub base: u64,
}

/// Segment, descriptor-table and task registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's register names")]
pub struct Segments {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldtr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
}

/// Control, debug, extended and floating-point control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's register names")]
pub struct Control {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub dr6: u64,
    pub dr7: u64,
    pub xcr0: u64,
    pub pat: u64,
    pub mxcsr: u32,
    pub fcw: u16,
}

/// General registers that a boot protocol gives a meaning; all others start as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the architecture's register names")]
pub struct General {
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
}

/// What one vCPU starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after their types")]
pub struct BootState {
    pub general: General,
    pub segments: Segments,
    pub control: Control,
}

/// CR0.PE, MP-free, ET, NE, PG.
const CR0_LONG_MODE: u64 = 0x8000_0031;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Power-up value of IA32_PAT (Intel SDM volume 3, "Programming the PAT").
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const RFLAGS_RESERVED: u64 = 2;

impl BootState {
    /// Flat 64-bit mode with paging on, interrupts off, and the power-up values everywhere else.
    pub fn long_mode(general: General, cr3: u64) -> Self {
        let code = Segment {
            selector: 0x8,
            attributes: 0xa9b,
            limit: u32::MAX,
            base: 0,
        };
        let data = Segment {
            selector: 0x10,
            attributes: 0xc93,
            limit: u32::MAX,
            base: 0,
        };
        let tr = Segment {
            selector: 0x18,
            attributes: 0x8b,
            limit: 0xffff,
            base: 0,
        };
        let ldtr = Segment {
            selector: 0,
            attributes: 0x82,
            limit: 0xffff,
            base: 0,
        };
        let empty = Table { limit: 0, base: 0 };
        Self {
            general: General {
                rflags: general.rflags | RFLAGS_RESERVED,
                ..general
            },
            segments: Segments {
                cs: code,
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr,
                ldtr,
                gdtr: empty,
                idtr: empty,
            },
            control: Control {
                cr0: CR0_LONG_MODE,
                cr3,
                cr4: CR4_PAE,
                efer: EFER_LME_LMA,
                dr6: 0xffff_0ff0,
                dr7: 0x400,
                xcr0: 1,
                pat: PAT_RESET,
                mxcsr: 0x1f80,
                fcw: 0x37f,
            },
        }
    }
}
