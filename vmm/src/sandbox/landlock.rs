//! Which files and sockets can still be reached by path: next to nothing, as everything else is open already.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

/// What a running machine does by path, as directories: the files in them may be replaced while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Where files are read.
    pub reads: Vec<PathBuf>,
    /// Where sockets are connected to.
    pub connects: Vec<PathBuf>,
    /// Where a socket of our own is removed at the end.
    pub removes: Vec<PathBuf>,
}

impl Reach {
    /// All directories, each once, parents first.
    pub(super) fn directories(&self) -> Vec<&Path> {
        let all = [&self.reads, &self.connects, &self.removes];
        let mut all: Vec<_> = all.into_iter().flatten().map(PathBuf::as_path).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn rights(&self) -> BTreeMap<&Path, BitFlags<AccessFs>> {
        let kinds = [
            (&self.reads, AccessFs::ReadFile),
            (&self.connects, AccessFs::ResolveUnix),
            (&self.removes, AccessFs::RemoveFile),
        ];
        let mut rights = BTreeMap::<_, BitFlags<AccessFs>>::new();
        for (paths, access) in kinds {
            for path in paths {
                *rights.entry(path.as_path()).or_default() |= access;
            }
        }
        rights
    }
}

/// What became of Landlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// In force, with the kernel's version of it.
    Restricted(i32),
    /// This kernel has none, and why.
    Absent(&'static str),
}

/// Restricts the calling thread, and those it starts, to `reach`, with as much of Landlock as the kernel has.
pub(super) fn restrict(reach: &Reach) -> Result<Outcome, RulesetError> {
    let newest = ABI::V10;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))?
        .handle_access(AccessNet::from_all(newest))?
        .scope(Scope::from_all(newest))?
        .create()?;
    for (path, access) in reach.rights() {
        // A directory that is gone cannot be reached anyway.
        if let Ok(directory) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(directory, access))?;
        }
    }
    Ok(match rules.restrict_self()?.landlock {
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => Outcome::Restricted(kernel_abi.unwrap_or(effective_abi as i32)),
        LandlockStatus::NotEnabled => {
            Outcome::Absent("it is not among the `lsm=` of the kernel's command line")
        }
        _ => Outcome::Absent("it came with Linux 5.13, as CONFIG_SECURITY_LANDLOCK"),
    })
}
