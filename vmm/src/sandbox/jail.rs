//! Another user, an empty root, namespaces and a cgroup, for whoever starts cvmm as root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
};
use rustix::process::{Gid, Uid, chdir, chroot, fchdir};
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::Reach;
use crate::ending::RunError;

/// What to become.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jail {
    /// User and group.
    pub user: Option<(u32, u32)>,
    /// Directory of a cgroup.
    pub cgroup: Option<PathBuf>,
    /// The machine needs this network namespace: it looks at interfaces by name.
    pub keeps_network: bool,
}

/// The process cannot become that.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {source}")]
pub struct JailError {
    doing: String,
    source: io::Error,
    remedy: &'static str,
}

impl From<JailError> for RunError {
    fn from(error: JailError) -> Self {
        Self::HostLacks {
            what: error.to_string(),
            remedy: error.remedy.into(),
        }
    }
}

const NEEDS_ROOT: &str = "start cvmm as root, or without --user as a user that may do no more than it should";

impl Jail {
    /// Goes there; returns the user. The calling thread must be the only one.
    pub(super) fn enter(&self, reach: &Reach) -> Result<Option<u32>, JailError> {
        if let Some(cgroup) = &self.cgroup {
            join(cgroup)?;
        }
        let Some((user, group)) = self.user else {
            return Ok(None);
        };
        let mut fresh =
            UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
        fresh.set(UnshareFlags::NEWNET, !self.keeps_network);
        #[expect(
            deprecated,
            reason = "it is for the sake of UnshareFlags::FILES, which is not used here"
        )]
        root_only("making namespaces", rustix::thread::unshare(fresh))?;
        empty_root(reach)?;
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(group));
        root_only("leaving supplementary groups", set_thread_groups(&[]))?;
        root_only(
            &format!("becoming group {group}"),
            set_thread_res_gid(gid, gid, gid),
        )?;
        root_only(
            &format!("becoming user {user}"),
            set_thread_res_uid(uid, uid, uid),
        )?;
        Ok(Some(user))
    }
}

fn join(cgroup: &Path) -> Result<(), JailError> {
    fs::write(cgroup.join("cgroup.procs"), "0").map_err(|source| JailError {
        doing: format!("cgroup {}", cgroup.display()),
        source,
        remedy: "create it (a directory below /sys/fs/cgroup), and let this user write to its cgroup.procs",
    })
}

/// Makes the root an empty file system that holds only the directories of `reach`, at their own paths. What else is
/// mounted stays in this namespace, but below the new root, where nobody can go without `CAP_SYS_CHROOT`.
fn empty_root(reach: &Reach) -> Result<(), JailError> {
    let step = "making an empty root";
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    root_only(step, mount_change("/", private))?;
    let mut kept = vec![];
    for directory in reach.directories() {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = root_only(
            &format!("keeping {}", directory.display()),
            open_tree(CWD, directory, flags),
        )?;
        kept.push((directory, tree));
    }
    let system = root_only(step, fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
    root_only(step, fsconfig_set_string(&system, "mode", "0755"))?;
    root_only(step, fsconfig_set_string(&system, "size", "64k"))?;
    root_only(step, fsconfig_create(&system))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = root_only(step, fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, attributes))?;
    let from_here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    root_only(step, move_mount(&root, "", CWD, "/", from_here))?;
    root_only(step, fchdir(&root))?;
    root_only(step, chroot("."))?;
    for (directory, tree) in kept {
        let keeping = format!("keeping {}", directory.display());
        fs::create_dir_all(directory).map_err(|source| failed(&keeping, source))?;
        root_only(&keeping, move_mount(tree, "", CWD, directory, from_here))?;
    }
    root_only(step, chdir("/"))
}

fn root_only<T>(doing: &str, result: rustix::io::Result<T>) -> Result<T, JailError> {
    result.map_err(|e| failed(doing, e.into()))
}

fn failed(doing: &str, source: io::Error) -> JailError {
    JailError {
        doing: format!("--user: {doing}"),
        source,
        remedy: NEEDS_ROOT,
    }
}
