//! Whom cvmm becomes, and what the machine needs by path then.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{Account, Backend, Config, Confine, Console, QuoteService, Switch};
use crate::sandbox::{Jail, Plan, Powers, Reach, directory};

/// A confinement that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Nobody has that name.
    #[error("user {account}: there is no {what} {name} on this host; give another, or numbers as UID:GID")]
    Unknown {
        /// As given.
        account: Account,
        /// "user" or "group".
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A number that is no user's, without a group.
    #[error("user {account}: no user of this host, so its group is not known; give UID:GID")]
    NoGroup {
        /// As given.
        account: Account,
    },
    /// Root is what the option is there to get away from.
    #[error("user {account}: is root, which gives up nothing; give another user and group")]
    Root {
        /// As given.
        account: Account,
    },
    /// With an empty root there is no working directory.
    #[error("{}: a relative path, which leads nowhere with --user; give an absolute one", path.display())]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// It is no cgroup.
    #[error(
        "cgroup {}: has no cgroup.procs; create it first, for example `mkdir /sys/fs/cgroup/NAME`",
        path.display()
    )]
    NotACgroup {
        /// The path.
        path: PathBuf,
    },
}

/// Checks what `config` says, and derives what a machine like it needs.
///
/// # Errors
/// See [`ConfineError`].
pub(super) fn check(config: &Config) -> Result<Plan, ConfineError> {
    let Confine {
        sandbox,
        user,
        cgroup,
    } = &config.confine;
    let (reach, relative) = reach(config);
    let user = user.as_ref().map(Databases::of_host).map(|d| d.resolve());
    if let (Some(_), Some(path)) = (&user, relative) {
        return Err(ConfineError::Relative { path });
    }
    if let Some(path) = cgroup
        && !path.join("cgroup.procs").exists()
    {
        return Err(ConfineError::NotACgroup { path: path.clone() });
    }
    let has_tap = |net: &crate::config::Net| !matches!(net.backend, Backend::Passt(_));
    Ok(Plan {
        on: *sandbox != Some(Switch::Off),
        jail: Jail {
            user: user.transpose()?,
            cgroup: cgroup.clone(),
            keeps_network: config.devices.nets.iter().any(has_tap),
        },
        powers: Powers {
            vsock: config.devices.vsock.is_some(),
            certs: config.snp.certs.is_some(),
            quotes: config.tdx.quote_service.is_some(),
        },
        reach,
    })
}

/// What is reached by path while the machine runs, and the first such path that is relative.
fn reach(config: &Config) -> (Reach, Option<PathBuf>) {
    let (mut reach, mut paths) = (Reach::default(), vec![]);
    if let Some(vsock) = &config.devices.vsock {
        reach.connects.push(directory(&vsock.uds));
        reach.removes.push(directory(&vsock.uds));
        paths.push(&vsock.uds);
    }
    if let Some(Console::Socket(path)) = &config.devices.console {
        reach.removes.push(directory(path));
        paths.push(path);
    }
    for net in &config.devices.nets {
        if let Backend::Passt(path) = &net.backend {
            reach.connects.push(directory(path));
            paths.push(path);
        }
    }
    if let Some(path) = &config.snp.certs {
        reach.reads.push(directory(path));
        // Where a link leads; Landlock looks there.
        let real = path.canonicalize().map(|real| directory(&real));
        if let Ok(real) = real
            && !real.starts_with(directory(path))
        {
            reach.reads.push(real);
        }
        paths.push(path);
    }
    if let Some(QuoteService::Unix(path)) = &config.tdx.quote_service {
        reach.connects.push(directory(path));
        paths.push(path);
    }
    let relative = paths.into_iter().find(|path| path.is_relative()).cloned();
    (reach, relative)
}

/// Users and groups of the host, as text.
struct Databases<'a> {
    account: &'a Account,
    passwd: String,
    group: String,
}

impl<'a> Databases<'a> {
    fn of_host(account: &'a Account) -> Self {
        // A host without them knows numbers only.
        let read = |path: &str| fs::read_to_string(Path::new(path)).unwrap_or_default();
        Self {
            account,
            passwd: read("/etc/passwd"),
            group: read("/etc/group"),
        }
    }

