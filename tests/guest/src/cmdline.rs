//! What the kernel command line asks of a guest: words of the form `cvmm.KEY=VALUE`.

use std::str::FromStr;

/// The kernel command line.
pub(crate) struct CommandLine(String);

impl CommandLine {
    /// Reads /proc/cmdline; proc must be mounted.
    pub(crate) fn read() -> CommandLine {
        CommandLine(std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// The value of `cvmm.KEY=`, the last one when there are several.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let words = self.0.split_ascii_whitespace().rev();
        words
            .filter_map(|word| word.strip_prefix("cvmm.")?.split_once('='))
            .find(|(k, _)| *k == key)
            .map(|(_, v)| v)
    }

    /// The value of `cvmm.KEY=` as a number or address; `default` when it is absent or malformed.
    pub(crate) fn or<T: FromStr>(&self, key: &str, default: T) -> T {
        self.get(key)
            .and_then(|value| value.parse().ok())
            .unwrap_or(default)
    }
}

#[cfg(test)]
mod tests {
    use super::CommandLine;

    #[test]
    fn the_last_setting_of_a_key_wins_and_others_do_not_match() {
        let line =
            CommandLine("console=ttyS0 cvmm.run=disk xcvmm.run=no cvmm.run=net,smp cvmm.mib=7\n".into());
        assert_eq!(line.get("run"), Some("net,smp"));
        assert_eq!(line.or("mib", 1_u32), 7);
        assert_eq!(line.or("absent", 1_u32), 1);
    }
}
