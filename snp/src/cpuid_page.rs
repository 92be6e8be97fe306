//! The CPUID page: the answers that firmware vouches for, because a guest must not take them from the host
//! (SEV-SNP Firmware ABI, revision 1.58, "CPUID Page"; Linux, `struct snp_cpuid_table`).

use std::fmt;

use arch::x86::cpuid::{CpuidEntry, CpuidTable};

use crate::bytes::{le32, put};
use crate::measure::PAGE;

/// Entries that fit by the specification, though the page has room for more.
const MAX_ENTRIES: usize = 64;
const HEADER: usize = 16;
const ENTRY: usize = 48;
/// Legacy area and header: what XSAVE needs for x87 and SSE, which is all that XCR0 = 1 covers.
const XSAVE_BYTES: u32 = 0x240;
/// XCR0 that vCPUs start with.
const INITIAL_XCR0: u64 = 1;

const EXTENDED_STATE: u32 = 0xd;
const EXTENDED_MAX: u32 = 0x8000_0000;
const MEMORY_ENCRYPTION: u32 = 0x8000_001f;
/// SEV, SEV-ES and SEV-SNP in leaf 0x8000001f EAX.
const SEV_ES_SNP: u32 = 1 << 1 | 1 << 3 | 1 << 4;
/// Position of the C-bit on every CPU with SNP so far.
const C_BIT: u32 = 51;
/// Guest-physical addresses lose one bit to the C-bit.
const REDUCED_BITS: u32 = 1 << 6;

/// More answers than the page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's CPUID has {entries} non-zero answers, the SNP CPUID page holds 64; hide more features")]
pub struct TooManyEntries {
    /// Answers there are.
    pub entries: usize,
}

/// Changes what KVM offers into what SNP firmware accepts, and tells the guest that it is an SNP guest.
///
/// Firmware refuses features that the host could fake: the TSC deadline timer, TSC_ADJUST, all of leaf 7 EDX,
/// VIRT_SSBD, and those of leaf 0x80000021 that KVM synthesises.
pub fn sanitise(table: &mut CpuidTable) {
    for entry in &mut table.0 {
        match (entry.leaf, entry.subleaf.unwrap_or(0)) {
            (1, _) => entry.ecx &= !(1 << 24),
            (7, 0) => {
                entry.ebx &= !(1 << 1);
                entry.edx = 0;
            }
            (EXTENDED_MAX, _) => entry.eax = entry.eax.max(MEMORY_ENCRYPTION),
            (0x8000_0008, _) => entry.ebx &= !(1 << 25),
            (0x8000_0021, _) => {
                entry.eax &= !(1 << 9);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let c_bit = table.get(MEMORY_ENCRYPTION, 0).map_or(C_BIT, |e| e.ebx & 0x3f);
    table.replace(CpuidEntry {
        leaf: MEMORY_ENCRYPTION,
        eax: SEV_ES_SNP,
        ebx: c_bit | REDUCED_BITS,
        ..CpuidEntry::default()
    });
}

/// The page for `table`. Answers that are all zero are left out, which means the same to the guest.
///
/// # Errors
/// More answers than fit.
pub fn build(table: &CpuidTable) -> Result<Vec<u8>, TooManyEntries> {
    let given = |e: &&CpuidEntry| e.eax | e.ebx | e.ecx | e.edx != 0;
    let entries: Vec<&CpuidEntry> = table.0.iter().filter(given).collect();
    let count = entries.len();
    let stated = u32::try_from(count).ok().filter(|_| count <= MAX_ENTRIES);
    let mut page = vec![0; PAGE];
    put(
        &mut page,
        0,
        &stated.ok_or(TooManyEntries { entries: count })?.to_le_bytes(),
    );
    let slots = page.get_mut(HEADER..).unwrap_or_default().chunks_exact_mut(ENTRY);
    for (slot, entry) in slots.zip(entries) {
        let subleaf = entry.subleaf.unwrap_or(0);
        let sized = entry.leaf == EXTENDED_STATE && subleaf <= 1;
        put(slot, 0, &entry.leaf.to_le_bytes());
        put(slot, 4, &subleaf.to_le_bytes());
        put(slot, 8, &(if sized { INITIAL_XCR0 } else { 0 }).to_le_bytes());
        let ebx = if sized { XSAVE_BYTES } else { entry.ebx };
        for (at, value) in [(24, entry.eax), (28, ebx), (32, entry.ecx), (36, entry.edx)] {
            put(slot, at, &value.to_le_bytes());
        }
    }
    Ok(page)
}

/// A register of an answer that firmware wants otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Which register of the answer.
    pub register: Register,
    /// What was sent.
    pub sent: u32,
    /// What firmware wants.
    pub wanted: u32,
}

/// A register of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the architecture's register names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl fmt::Display for Correction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = match self.register {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        };
        write!(
            f,
            "leaf {:#x}.{} {register} must be {:#x} (",
            self.leaf, self.subleaf, self.wanted
        )?;
        let mut separator = "";
        for (words, bits) in [
            ("clear", self.sent & !self.wanted),
            ("set", self.wanted & !self.sent),
        ] {
            if bits != 0 {
                write!(f, "{separator}{words} {bits:#x}")?;
                separator = ", ";
            }
        }
        f.write_str(")")
    }
}

