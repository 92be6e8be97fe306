//! Why a digest is what it is: the steps that lead to it, and the first step in which two plans differ.

use std::fmt;

use arch::addr::{Gpa, PAGE_SIZE};
use arch::platform::{LaunchPage, LaunchPlan};
use arch::x86::regs::BootState;

use crate::measure::{Chain, MeasureError, Measurement, PAGE, PageType, measured, sha384};
use crate::vmsa::{FieldDiff, SevFeatures, Vmsa};

/// A page or a vCPU as it enters the digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it holds.
    pub name: &'static str,
    /// Its page type.
    pub kind: PageType,
    /// Its address; for a vCPU its index.
    pub at: u64,
    /// SHA-384 of the contents, where they are measured.
    pub contents: Option<[u8; 48]>,
    /// The digest after it.
    pub digest: Measurement,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind.name();
        match self.kind {
            PageType::Vmsa => write!(f, "vCPU {:<9} {kind:<10} ", self.at)?,
            PageType::Normal
            | PageType::Zero
            | PageType::Unmeasured
            | PageType::Secrets
            | PageType::Cpuid => write!(f, "{:#014x} {kind:<10} ", self.at)?,
        }
        match self.contents {
            Some(hash) => write!(f, "{}", Measurement(hash))?,
            None => write!(f, "{:<96}", "-")?,
        }
        write!(f, " {} {}", self.digest, self.name)
    }
}

/// Every step of `plan` in order; the last digest is that of the launch.
///
/// # Errors
/// A measured range whose contents do not fill it.
pub fn steps(plan: &LaunchPlan, features: SevFeatures) -> Result<Vec<Step>, MeasureError> {
    let mut chain = Chain::new();
    let mut steps = Vec::new();
    for page in &plan.pages {
        let kind = PageType::from(page.kind);
        let contents = measured(kind, page.range, &page.bytes)?.map(|bytes| bytes.chunks_exact(PAGE));
        let mut hashes = contents.into_iter().flatten().map(sha384);
        for frame in page.range.frames() {
            let (at, contents) = (frame.saturating_mul(PAGE_SIZE), hashes.next());
            chain.page(kind, Gpa(at), &contents.unwrap_or([0; 48]));
            steps.push(Step {
                name: page.name,
                kind,
                at,
                contents,
                digest: chain.digest(),
            });
        }
    }
    for (index, state) in (0..).zip(&plan.vcpus) {
        let vmsa = Vmsa::new(state, features);
        chain.vmsa(&vmsa);
        steps.push(Step {
            name: "registers",
            kind: PageType::Vmsa,
            at: index,
            contents: Some(sha384(vmsa.bytes())),
            digest: chain.digest(),
        });
    }
    Ok(steps)
}

/// The first thing in which two launches differ. "First" is the plan on the left, "second" that on the right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A page's contents.
    Contents {
        /// What the page holds.
        name: &'static str,
        /// The page.
        gpa: Gpa,
        /// The first byte that differs.
        offset: usize,
    },
    /// Another page, or the same one with another type.
    Page {
        /// Place in the order of pages, from 0.
        index: usize,
        /// In the first plan.
        left: PageKey,
        /// In the second.
        right: PageKey,
    },
    /// One plan has more pages.
    MorePages {
        /// Which.
        side: Side,
        /// Its first additional page.
        page: PageKey,
    },
    /// A vCPU's registers.
    Vcpu {
        /// Index of the vCPU.
        index: usize,
        /// All fields that differ.
        fields: Vec<FieldDiff>,
    },
    /// The number of vCPUs.
    Vcpus {
        /// In the first plan.
        left: usize,
        /// In the second.
        right: usize,
    },
}

/// One of two plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Side {
    First,
    Second,
}

/// What identifies a page in a digest, besides its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageKey {
    /// What it holds.
    pub name: &'static str,
    /// Its address.
    pub gpa: Gpa,
    /// Its type.
    pub kind: PageType,
}

