//! The VMSA page that KVM makes of a vCPU's registers when the launch finishes, made here from the same
//! [`BootState`] that goes to `KVM_SET_SREGS` and `KVM_SET_REGS` (AMD64 APM volume 2, appendix B, "VMCB Layout",
//! table "Layout of the State Save Area for SEV-ES"; `sev_es_sync_vmsa` in KVM).

use std::fmt;

use arch::x86::regs::{BootState, Segment, Segments, Table};

use crate::bytes::put;
use crate::measure::PAGE;

/// KVM runs every guest with SVME set, whatever userspace asked for (`svm_set_efer`).
const EFER_SVME: u64 = 1 << 12;
/// KVM sets CR4.MCE while the guest runs (`svm_set_cr4`).
const CR4_MCE: u64 = 1 << 6;
/// KVM clears cache-disable and not-write-through (`svm_set_cr0`).
const CR0_CD_NW: u64 = 3 << 29;

/// SEV_FEATURES of a guest's save areas; they are measured, and the guest reads them in SEV_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SevFeatures(u64);

impl SevFeatures {
    /// SNP itself: set by KVM and never part of a request.
    pub const SNP: Self = Self(1);
    /// Debug registers are swapped with the guest's own.
    pub const DEBUG_SWAP: Self = Self(1 << 5);
    /// The guest's time-stamp counter is out of the host's reach.
    pub const SECURE_TSC: Self = Self(1 << 9);

    /// Features as a number, e.g. sev-snp-measure's `--guest-features`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// As measured.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// As requested of `KVM_SEV_INIT2`, which refuses the SNP bit and adds it itself.
    pub const fn request(self) -> u64 {
        self.0 & !Self::SNP.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One vCPU's save area.
#[derive(Clone, PartialEq, Eq)]
pub struct Vmsa(Box<[u8; PAGE]>);

impl fmt::Debug for Vmsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(FIELDS.iter().map(|field| (field.name, field.of(self))))
            .finish()
    }
}

impl Vmsa {
    /// The page that KVM makes of `state`.
    pub fn new(state: &BootState, features: SevFeatures) -> Self {
        let (g, c) = (&state.general, &state.control);
        let mut page = Box::new([0; PAGE]);
        put_segments(&mut page, &state.segments);
        let cpl = (state.segments.ss.attributes >> 5 & 3) as u8;
        put(page.as_mut(), 0xcb, &[cpl]);
        let quads = [
            (0xd0, c.efer | EFER_SVME),
            (0x148, c.cr4 | CR4_MCE),
            (0x150, c.cr3),
            (0x158, c.cr0 & !CR0_CD_NW),
            (0x160, c.dr7),
            (0x168, c.dr6),
            (0x170, g.rflags),
            (0x178, g.rip),
            (0x1d8, g.rsp),
            (0x268, c.pat),
            (0x310, g.rdx),
            (0x330, g.rsi),
            (0x338, g.rdi),
            (0x3b0, features.bits()),
            (0x3e8, c.xcr0),
        ];
        for (at, value) in quads {
            put(page.as_mut(), at, &u64::to_le_bytes(value));
        }
        put(page.as_mut(), 0x408, &c.mxcsr.to_le_bytes());
        put(page.as_mut(), 0x410, &c.fcw.to_le_bytes());
        Self(page)
    }

    /// A page read from elsewhere, to compare it with.
    pub fn from_bytes(bytes: &[u8; PAGE]) -> Self {
        Self(Box::new(*bytes))
    }

    /// The page as measured.
    pub fn bytes(&self) -> &[u8; PAGE] {
        &self.0
    }

    /// Fields in which two save areas differ, in page order.
    pub fn diff(&self, other: &Self) -> Vec<FieldDiff> {
        let named = FIELDS.iter().filter_map(|field| {
            let (left, right) = (field.of(self), field.of(other));
            (left != right).then_some(FieldDiff {
                field: field.name,
                left,
                right,
            })
        });
        let mut found: Vec<FieldDiff> = named.collect();
        if found.is_empty() && self != other {
            // Bytes that no launch sets; a page that came from elsewhere may have them.
            found.push(FieldDiff {
                field: "a reserved field",
                left: 0,
                right: 0,
            });
        }
        found
    }
}

