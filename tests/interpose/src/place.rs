//! A directory with what a host of either kind has, and a kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, Scenario};

/// The port to which the kernel of a [`Place`] writes a byte, again and again, from its first instruction on.
pub const KERNEL_PORT: u8 = 0xf5;

/// The directory; it is removed in the end.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Place {
    /// A host with TDX if `name` begins with `tdx`, and otherwise with SNP; `name` tells places apart.
    ///
    /// # Errors
    /// Files cannot be written.
    pub fn new(name: &str) -> io::Result<Self> {
        let dir = std::env::temp_dir().join(format!("cvmm-interposed-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let place = Self(dir);
        place.file("kernel", &kernel())?;
        let (vendor, flag) = if name.starts_with("tdx") {
            ("GenuineIntel", "tdx_host_platform")
        } else {
            ("AuthenticAMD", "sev_snp")
        };
        let cpuinfo = format!("vendor_id\t: {vendor}\ncpu family\t: 25\nflags\t\t: fpu {flag}\n");
        place.file("proc/cpuinfo", cpuinfo.as_bytes())?;
        place.file("sys/module/kvm_amd/parameters/sev_snp", b"Y\n")?;
        place.file("sys/module/kvm_intel/parameters/tdx", b"Y\n")?;
        place.file("dev/sev", b"")?;
        Ok(place)
    }

    /// Where it is; the kernel is the file `kernel`.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts a file of the host in place.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn file(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let path = self.0.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        fs::write(path, content)
    }

    /// Runs `cvmm run` with the kernel, 64 MiB and `args` on this host.
    ///
    /// # Errors
    /// The program cannot be run; there is no `/dev/kvm`, without which nothing stands behind the model.
    pub fn run(&self, cvmm: &Path, args: &[&str], change: impl FnOnce(&mut Scenario)) -> io::Result<Outcome> {
        fs::metadata("/dev/kvm")?;
        let mut command = Command::new(cvmm);
        command
            .args(["run", "--console", "none", "--memory", "64M", "--kernel"])
            .arg(self.0.join("kernel"))
            .args(args)
            .stdin(std::process::Stdio::null())
            .env_remove("NOTIFY_SOCKET");
        let mut scenario = Scenario::new(self.0.clone());
        change(&mut scenario);
        crate::run(command, scenario)
    }
}

/// A kernel of protocol 2.15 whose 64-bit entry writes to [`KERNEL_PORT`] for ever.
pub fn kernel() -> Vec<u8> {
    const SETUP: usize = 5 * 512;
    let mut file = vec![0; SETUP + 2 * 4096];
    let fields: [(usize, &[u8]); 11] = [
        (0x1f1, &[4]),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 0x02]),
        (0x211, &[1]),
        (0x230, &[0, 0, 0x20, 0]),
        (0x234, &[1]),
        (0x236, &[0x7f, 0]),
        (0x238, &[0xff, 7, 0, 0]),
        (0x260, &[0, 0, 0x20, 0]),
        (SETUP + 0x200, &[0xe6, KERNEL_PORT, 0xeb, 0xfc]),
    ];
    for (at, bytes) in fields {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file
}