impl Correction {
    /// All of them in one line.
    pub(crate) fn list(corrections: &[Self]) -> String {
        let words: Vec<String> = corrections.iter().map(ToString::to_string).collect();
        words.join(", ")
    }
}

/// Differences between the page that was sent and the one that firmware wrote back, entry by entry.
pub fn corrections(sent: &[u8], back: &[u8]) -> Vec<Correction> {
    let entries = |page| {
        <[u8]>::get(page, HEADER..)
            .unwrap_or_default()
            .chunks_exact(ENTRY)
            .take(MAX_ENTRIES)
    };
    let count = usize::try_from(le32(sent, 0).unwrap_or(0)).unwrap_or(0);
    let pairs = entries(sent).zip(entries(back)).take(count);
    pairs.flat_map(|(sent, back)| changed(sent, back)).collect()
}

fn changed(sent: &[u8], back: &[u8]) -> Vec<Correction> {
    let word = |entry, at| le32(entry, at).unwrap_or(0);
    let registers = [
        (Register::Eax, 24),
        (Register::Ebx, 28),
        (Register::Ecx, 32),
        (Register::Edx, 36),
    ];
    let each = registers.map(|(register, at)| Correction {
        leaf: word(sent, 0),
        subleaf: word(sent, 4),
        register,
        sent: word(sent, at),
        wanted: word(back, at),
    });
    each.into_iter().filter(|c| c.sent != c.wanted).collect()
}

