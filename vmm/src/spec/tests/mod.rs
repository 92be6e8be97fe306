//! Each row of bad input with its exact message and exit code.

mod devices;
mod host;
mod payload;
mod sockets;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use arch::kvm::system::Capabilities;

use super::*;
use crate::config::{Boot, Disk};

/// A directory of its own, with a kernel that passes.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("cvmm-spec-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("kernel"), bzimage::tests::kernel()).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn sized(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// A machine that resolves.
    fn config(&self) -> Config {
        Config {
            boot: Boot {
                kernel: Some(self.path("kernel")),
                ..Boot::default()
            },
            platform: Some(PlatformName::Soft),
            devices: Devices {
                console: Some(Console::None),
                ..Devices::default()
            },
            ..Config::default()
        }
    }

    /// The error with this place's name taken out, and its exit code.
    fn refuse(&self, config: Config) -> (String, u8) {
        let before = self.listing();
        let error = MachineSpec::resolve(config, facts()).unwrap_err();
        assert_eq!(self.listing(), before, "{error} left something behind");
        let text = error.to_string().replace(self.0.to_str().unwrap(), "DIR");
        assert!(!text.contains('\n'), "{text}");
        (text, error.class() as u8)
    }

    fn listing(&self) -> Vec<PathBuf> {
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn facts() -> HostFacts {
    HostFacts {
        kvm: Ok(Capabilities {
            api_version: 12,
            vm_types: 1,
            guest_memfd: true,
            guest_memfd_flags: 0,
            memory_attributes: 0,
            memory_fault_info: true,
            exit_hypercall: 1 << 12,
            split_irqchip: true,
            max_vcpus: 128,
        }),
        snp: Some(Err(::snp::host::Missing::Cpu)),
        tdx: Some(Err(::tdx::host::Missing::Cpu)),
        memory_bytes: 16 << 30,
    }
}

fn disk(path: &Path, readonly: bool) -> Disk {
    Disk {
        path: path.into(),
        readonly,
        queues: None,
        limit: Default::default(),
    }
}

type Case<'a> = (&'a str, Box<dyn Fn(&mut Config) + 'a>, &'a str, u8);

fn check(place: &Place, cases: Vec<Case<'_>>) {
    for (name, edit, message, code) in cases {
        let mut config = place.config();
        edit(&mut config);
        assert_eq!(place.refuse(config), (message.to_owned(), code), "{name}");
    }
}
