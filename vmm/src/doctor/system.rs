//! The host beside KVM: kernel, limits, memory, and what devices can use.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use arch::host::landlock_version;

use super::checks::owner;
use super::report::Check;

const TUN: &str = "/dev/net/tun";
/// Below this a machine with many devices may run out.
const FEW_FILES: u64 = 1024;

/// Content of a small file of the kernel's; empty if there is none.
pub(super) fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// True if the first `flags` line of `/proc/cpuinfo` holds `flag`.
pub(super) fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    line.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
}

pub(super) fn checks() -> Vec<Check> {
    vec![
        seccomp(&read("/proc/sys/kernel/seccomp/actions_avail")),
        landlock(landlock_version()),
        io_uring(read("/proc/sys/kernel/io_uring_disabled").trim()),
        tun(),
        files(&read("/proc/self/limits")),
        memory(&read("/proc/meminfo")),
        huge_pages(read("/sys/kernel/mm/transparent_hugepage/enabled").trim()),
    ]
}

/// SNP hosts and guest_memfd came with Linux 6.11.
pub(super) fn kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
    if (number(), number()) >= (6, 11) {
        Check::ok("kernel", format!("Linux {release}"))
    } else {
        Check::warn(
            "kernel",
            format!("Linux {release}"),
            "SNP takes Linux 6.11 or later, TDX 6.16; on Debian 12 install linux-image-amd64 from backports",
        )
    }
}

fn seccomp(actions: &str) -> Check {
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return Check::ok("sandbox.seccomp", "system calls can be filtered");
    }
    Check::warn(
        "sandbox.seccomp",
        "this kernel cannot filter system calls",
        "take a kernel with CONFIG_SECCOMP_FILTER=y; until then cvmm runs guests only with --sandbox off",
    )
}

fn landlock(version: io::Result<u32>) -> Check {
    let remedy = match version {
        Ok(version) => return Check::ok("sandbox.landlock", format!("version {version}")),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            "add landlock to `lsm=` on the kernel's command line; until then cvmm keeps its access to files"
        }
        Err(_) => {
            "take Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK=y, and allow landlock in the container; until then \
             cvmm keeps its access to files"
        }
    };
    Check::warn("sandbox.landlock", "no Landlock", remedy)
}

fn io_uring(disabled: &str) -> Check {
    match disabled {
        "1" | "2" => Check::warn(
            "io_uring",
            format!("switched off (kernel.io_uring_disabled={disabled})"),
            "disks use threads instead, which cost more CPU; `sysctl kernel.io_uring_disabled=0`",
        ),
        "" => Check::ok("io_uring", "not restricted by this kernel"),
        _ => Check::ok("io_uring", "allowed"),
    }
}

fn tun() -> Check {
    match File::options().read(true).write(true).open(TUN) {
        Ok(_) => Check::ok("net.tun", format!("{TUN} can be opened")),
        Err(e) if e.kind() == ErrorKind::NotFound => Check::warn(
            "net.tun",
            format!("{TUN} does not exist"),
            "--net tap= needs it: `modprobe tun`; --net passt= does not",
        ),
        Err(e) => Check::warn(
            "net.tun",
            format!("{TUN}: {e} ({})", owner(Path::new(TUN))),
            "--net tap= needs it: give this user access; --net passt= does not",
        ),
    }
}

/// The soft limit in a line of `/proc/self/limits`.
fn soft_limit(limits: &str, name: &str) -> Option<String> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next().map(str::to_owned)
}

fn files(limits: &str) -> Check {
    let open = soft_limit(limits, "Max open files").unwrap_or_else(|| "unknown".into());
    let locked = soft_limit(limits, "Max locked memory").unwrap_or_else(|| "unknown".into());
    let found = format!("{open} open files, {locked} bytes of locked memory");
    if open.parse::<u64>().is_ok_and(|n| n < FEW_FILES) {
        Check::warn("limits", found, "raise the limit of open files: `ulimit -n 4096`")
    } else {
        Check::ok("limits", found)
    }
}

fn memory(meminfo: &str) -> Check {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
    };
    let total = field("MemTotal:").unwrap_or(0) >> 10;
    let available = field("MemAvailable:").unwrap_or(0) >> 10;
    let huge = field("HugePages_Total:").unwrap_or(0);
    let found = format!("{available} of {total} MiB available, {huge} reserved huge pages");
    if huge.saturating_mul(field("Hugepagesize:").unwrap_or(0)) >> 10 > total / 2 {
        Check::warn(
            "memory",
            found,
            "cvmm does not use reserved huge pages; free them: `sysctl vm.nr_hugepages=0`",
        )
    } else {
        Check::ok("memory", found)
    }
}

fn huge_pages(enabled: &str) -> Check {
    let mode = enabled.split(['[', ']']).nth(1).unwrap_or("unknown");
    let found = format!("transparent huge pages: {mode}");
    if mode == "always" {
        Check::ok("memory.huge-pages", found)
    } else {
        Check::warn(
            "memory.huge-pages",
            found,
            "guests of `--platform soft` are faster with `echo always > /sys/kernel/mm/transparent_hugepage/enabled`; \
             confidential ones do not use huge pages",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
                          Max open files            256                  4096                 files     \n\
                          Max locked memory         8388608              8388608              bytes     \n";
    const MEMINFO: &str = "MemTotal:       24689400 kB\nMemAvailable:   20480000 kB\nHugePages_Total:       3\n\
                           Hugepagesize:       2048 kB\n";

    #[test]
    fn what_the_kernel_says_is_understood() {
        let cases = [
            (kernel("6.12.9-1-amd64"), Status::Ok, "Linux 6.12.9-1-amd64"),
            (kernel("7.0.0"), Status::Ok, "Linux 7.0.0"),
            (kernel("6.1.0-40-amd64"), Status::Warn, "Linux 6.1.0-40-amd64"),
            (
                seccomp("kill_process kill_thread trap\n"),
                Status::Ok,
                "system calls can be filtered",
            ),
            (
                seccomp(""),
                Status::Warn,
                "this kernel cannot filter system calls",
            ),
            (landlock(Ok(7)), Status::Ok, "version 7"),
            (
                landlock(Err(io::Error::from_raw_os_error(libc::ENOSYS))),
                Status::Warn,
                "no Landlock",
            ),
            (io_uring("0"), Status::Ok, "allowed"),
            (
                io_uring("2"),
                Status::Warn,
                "switched off (kernel.io_uring_disabled=2)",
            ),
            (
                files(LIMITS),
                Status::Warn,
                "256 open files, 8388608 bytes of locked memory",
            ),
            (
                files(&LIMITS.replace("256 ", "unlimited ")),
                Status::Ok,
                "unlimited open files, 8388608 bytes of locked memory",
            ),
            (
                memory(MEMINFO),
                Status::Ok,
                "20000 of 24110 MiB available, 3 reserved huge pages",
            ),
            (
                huge_pages("[always] madvise never"),
                Status::Ok,
                "transparent huge pages: always",
            ),
            (
                huge_pages("always madvise [never]"),
                Status::Warn,
                "transparent huge pages: never",
            ),
        ];
        for (check, status, found) in cases {
            assert_eq!((check.status, check.found.as_str()), (status, found));
        }
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        let cpuinfo = "model name\t: svm\nflags\t\t: fpu svm_lock sev\n";
        assert!(has_flag(cpuinfo, "sev"));
        assert!(!has_flag(cpuinfo, "svm"));
        assert!(!has_flag("", "svm"));
    }
}