/// Gives vCPUs what firmware wants, since KVM answers later CPUID requests from their table.
pub fn accept(corrections: &[Correction], table: &mut CpuidTable) {
    for c in corrections {
        for entry in table
            .leaf_mut(c.leaf)
            .filter(|e| e.subleaf.unwrap_or(c.subleaf) == c.subleaf)
        {
            *match c.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            } = c.wanted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(leaf: u32, subleaf: Option<u32>) -> CpuidEntry {
        CpuidEntry::new(leaf, subleaf, [u32::MAX; 4])
    }

    #[test]
    fn features_that_firmware_refuses_are_hidden() {
        let leaves = [
            (1, None),
            (7, Some(0)),
            (0x8000_0008, None),
            (0x8000_0021, None),
            (0x8000_001f, None),
        ];
        let mut table = CpuidTable(leaves.map(|(leaf, sub)| all_ones(leaf, sub)).to_vec());
        sanitise(&mut table);
        let get = |leaf| *table.get(leaf, 0).unwrap();
        assert_eq!(get(1).ecx, !(1 << 24));
        assert_eq!((get(7).ebx, get(7).edx), (!2, 0));
        assert_eq!(get(0x8000_0008).ebx, !(1 << 25));
        assert_eq!((get(0x8000_0021).eax, get(0x8000_0021).ecx), (!(1 << 9), 0));
        assert_eq!((get(0x8000_001f).eax, get(0x8000_001f).ebx), (0x1a, 63 | 1 << 6));
    }

    #[test]
    fn a_host_without_the_leaf_still_makes_an_snp_guest() {
        let mut table = CpuidTable(vec![CpuidEntry::new(EXTENDED_MAX, None, [0x8000_0008, 0, 0, 0])]);
        sanitise(&mut table);
        assert_eq!(table.get(EXTENDED_MAX, 0).unwrap().eax, MEMORY_ENCRYPTION);
        assert_eq!(table.get(MEMORY_ENCRYPTION, 0).unwrap().ebx, 51 | 1 << 6);
    }

    #[test]
    fn the_page_holds_what_a_guest_may_believe() {
        let table = CpuidTable(vec![
            CpuidEntry::new(0, None, [0x10, 1, 2, 3]),
            CpuidEntry::new(0x4000_0000, None, [1; 4]),
            CpuidEntry::new(2, None, [0; 4]),
            CpuidEntry::new(0xd, Some(0), [7, 0x340, 0x340, 0]),
            CpuidEntry::new(0xd, Some(2), [0x100, 0x240, 0, 0]),
        ]);
        let page = build(&table).unwrap();
        assert_eq!((page.len(), le32(&page, 0)), (PAGE, Some(4)));
        let words: Vec<u32> = page
            .chunks(4)
            .skip(4)
            .take(48)
            .map(|w| le32(w, 0).unwrap())
            .collect();
        assert_eq!(words[..12], [0, 0, 0, 0, 0, 0, 0x10, 1, 2, 3, 0, 0]);
        // The hypervisor's own leaves: without them the guest does not know that it runs on KVM.
        assert_eq!(words[12..24], [0x4000_0000, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(words[24..36], [0xd, 0, 1, 0, 0, 0, 7, 0x240, 0x340, 0, 0, 0]);
        assert_eq!(words[36..48], [0xd, 2, 0, 0, 0, 0, 0x100, 0x240, 0, 0, 0, 0]);
    }

    #[test]
    fn sixty_five_answers_do_not_fit() {
        let table = |n| CpuidTable((0..n).map(|leaf| all_ones(leaf, None)).collect());
        assert!(build(&table(64)).is_ok());
        assert_eq!(build(&table(65)), Err(TooManyEntries { entries: 65 }));
    }

    #[test]
    fn corrections_are_named_and_can_be_accepted() {
        let mut table = CpuidTable(vec![all_ones(1, None), CpuidEntry::new(7, Some(0), [1, 6, 0, 8])]);
        let sent = build(&table).unwrap();
        let mut back = sent.clone();
        put(&mut back, HEADER + ENTRY + 28, &4u32.to_le_bytes());
        put(&mut back, HEADER + ENTRY + 36, &0x10u32.to_le_bytes());
        let found = corrections(&sent, &back);
        let expected =
            "leaf 0x7.0 EBX must be 0x4 (clear 0x2), leaf 0x7.0 EDX must be 0x10 (clear 0x8, set 0x10)";
        assert_eq!(Correction::list(&found), expected);
        accept(&found, &mut table);
        assert_eq!(build(&table).unwrap(), back);
    }

    #[test]
    fn nonsense_from_firmware_is_survived() {
        let sent = build(&CpuidTable(vec![all_ones(1, None)])).unwrap();
        assert_eq!(corrections(&sent, &[]), []);
        assert_eq!(corrections(&[], &sent), []);
        assert_eq!(corrections(&[0xff; PAGE], &[0; 100]).len(), 4);
    }
}