/// A field with two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldDiff {
    /// Name, e.g. `cs.attributes` or `rip`.
    pub field: &'static str,
    /// Value in the first save area.
    pub left: u64,
    /// Value in the second.
    pub right: u64,
}

impl fmt::Display for FieldDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#x} and {:#x}", self.field, self.left, self.right)
    }
}

fn put_segments(page: &mut [u8; PAGE], s: &Segments) {
    let table = |t: &Table| Segment {
        selector: 0,
        attributes: 0,
        limit: t.limit.into(),
        base: t.base,
    };
    let (gdtr, idtr) = (table(&s.gdtr), table(&s.idtr));
    let order = [
        &s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs, &gdtr, &s.ldtr, &idtr, &s.tr,
    ];
    for (slot, segment) in page.chunks_exact_mut(16).zip(order) {
        put(slot, 0, &segment.selector.to_le_bytes());
        put(slot, 2, &segment.attributes.to_le_bytes());
        put(slot, 4, &segment.limit.to_le_bytes());
        put(slot, 8, &segment.base.to_le_bytes());
    }
}

/// A named part of the page; at most eight bytes.
struct Field {
    name: &'static str,
    at: usize,
    len: usize,
}

impl Field {
    fn of(&self, vmsa: &Vmsa) -> u64 {
        let bytes = vmsa.0.iter().skip(self.at).take(self.len);
        bytes.rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

const fn field(name: &'static str, at: usize, len: usize) -> Field {
    Field { name, at, len }
}

/// Expands to the four parts of each segment register.
macro_rules! fields {
    ($($segment:literal at $base:literal),*; $($name:literal at $at:literal for $len:literal),*) => {
        &[
            $(field(concat!($segment, ".selector"), $base, 2),
              field(concat!($segment, ".attributes"), $base + 2, 2),
              field(concat!($segment, ".limit"), $base + 4, 4),
              field(concat!($segment, ".base"), $base + 8, 8),)*
            $(field($name, $at, $len),)*
        ]
    };
}

static FIELDS: &[Field] = fields! {
    "es" at 0x00, "cs" at 0x10, "ss" at 0x20, "ds" at 0x30, "fs" at 0x40, "gs" at 0x50, "gdtr" at 0x60,
    "ldtr" at 0x70, "idtr" at 0x80, "tr" at 0x90;
    "vmpl" at 0xca for 1, "cpl" at 0xcb for 1, "efer" at 0xd0 for 8, "xss" at 0x140 for 8, "cr4" at 0x148 for 8,
    "cr3" at 0x150 for 8, "cr0" at 0x158 for 8, "dr7" at 0x160 for 8, "dr6" at 0x168 for 8,
    "rflags" at 0x170 for 8, "rip" at 0x178 for 8, "rsp" at 0x1d8 for 8, "rax" at 0x1f8 for 8,
    "g_pat" at 0x268 for 8, "pkru" at 0x2e8 for 4, "rcx" at 0x308 for 8, "rdx" at 0x310 for 8,
    "rbx" at 0x318 for 8, "rbp" at 0x328 for 8, "rsi" at 0x330 for 8, "rdi" at 0x338 for 8, "r8" at 0x340 for 8,
    "r9" at 0x348 for 8, "r10" at 0x350 for 8, "r11" at 0x358 for 8, "r12" at 0x360 for 8, "r13" at 0x368 for 8,
    "r14" at 0x370 for 8, "r15" at 0x378 for 8, "sev_features" at 0x3b0 for 8, "virtual_tom" at 0x3c8 for 8,
    "xcr0" at 0x3e8 for 8, "mxcsr" at 0x408 for 4, "x87_fcw" at 0x410 for 2
};

/// Family, model and stepping as CPUID leaf 1 EAX states them; KVM guests start with it in RDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSignature(pub u32);

impl CpuSignature {
    /// Packs family, model and stepping (AMD64 APM volume 3, appendix E, "CPUID Fn0000_0001_EAX").
    pub const fn new(family: u8, model: u8, stepping: u8) -> Self {
        let (low, extended) = if family > 15 {
            (15, family.saturating_sub(15))
        } else {
            (family, 0)
        };
        let (family, model, stepping) = (low as u32, model as u32, stepping as u32);
        Self((extended as u32) << 20 | (model >> 4) << 16 | family << 8 | (model & 15) << 4 | stepping & 15)
    }

    /// The signature of a vCPU type as QEMU and sev-snp-measure name it, with or without the prefix `EPYC-` and
    /// the suffix `-vN` or `-IBPB`.
    pub fn named(name: &str) -> Option<Self> {
        let versioned = name
            .rsplit_once("-v")
            .filter(|(_, n)| n.bytes().all(|b| b.is_ascii_digit()));
        let name = versioned.map_or(name, |(name, _)| name);
        let name = name.strip_suffix("-IBPB").unwrap_or(name);
        let name = name.strip_prefix("EPYC-").unwrap_or(name).to_ascii_lowercase();
        Some(match name.as_str() {
            "epyc" | "naples" => Self::new(23, 1, 2),
            "rome" => Self::new(23, 49, 0),
            "milan" => Self::new(25, 1, 1),
            "genoa" => Self::new(25, 17, 0),
            "turin" => Self::new(26, 0, 0),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use arch::x86::regs::General;

    use super::*;

    fn state() -> BootState {
        let general = General {
            rip: 0x10_0000,
            rsp: 0x11_4000,
            rdi: 1,
            rdx: 0xa0_0f11,
            ..General::default()
        };
        BootState::long_mode(general, 0x10_c000 | 1 << 51)
    }

    #[test]
    fn kvm_changes_are_part_of_the_prediction() {
        let mut state = state();
        state.control.cr0 |= CR0_CD_NW;
        let shown = format!("{:?}", Vmsa::new(&state, SevFeatures::SNP));
        for field in [
            "\"efer\": 5376",
            "\"cr4\": 96",
            "\"cr0\": 2147483697",
            "\"sev_features\": 1",
        ] {
            assert!(shown.contains(field), "{field} in {shown}");
        }
    }

    #[test]
    fn a_difference_is_named() {
        let base = Vmsa::new(&state(), SevFeatures::SNP);
        let mut other = state();
        other.segments.cs.attributes = 0x9b;
        other.general.rip = 0xfff0;
        let other = Vmsa::new(&other, SevFeatures::SNP.with(SevFeatures::DEBUG_SWAP));
        let named: Vec<String> = base.diff(&other).iter().map(ToString::to_string).collect();
        let expected = [
            "cs.attributes: 0xa9b and 0x9b",
            "rip: 0x100000 and 0xfff0",
            "sev_features: 0x1 and 0x21",
        ];
        assert_eq!(named, expected);
        assert_eq!(base.diff(&base), []);
    }

    #[test]
    fn a_difference_outside_all_known_fields_is_still_a_difference() {
        let base = Vmsa::new(&state(), SevFeatures::SNP);
        let mut bytes = *base.bytes();
        bytes[0xfff] = 1;
        assert_eq!(base.diff(&Vmsa::from_bytes(&bytes)).len(), 1);
    }

    #[test]
    fn fields_do_not_overlap() {
        let mut fields: Vec<(usize, usize, &str)> = FIELDS.iter().map(|f| (f.at, f.len, f.name)).collect();
        fields.sort_unstable();
        for pair in fields.windows(2) {
            assert!(pair[0].0.saturating_add(pair[0].1) <= pair[1].0, "{pair:?}");
        }
    }

    #[test]
    fn privilege_level_follows_the_stack_segment() {
        let mut state = state();
        state.segments.ss.attributes |= 3 << 5;
        assert_eq!(Vmsa::new(&state, SevFeatures::SNP).bytes()[0xcb], 3);
    }

    #[test]
    fn vcpu_types_have_their_signatures() {
        let cases = [
            ("EPYC-v4", 0x80_0f12),
            ("EPYC", 0x80_0f12),
            ("EPYC-IBPB", 0x80_0f12),
            ("EPYC-Rome-v2", 0x83_0f10),
            ("EPYC-Milan", 0xa0_0f11),
            ("milan", 0xa0_0f11),
            ("Genoa", 0xa1_0f10),
            ("EPYC-Turin", 0xb0_0f00),
        ];
        for (name, signature) in cases {
            assert_eq!(CpuSignature::named(name), Some(CpuSignature(signature)), "{name}");
        }
        assert_eq!(CpuSignature::named("Opteron"), None);
    }
}
