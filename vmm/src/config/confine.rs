//! What cvmm gives up before the guest runs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::text::{BadValue, bad, serde_as_text};

#[derive(Args, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Confinement")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Confine {
    /// `off` lets cvmm keep its capabilities, its access to files, and all system calls while the guest runs
    /// [default: on]
    #[arg(long, value_name = "on|off")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Switch>,
    /// For root: once everything is open, become this user, without supplementary groups, in namespaces of its own
    /// and with an empty root. It needs no access to /dev/kvm or the disks, but to the certificates and to the sockets
    /// that cvmm connects to
    #[arg(long, value_name = "USER[:GROUP]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<Account>,
    /// Directory of a cgroup to join first, so that its limits count for the whole machine
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
}

/// On or off.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Switch {
    On,
    Off,
}

impl Confine {
    /// Lays `flags` over this.
    #[must_use]
    pub(super) fn overlaid(self, flags: Self) -> Self {
        Self {
            sandbox: flags.sandbox.or(self.sandbox),
            user: flags.user.or(self.user),
            cgroup: flags.cgroup.or(self.cgroup),
        }
    }
}

/// A user and perhaps a group, by name or number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User.
    pub user: String,
    /// Group; absent means the user's own.
    pub group: Option<String>,
}

impl std::str::FromStr for Account {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let empty = user.is_empty() || group.is_some_and(str::is_empty);
        if empty || group.is_some_and(|group| group.contains(':')) {
            return bad("not a user; write USER or USER:GROUP, by name or number");
        }
        Ok(Self {
            user: user.into(),
            group: group.map(Into::into),
        })
    }
}

impl std::fmt::Display for Account {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str(&self.user)?;
        match &self.group {
            Some(group) => write!(to, ":{group}"),
            None => Ok(()),
        }
    }
}

serde_as_text!(Account);