    fn resolve(&self) -> Result<(u32, u32), ConfineError> {
        let account = || self.account.clone();
        let unknown = |what, name: &str| ConfineError::Unknown {
            account: account(),
            what,
            name: name.into(),
        };
        let name = &self.account.user;
        let row = find(&self.passwd, name);
        let user = row.and_then(|row| number(row, 2)).or_else(|| id(name));
        let user = user.ok_or_else(|| unknown("user", name))?;
        let group = match &self.account.group {
            None => row
                .and_then(|row| number(row, 3))
                .ok_or(ConfineError::NoGroup { account: account() })?,
            Some(name) => find(&self.group, name)
                .and_then(|row| number(row, 2))
                .or_else(|| id(name))
                .ok_or_else(|| unknown("group", name))?,
        };
        if user == 0 || group == 0 {
            return Err(ConfineError::Root { account: account() });
        }
        Ok((user, group))
    }
}

/// The row of `name`, which is a name or a number.
fn find<'a>(database: &'a str, name: &str) -> Option<&'a str> {
    let field = |row: &str, at| row.split(':').nth(at) == Some(name);
    let named = database.lines().find(|row| field(row, 0));
    named.or_else(|| database.lines().find(|row| field(row, 2)))
}

fn number(row: &str, at: usize) -> Option<u32> {
    id(row.split(':').nth(at)?)
}

/// To the kernel the largest number means that the id stays what it is, which is root's.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_by_name_and_number() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\nguest:x:1000:1001::/:/bin/false\n7:x:1007:1008::/:/bin/false\n";
        let group = "root:x:0:\nkvm:x:104:guest\n";
        let cases = [
            ("guest", "1000:1001"),
            ("guest:kvm", "1000:104"),
            ("guest:77", "1000:77"),
            ("1000", "1000:1001"),
            ("7", "1007:1008"),
            ("5000:6000", "5000:6000"),
            ("root", "is root"),
            ("guest:root", "is root"),
            ("nobody", "there is no user nobody"),
            ("guest:nogroup", "there is no group nogroup"),
            ("5000", "give UID:GID"),
            ("-1:-1", "there is no user -1"),
            ("4294967295:1000", "there is no user 4294967295"),
            ("guest:4294967295", "there is no group 4294967295"),
        ];
        for (text, expected) in cases {
            let account = text.parse().unwrap();
            let databases = Databases {
                account: &account,
                passwd: passwd.into(),
                group: group.into(),
            };
            let found = match databases.resolve() {
                Ok((user, group)) => format!("{user}:{group}"),
                Err(e) => e.to_string(),
            };
            assert!(found.contains(expected), "{text}: {found}");
        }
    }

    /// Or the certificates are there when cvmm starts, and gone for every request.
    #[test]
    fn certificates_are_reached_where_their_link_leads() {
        let dir = std::env::temp_dir().join(format!("cvmm-reach-{}", std::process::id()));
        for name in ["link", "link/version", "real"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        let (table, below) = (dir.join("real/table"), dir.join("link/version/table"));
        for (file, expected) in [(&table, &["link", "real"][..]), (&below, &["link"][..])] {
            fs::write(file, "").unwrap();
            let link = dir.join("link/table");
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(file, &link).unwrap();
            let mut config = Config::default();
            config.snp.certs = Some(link);
            let expected: Vec<_> = expected.iter().map(|name| dir.join(name)).collect();
            assert_eq!(reach(&config).0.reads, expected);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_what_is_used_later_is_reached() {
        let mut config = Config::default();
        assert_eq!(reach(&config), (Reach::default(), None));
        config.devices.console = Some("socket=/run/c/console".parse().unwrap());
        config.devices.vsock = Some("cid=3,uds=/run/v/vsock".parse().unwrap());
        config.devices.nets = vec!["passt=run/passt".parse().unwrap()];
        config.snp.certs = Some("/etc/certs/table".into());
        config.tdx.quote_service = Some("/run/tdx-qgs/qgs.socket".parse().unwrap());
        let (reach, relative) = reach(&config);
        assert_eq!(reach.reads, [PathBuf::from("/etc/certs")]);
        assert_eq!(reach.removes, [PathBuf::from("/run/v"), "/run/c".into()]);
        assert_eq!(reach.connects.len(), 3);
        assert_eq!(reach.connects.last(), Some(&"/run/tdx-qgs".into()));
        assert!(reach.connects.iter().all(|path| path.is_absolute()));
        assert_eq!(relative, Some("run/passt".into()));
    }
}
