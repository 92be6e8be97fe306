//! Why an MRTD is what it is: the steps that lead to it, and the first step in which two launches differ.

use std::fmt;

use arch::addr::Gpa;
use arch::platform::LaunchPlan;

use crate::measure::{Action, MeasureError, Measurement, Mrtd, Order, sha384, walk};

/// An action as it enters the digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What the page holds.
    pub name: &'static str,
    /// What is done to it.
    pub action: Action,
    /// The page.
    pub gpa: Gpa,
    /// SHA-384 of its contents, where they are measured.
    pub contents: Option<Measurement>,
    /// MRTD of a launch that ends here.
    pub digest: Measurement,
}

/// Every step of `plan` in order; the last digest is that of the launch.
///
/// # Errors
/// A page that no TD has, or that is measured and has no contents.
pub fn steps(plan: &LaunchPlan, order: Order) -> Result<Vec<Step>, MeasureError> {
    let mut mrtd = Mrtd::new();
    let mut steps = Vec::new();
    walk(plan, order, |range, action, gpa, bytes| {
        mrtd.apply(action, gpa, bytes);
        steps.push(Step {
            name: range.name,
            action,
            gpa,
            contents: (action == Action::Extend).then(|| sha384(&[bytes])),
            digest: mrtd.digest(),
        });
    })?;
    Ok(steps)
}

/// A step without its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// What the page holds.
    pub name: &'static str,
    /// What is done to it.
    pub action: Action,
    /// The page.
    pub gpa: Gpa,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of \"{}\" at {:#x}", self.action, self.name, self.gpa.0)
    }
}

/// The first thing in which two launches differ. "First" is the plan on the left, "second" that on the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Another page, or another action.
    Step {
        /// Place in the order, from 0.
        index: usize,
        /// In the first plan.
        left: Key,
        /// In the second.
        right: Key,
    },
    /// One plan goes on.
    More {
        /// "first" or "second".
        plan: &'static str,
        /// Its first additional step.
        step: Key,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Contents { name, gpa, offset } => {
                let gpa = gpa.0;
                write!(
                    f,
                    "the contents of \"{name}\" differ, first in byte {offset:#x} of the page at {gpa:#x}"
                )
            }
            Self::Step { index, left, right } => {
                write!(
                    f,
                    "step {index} is {left} in the first plan, {right} in the second"
                )
            }
            Self::More { plan, step } => write!(f, "the {plan} plan has more steps, beginning with {step}"),
        }
    }
}

/// The first difference that gives two launches by `order` different digests; `None` if their digests are the same.
///
/// # Errors
/// A page that no TD has, or that is measured and has no contents.
pub fn difference(
    left: &LaunchPlan,
    right: &LaunchPlan,
    order: Order,
) -> Result<Option<Difference>, MeasureError> {
    let (ours, theirs) = (keyed(left, order)?, keyed(right, order)?);
    let pairs = ours.iter().zip(&theirs).enumerate();
    for (index, ((left, ours), (right, theirs))) in pairs {
        if (left.action, left.gpa) != (right.action, right.gpa) {
            let (left, right) = (*left, *right);
            return Ok(Some(Difference::Step { index, left, right }));
        }
        if ours != theirs {
            return Ok(Some(Difference::Contents {
                name: left.name,
                gpa: left.gpa,
                offset: ours.iter().zip(*theirs).take_while(|(a, b)| a == b).count(),
            }));
        }
    }
    let more = |plan, step: &(Key, &[u8])| Difference::More { plan, step: step.0 };
    let longer = ours.get(theirs.len()).map(|step| more("first", step));
    Ok(longer.or_else(|| theirs.get(ours.len()).map(|step| more("second", step))))
}

fn keyed(plan: &LaunchPlan, order: Order) -> Result<Vec<(Key, &[u8])>, MeasureError> {
    let mut steps = Vec::new();
    walk(plan, order, |range, action, gpa, bytes| {
        let name = range.name;
        steps.push((Key { name, action, gpa }, bytes));
    })?;
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use arch::addr::PageRange;
    use arch::platform::{LaunchPage, PageKind};

    use super::*;
    use crate::measure::{PAGE, mrtd};

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
            page("variables", 0x11_0000, 1, PageKind::Unmeasured, 2),
            page("stack", 0x11_2000, 1, PageKind::Zero, 0),
        ];
        LaunchPlan { pages, vcpus: vec![] }
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
                "step 4 is ADD of \"variables\" at 0x110000 in the first plan, ADD of \"stack\" at 0x112000 in the second",
            ),
            (
                |p| p.pages[1] = page("variables", 0x11_0000, 1, PageKind::Measured, 2),
                "step 5 is ADD of \"stack\" at 0x112000 in the first plan, EXTEND of \"variables\" at 0x110000 in the second",
            ),
            (
                |p| p.pages.truncate(2),
                "the first plan has more steps, beginning with ADD of \"stack\" at 0x112000",
            ),
            (
                |p| p.pages.push(page("more", 0x20_0000, 1, PageKind::Zero, 0)),
                "the second plan has more steps, beginning with ADD of \"more\" at 0x200000",
            ),
        ];
        for (change, says) in cases {
            let mut other = plan();
            change(&mut other);
            let order = Order::SinglePass;
            let found = difference(&plan(), &other, order).unwrap().map(|d| d.to_string());
            assert_eq!(found.as_deref(), Some(*says));
            assert_ne!(mrtd(&plan(), order), mrtd(&other, order), "{says}");
        }
    }

    #[test]
    fn what_the_digest_does_not_see_is_no_difference() {
        let mut other = plan();
        other.pages[1].bytes.fill(0xee);
        other.pages[0].name = "renamed";
        other.pages[2] = page("zeros", 0x11_2000, 1, PageKind::Measured, 0);
        for order in [Order::SinglePass, Order::TwoPass] {
            assert_eq!(difference(&plan(), &other, order), Ok(None));
            assert_eq!(mrtd(&plan(), order), mrtd(&other, order));
        }
    }

    #[test]
    fn steps_end_with_the_digest_and_show_the_order() {
        let cases = [
            (Order::SinglePass, "A100 E100 A101 E101 A110 A112 E112"),
            (Order::TwoPass, "A100 A101 E100 E101 A110 A112 E112"),
        ];
        for (order, expected) in cases {
            let steps = steps(&plan(), order).unwrap();
            let last = steps.last().unwrap();
            assert_eq!(last.digest, mrtd(&plan(), order).unwrap());
            let word = |s: &Step| format!("{:.1}{:x}", s.action.to_string(), s.gpa.0 >> 12);
            assert_eq!(steps.iter().map(word).collect::<Vec<_>>().join(" "), expected);
            assert!(
                steps
                    .iter()
                    .all(|s| s.contents.is_some() == (s.action == Action::Extend))
            );
        }
    }
}