impl fmt::Display for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} \"{}\" at {:#x}", self.kind.name(), self.name, self.gpa.0)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Contents { name, gpa, offset } => {
                write!(
                    f,
                    "the contents of \"{name}\" differ, first in byte {offset:#x} of the page at {:#x}",
                    gpa.0
                )
            }
            Self::Page { index, left, right } => write!(
                f,
                "page {index} is {left} in the first plan, {right} in the second"
            ),
            Self::MorePages { side, page } => {
                let which = if *side == Side::First { "first" } else { "second" };
                write!(f, "the {which} plan has more pages, beginning with {page}")
            }
            Self::Vcpu { index, fields } => {
                write!(f, "the registers of vCPU {index} differ:")?;
                let mut separator = " ";
                for field in fields {
                    write!(f, "{separator}{field}")?;
                    separator = ", ";
                }
                Ok(())
            }
            Self::Vcpus { left, right } => write!(f, "the first plan has {left} vCPUs, the second {right}"),
        }
    }
}

/// Single pages of `plan` with what is measured of their contents.
fn pages(plan: &LaunchPlan) -> impl Iterator<Item = (PageKey, &[u8])> {
    plan.pages.iter().flat_map(|page: &LaunchPage| {
        let kind = PageType::from(page.kind);
        let measured = if kind == PageType::Normal {
            page.bytes.as_slice()
        } else {
            &[]
        };
        page.range.frames().zip(0_usize..).map(move |(frame, index)| {
            let from = index.saturating_mul(PAGE);
            let contents = measured.get(from..).unwrap_or_default();
            let contents = contents.get(..PAGE).unwrap_or(contents);
            (
                PageKey {
                    name: page.name,
                    gpa: Gpa(frame.saturating_mul(PAGE_SIZE)),
                    kind,
                },
                contents,
            )
        })
    })
}

/// The first difference that gives the two launches different digests; `None` if their digests are the same.
pub fn difference(left: (&LaunchPlan, SevFeatures), right: (&LaunchPlan, SevFeatures)) -> Option<Difference> {
    let (mut ours, mut theirs) = (pages(left.0), pages(right.0));
    let mut index: usize = 0;
    loop {
        match (ours.next(), theirs.next()) {
            (None, None) => break,
            (Some((page, _)), None) => {
                return Some(Difference::MorePages {
                    side: Side::First,
                    page,
                });
            }
            (None, Some((page, _))) => {
                return Some(Difference::MorePages {
                    side: Side::Second,
                    page,
                });
            }
            (Some((l, left)), Some((r, right))) => {
                if (l.gpa, l.kind) != (r.gpa, r.kind) {
                    return Some(Difference::Page {
                        index,
                        left: l,
                        right: r,
                    });
                }
                if left != right {
                    let same = left.iter().zip(right).take_while(|(a, b)| a == b).count();
                    return Some(Difference::Contents {
                        name: l.name,
                        gpa: l.gpa,
                        offset: same,
                    });
                }
            }
        }
        index = index.saturating_add(1);
    }
    vcpus(&left.0.vcpus, left.1, &right.0.vcpus, right.1)
}

fn vcpus(
    left: &[BootState],
    left_features: SevFeatures,
    right: &[BootState],
    right_features: SevFeatures,
) -> Option<Difference> {
    for (index, (l, r)) in left.iter().zip(right).enumerate() {
        let fields = Vmsa::new(l, left_features).diff(&Vmsa::new(r, right_features));
        if !fields.is_empty() {
            return Some(Difference::Vcpu { index, fields });
        }
    }
    let (left, right) = (left.len(), right.len());
    (left != right).then_some(Difference::Vcpus { left, right })
}

#[cfg(test)]
mod tests {
    use arch::addr::PageRange;
    use arch::platform::PageKind;
    use arch::x86::regs::General;

    use super::*;
    use crate::measure;

    fn page(name: &'static str, gpa: u64, pages: u64, kind: PageKind, byte: u8) -> LaunchPage {
        let range = PageRange::new(Gpa(gpa), pages << 12).unwrap();
        let bytes = if kind == PageKind::Zero {
            Vec::new()
        } else {
            range.frames().flat_map(|_| [byte; PAGE]).collect()
        };
        LaunchPage {
            name,
            range,
            kind,
            bytes,
        }
    }

