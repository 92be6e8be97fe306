//! Process 1 of an L1 host and of an L2 guest: mounts, modules, and then what the command line asks.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitPidFlag, waitpid};

use crate::checks;
use crate::cmdline::CommandLine;

const MOUNTS: &[(&str, &str, &str)] = &[
    ("proc", "/proc", "proc"),
    ("sysfs", "/sys", "sysfs"),
    ("devtmpfs", "/dev", "devtmpfs"),
    ("devpts", "/dev/pts", "devpts"),
    ("tmpfs", "/dev/shm", "tmpfs"),
    ("tmpfs", "/run", "tmpfs"),
    ("tmpfs", "/tmp", "tmpfs"),
];

/// What to do once the work is done.
#[derive(Clone, Copy)]
pub(crate) enum Then {
    /// Power the machine off.
    PowerOff,
    /// Restart it.
    Reboot,
}

/// Never returns: an init that ends panics its kernel.
pub(crate) fn run() -> ! {
    for (source, target, kind) in MOUNTS {
        let _ = fs::create_dir_all(target);
        attach(source, target, kind);
    }
    let wanted = CommandLine::read();
    // A missing device makes a module say so; the tests then name what is not there.
    load_modules();
    attach("configfs", "/sys/kernel/config", "configfs");
    attach("tracefs", "/sys/kernel/tracing", "tracefs");
    if wanted.get("role") == Some("l1") {
        host(&wanted);
    }
    // Whoever wonders why a guest stands still needs the trace that its kernel prints as warnings.
    let _ = fs::write("/proc/sys/kernel/printk", "5");
    checks::watch_power_button();
    end(checks::run(&wanted))
}

/// Mounts a kernel file system; one that this kernel does not have stays away.
fn attach(source: &str, target: &str, kind: &str) {
    if Path::new(target).is_dir() {
        let _ = mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>);
    }
}

/// Loads /modules/ORDER, one `file parameters` to a line.
fn load_modules() {
    let order = fs::read_to_string("/modules/ORDER").unwrap_or_default();
    for line in order.lines() {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let parameters = std::ffi::CString::new(parameters).unwrap_or_default();
        let loaded = fs::File::open(Path::new("/modules").join(name))
            .map(|file| finit_module(&file, &parameters, ModuleInitFlags::empty()));
        match loaded {
            Ok(
                Ok(())
                | Err(nix::errno::Errno::EEXIST | nix::errno::Errno::ENODEV | nix::errno::Errno::EOPNOTSUPP),
            ) => {}
            Ok(Err(error)) => println!("init: module {name}: {error}"),
            Err(error) => println!("init: module {name}: {error}"),
        }
    }
}

/// The L1 host: runs the agent, mounts the optional QEMU disk, collects orphans.
fn host(wanted: &CommandLine) -> ! {
    let _ = Command::new("/bin/busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status();
    if let Some(disk) = wanted.get("qemu") {
        let _ = fs::create_dir_all("/opt/qemu");
        if let Err(error) = mount(
            Some(disk),
            "/opt/qemu",
            Some("ext4"),
            MsFlags::MS_RDONLY,
            None::<&str>,
        ) {
            println!("init: {disk} on /opt/qemu: {error}");
        }
    }
    let agent = Command::new("/proc/self/exe").arg("agent").spawn();
    if let Err(error) = &agent {
        println!("init: agent: {error}");
    }
    loop {
        if waitpid(None, Some(WaitPidFlag::empty())).is_err() {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

/// Writes everything out and ends the machine.
pub(crate) fn end(then: Then) -> ! {
    println!(
        "CVMM-END {}",
        if matches!(then, Then::Reboot) {
            "reboot"
        } else {
            "poweroff"
        }
    );
    checks::release_disks();
    nix::unistd::sync();
    let mode = if matches!(then, Then::Reboot) {
        RebootMode::RB_AUTOBOOT
    } else {
        RebootMode::RB_POWER_OFF
    };
    let outcome = reboot(mode);
    println!("init: reboot returned {outcome:?}");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
