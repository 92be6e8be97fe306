//! What doctor found, as data, JSON and text.

use std::fmt;

use serde::Serialize;

/// Everything that doctor found.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Version of this format; a field that changes its meaning makes it 2.
    pub schema: u32,
    /// cvmm's version.
    pub cvmm: &'static str,
    /// The host's kernel release.
    pub kernel: String,
    /// On which platforms a stock guest can run here.
    pub usable: Usable,
    /// In the order in which they depend on one another.
    pub checks: Vec<Check>,
}

/// On which platforms a stock guest can run.
#[derive(Serialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usable {
    /// Without protection.
    pub soft: bool,
    /// AMD SEV-SNP.
    pub snp: bool,
    /// Intel TDX.
    pub tdx: bool,
}

/// Outcome of one check.
#[derive(Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There.
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// Not there; `needed_by` cannot run.
    Missing,
}

/// One thing that was looked at.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Stable name, e.g. `kvm.device`.
    pub name: &'static str,
    /// Outcome.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// Platforms that cannot run without it; empty if it is good to have.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub needed_by: &'static [&'static str],
    /// What to do, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

pub(super) const ALL: &[&str] = &["soft", "snp", "tdx"];
pub(super) const SOFT: &[&str] = &["soft"];
pub(super) const PRIVATE: &[&str] = &["snp", "tdx"];
pub(super) const SNP: &[&str] = &["snp"];
pub(super) const TDX: &[&str] = &["tdx"];

impl Check {
    pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            needed_by: &[],
            remedy: None,
        }
    }

    pub(super) fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            remedy: Some(remedy.into()),
            ..Self::ok(name, found)
        }
    }

    pub(super) fn missing(
        name: &'static str,
        needed_by: &'static [&'static str],
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Missing,
            needed_by,
            remedy: Some(remedy.into()),
            ..Self::ok(name, found)
        }
    }
}

/// The checks up to the first that is missing: whatever follows would only repeat that, so nobody looks.
pub(super) fn up_to_the_first_lack(checks: impl IntoIterator<Item = Check>) -> Vec<Check> {
    let mut found = Vec::new();
    for check in checks {
        let lacks = check.status == Status::Missing;
        found.push(check);
        if lacks {
            break;
        }
    }
    found
}

impl Report {
    /// Decides from the checks what can run.
    pub(super) fn new(kernel: String, checks: Vec<Check>) -> Self {
        let free = |platform: &str| {
            let mut lacking = checks.iter().filter(|check| check.status == Status::Missing);
            !lacking.any(|check| check.needed_by.contains(&platform))
        };
        let usable = Usable {
            soft: free("soft"),
            snp: free("snp"),
            tdx: free("tdx"),
        };
        Self {
            schema: 1,
            cvmm: env!("CARGO_PKG_VERSION"),
            kernel,
            usable,
            checks,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.status {
                Status::Ok => "ok     ",
                Status::Warn => "warn   ",
                Status::Missing => "missing",
            };
            let decides = if check.needed_by.is_empty() {
                String::new()
            } else {
                format!(" (needed by {})", check.needed_by.join(", "))
            };
            writeln!(to, "{mark}  {:<22} {}{decides}", check.name, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(to, "{:32}-> {remedy}", "")?;
            }
        }
        let word = |usable| if usable { "yes" } else { "no" };
        writeln!(to, "\nA stock guest can run here:")?;
        writeln!(to, "  soft (no protection): {}", word(self.usable.soft))?;
        writeln!(to, "  snp  (AMD SEV-SNP):   {}", word(self.usable.snp))?;
        writeln!(to, "  tdx  (Intel TDX):     {}", word(self.usable.tdx))
    }
}

#[cfg(test)]
impl Report {
    /// The check that found something missing; no other did.
    pub(super) fn only_lack(&self) -> &Check {
        let lacks: Vec<_> = self
            .checks
            .iter()
            .filter(|c| c.status == Status::Missing)
            .collect();
        let [lack] = *lacks else { panic!("{lacks:?}") };
        lack
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report() -> Report {
        let checks = vec![
            Check::ok("kvm.device", "there"),
            Check::warn("net.tun", "absent", "modprobe tun"),
            Check::missing("snp.cpu", SNP, "no SNP", "take another"),
        ];
        Report::new("6.12.9".into(), checks)
    }

    #[test]
    fn json_has_the_documented_shape() {
        assert_eq!(
            serde_json::to_value(report()).unwrap(),
            json!({
                "schema": 1,
                "cvmm": env!("CARGO_PKG_VERSION"),
                "kernel": "6.12.9",
                "usable": {"soft": true, "snp": false, "tdx": true},
                "checks": [
                    {"name": "kvm.device", "status": "ok", "found": "there"},
                    {"name": "net.tun", "status": "warn", "found": "absent", "remedy": "modprobe tun"},
                    {
                        "name": "snp.cpu", "status": "missing", "found": "no SNP", "needed_by": ["snp"],
                        "remedy": "take another",
                    },
                ],
            })
        );
    }

    #[test]
    fn text_shows_each_remedy_under_its_check() {
        let text = report().to_string();
        assert!(text.contains(
            "missing  snp.cpu                no SNP (needed by snp)\n                                -> take another\n"
        ));
        assert!(text.ends_with("  tdx  (Intel TDX):     yes\n"));
    }
}