    fn plan() -> LaunchPlan {
        let pages = vec![
            page("shim", 0x10_0000, 2, PageKind::Measured, 1),
            page("CPUID", 0x11_1000, 1, PageKind::Cpuid, 2),
            page("stack", 0x11_2000, 2, PageKind::Zero, 0),
        ];
        let vcpu = |rip| {
            BootState::long_mode(
                General {
                    rip,
                    ..General::default()
                },
                0,
            )
        };
        LaunchPlan {
            pages,
            vcpus: vec![vcpu(0x10_0000), vcpu(0x10_0100)],
        }
    }

    type Change = fn(&mut LaunchPlan);

    #[test]
    fn the_first_difference_is_named_and_changes_the_digest() {
        let cases: &[(Change, &str)] = &[
            (
                |p| p.pages[0].bytes[0x1007] = 9,
                "the contents of \"shim\" differ, first in byte 0x7 of the page at 0x101000",
            ),
            (
                |p| p.pages.swap(1, 2),
                "page 2 is CPUID \"CPUID\" at 0x111000 in the first plan, ZERO \"stack\" at 0x112000 in the second",
            ),
            (
                |p| p.pages[1].kind = PageKind::Unmeasured,
                "page 2 is CPUID \"CPUID\" at 0x111000 in the first plan, UNMEASURED \"CPUID\" at 0x111000 in the second",
            ),
            (
                |p| p.pages.truncate(2),
                "the first plan has more pages, beginning with ZERO \"stack\" at 0x112000",
            ),
            (
                |p| p.pages.push(page("more", 0x20_0000, 1, PageKind::Zero, 0)),
                "the second plan has more pages, beginning with ZERO \"more\" at 0x200000",
            ),
            (
                |p| (p.vcpus[1].general.rip, p.vcpus[1].general.rdi) = (0, 1),
                "the registers of vCPU 1 differ: rip: 0x100100 and 0x0, rdi: 0x0 and 0x1",
            ),
            (
                |p| p.vcpus.truncate(1),
                "the first plan has 2 vCPUs, the second 1",
            ),
        ];
        let snp = SevFeatures::SNP;
        for (change, says) in cases {
            let mut other = plan();
            change(&mut other);
            let found = difference((&plan(), snp), (&other, snp)).map(|d| d.to_string());
            assert_eq!(found.as_deref(), Some(*says));
            assert_ne!(
                measure::digest(&plan(), snp),
                measure::digest(&other, snp),
                "{says}"
            );
        }
    }

    #[test]
    fn what_the_digest_does_not_see_is_no_difference() {
        let mut other = plan();
        other.pages[1].bytes.fill(0xee);
        other.pages[0].name = "renamed";
        let snp = SevFeatures::SNP;
        assert_eq!(difference((&plan(), snp), (&other, snp)), None);
        assert_eq!(measure::digest(&plan(), snp), measure::digest(&other, snp));
    }

    #[test]
    fn features_show_in_the_registers() {
        let swap = SevFeatures::SNP.with(SevFeatures::DEBUG_SWAP);
        let found = difference((&plan(), SevFeatures::SNP), (&plan(), swap))
            .unwrap()
            .to_string();
        assert_eq!(
            found,
            "the registers of vCPU 0 differ: sev_features: 0x1 and 0x21"
        );
    }

    #[test]
    fn steps_end_with_the_digest() {
        let steps = steps(&plan(), SevFeatures::SNP).unwrap();
        let last = steps.last().unwrap();
        assert_eq!(last.digest, measure::digest(&plan(), SevFeatures::SNP).unwrap());
        let words: Vec<String> = steps
            .iter()
            .map(|s| {
                let words = s.to_string().replace(&s.digest.to_string(), "…");
                let hash = s.contents.map(|hash| Measurement(hash).to_string());
                words.replace(&hash.unwrap_or(" ".repeat(95)), "#")
            })
            .collect();
        let expected = [
            "0x000000100000 NORMAL     # … shim",
            "0x000000101000 NORMAL     # … shim",
            "0x000000111000 CPUID      -# … CPUID",
            "0x000000112000 ZERO       -# … stack",
            "0x000000113000 ZERO       -# … stack",
            "vCPU 0         VMSA       # … registers",
            "vCPU 1         VMSA       # … registers",
        ];
        assert_eq!(words, expected);
    }
}
