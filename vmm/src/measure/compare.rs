//! Two launches, and the first thing that gives them different digests.

use std::fmt::{Display, Write as _};
use std::path::Path;

use shim::config::Blob;
use snp::explain;

use super::launch::Source;
use super::{Prediction, Subject, Unpredictable, td};
use crate::hex::Hex;

/// The comparison in words, and whether the digests are the same. `flags` are laid over both files.
pub(super) fn compare(flags: &Subject, left: &Path, right: &Path) -> Result<(String, bool), Unpredictable> {
    let described = |file: &Path| {
        let subject = Subject {
            file: Some(file.into()),
            ..flags.clone()
        };
        Subject::prediction(&subject)
    };
    let (l, r) = match (described(left)?, described(right)?) {
        (Prediction::Launch(l), Prediction::Launch(r)) => (l, r),
        (Prediction::Td(l), Prediction::Td(r)) => return Ok(td::compare((&l, left), (&r, right))?),
        (Prediction::Launch(_), Prediction::Td(_)) | (Prediction::Td(_), Prediction::Launch(_)) => {
            return Err(Unpredictable::Unlike);
        }
    };
    let mut text = String::new();
    for (launch, file) in [(&l, left), (&r, right)] {
        let _ = writeln!(text, "{} {}", launch.digest()?, file.display());
    }
    let Some(difference) = explain::difference((&l.plan, l.features), (&r.plan, r.features)) else {
        text.push_str("the launches are the same\n");
        return Ok((text, true));
    };
    let _ = writeln!(text, "{difference}");
    if let (Source::Shim(l), Source::Shim(r)) = (&l.source, &r.source) {
        differ(&mut text, "machine", l.machine, r.machine);
        differ(&mut text, "kernel", Shown(&l.kernel), Shown(&r.kernel));
        differ(&mut text, "initrd", Shown(&l.initrd), Shown(&r.initrd));
        differ(&mut text, "cmdline", &l.cmdline, &r.cmdline);
    }
    Ok((text, false))
}

pub(super) fn differ<T: PartialEq + Display>(text: &mut String, field: &str, left: T, right: T) {
    if left != right {
        let _ = writeln!(text, "  {field}: {left}\n  {:>1$}: {right}", "not", field.len());
    }
}

#[derive(PartialEq)]
pub(super) struct Shown<'a>(pub(super) &'a Blob);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.len {
            0 => f.write_str("none"),
            len => write!(f, "{len} bytes, SHA-256 {}", Hex(&self.0.sha256)),
        }
    }
}
