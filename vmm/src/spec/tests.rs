//! Each row of bad input with its exact message and exit code.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use arch::kvm::system::Capabilities;

use super::*;
use crate::config::{Backend, Boot, Disk, Mac, Net, Policy, Snp};

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
        snp: Some(Err(Missing::Cpu)),
        memory_bytes: 16 << 30,
    }
}

fn disk(path: &Path, readonly: bool) -> Disk {
    Disk {
        path: path.into(),
        readonly,
        queues: None,
    }
}

fn net(backend: Backend) -> Net {
    Net {
        backend,
        mac: None,
        queues: None,
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

#[test]
fn a_good_machine_resolves_with_everything_open() {
    let place = Place::new("good");
    let mut config = place.config();
    config.boot.initrd = Some(place.sized("initrd", 3 << 20));
    config.devices.disks = vec![
        disk(&place.sized("a", 1 << 20), false),
        disk(&place.sized("b", 512), true),
        disk(&place.path("b"), true),
    ];
    config.devices.vsock = Some(Vsock {
        cid: 3,
        uds: place.path("vsock"),
    });
    config.devices.console = Some(Console::File(place.path("log")));
    let spec = MachineSpec::resolve(config, facts()).unwrap();
    let parts = spec.parts();
    assert_eq!((parts.memory_bytes, parts.cpus), (512 << 20, 1));
    assert_eq!(parts.payload.cmdline, "console=ttyS0");
    let sizes: Vec<_> = parts
        .devices
        .disks
        .iter()
        .map(|d| (d.bytes, d.readonly))
        .collect();
    assert_eq!(sizes, [(1 << 20, false), (512, true), (512, true)]);
    assert!(place.path("vsock").exists() && place.path("log").exists());
    assert!(matches!(parts.platform, PlatformSpec::Soft));
    drop(spec);
    assert!(!place.path("vsock").exists(), "the socket outlives the machine");
}

#[test]
fn kernel_and_initrd() {
    let place = Place::new("payload");
    fs::write(place.path("text"), "hello").unwrap();
    let mut old = bzimage::tests::kernel();
    old[0x206] = 0x0a;
    fs::write(place.path("old"), old).unwrap();
    let big = place.sized("big", 600 << 20);
    let huge = place.sized("huge", 4 << 30);
    let empty = place.sized("empty", 0);
    let at = |name: &'static str| Some(place.path(name));
    check(
        &place,
        vec![
            (
                "no kernel",
                Box::new(|c| c.boot.kernel = None),
                "no kernel given; add --kernel PATH, for example --kernel /boot/vmlinuz-$(uname -r)",
                2,
            ),
            (
                "absent kernel",
                Box::new(|c| c.boot.kernel = at("absent")),
                "kernel DIR/absent: not found; check the path",
                2,
            ),
            (
                "a directory",
                Box::new(|c| c.boot.kernel = Some(place.0.clone())),
                "kernel DIR: is a directory; give a file",
                2,
            ),
            (
                "a device",
                Box::new(|c| c.boot.kernel = Some("/dev/null".into())),
                "kernel /dev/null: is a character device; give a file",
                2,
            ),
            (
                "empty kernel",
                Box::new(|c| c.boot.kernel = Some(empty.clone())),
                "kernel DIR/empty: is empty; copy it again",
                2,
            ),
            (
                "no bzImage",
                Box::new(|c| c.boot.kernel = at("text")),
                "kernel DIR/text: not a bzImage (no `HdrS` signature); give the distribution's vmlinuz, not vmlinux \
                 or an EFI program",
                2,
            ),
            (
                "old protocol",
                Box::new(|c| c.boot.kernel = at("old")),
                "kernel DIR/old: boot protocol 2.10 is older than 2.12; give a kernel of Linux 3.8 or newer",
                2,
            ),
            (
                "absent initrd",
                Box::new(|c| c.boot.initrd = at("absent")),
                "initrd DIR/absent: not found; check the path",
                2,
            ),
            (
                "initrd larger than memory",
                Box::new(|c| c.boot.initrd = Some(big.clone())),
                "memory: 512M cannot hold the kernel and an initrd of 600 MiB; give at least --memory 672M",
                2,
            ),
            (
                "initrd larger than low memory",
                Box::new(|c| {
                    c.boot.initrd = Some(huge.clone());
                    c.memory = Some(Size(8 << 30));
                }),
                "initrd DIR/huge: 4096 MiB cannot be placed below 3 GiB; give a smaller one",
                2,
            ),
            (
                "long command line",
                Box::new(|c| c.boot.cmdline = Some("x".repeat(2048))),
                "cmdline: 2048 bytes are more than the 2047 that the kernel takes; shorten it",
                2,
            ),
            (
                "NUL in the command line",
                Box::new(|c| c.boot.cmdline = Some("a\0b".into())),
                "cmdline: contains a NUL byte; remove it",
                2,
            ),
        ],
    );
}

#[test]
fn memory_and_cpus() {
    let place = Place::new("size");
    let cases: [(u64, &str); 5] = [
        (
            0,
            "memory: 0 bytes are less than 64M; give for example --memory 512M",
        ),
        (
            512,
            "memory: 512 bytes are less than 64M; give for example --memory 512M",
        ),
        (
            (64 << 20) + 4096,
            "memory: 65540K is not a multiple of 2M; give --memory 64M or 66M",
        ),
        (
            17 << 30,
            "memory: 17G is more than this host has; give --memory 16G or less",
        ),
        (
            441 << 30,
            "memory: 441G is more than the 440G of machine v1; give --memory 440G or less",
        ),
    ];
    for (bytes, message) in cases {
        let mut config = place.config();
        config.memory = Some(Size(bytes));
        assert_eq!(place.refuse(config), (message.to_owned(), 2));
    }
    for (cpus, most) in [(0, 128), (129, 128), (5000, 128)] {
        let mut config = place.config();
        config.cpus = Some(cpus);
        let message = format!("cpus: {cpus} is not between 1 and {most}; give --cpus N in that range");
        assert_eq!(place.refuse(config), (message, 2));
    }
}

#[test]
fn disks() {
    let place = Place::new("disk");
    let good = place.sized("good", 4096);
    let link = place.path("link");
    symlink(&good, &link).unwrap();
    let odd = place.sized("odd", 1000);
    let empty = place.sized("none", 0);
    let taken = place.sized("taken", 4096);
    let holder = File::open(&taken).unwrap();
    holder.try_lock_shared().unwrap();
    let twice = "given twice and not read-only both times; remove one or add ,ro to both";
    let busy = "in use by another process; stop that one, or give every user of it ,ro";
    let absent = place.path("absent");
    check(
        &place,
        vec![
            (
                "absent",
                Box::new(|c| c.devices.disks = vec![disk(&absent, false)]),
                "disk DIR/absent: not found; check the path, or create it with `truncate -s SIZE`",
                2,
            ),
            (
                "a directory",
                Box::new(|c| c.devices.disks = vec![disk(&place.0, true)]),
                "disk DIR: is a directory; give a raw image or a block device",
                2,
            ),
            (
                "odd size",
                Box::new(|c| c.devices.disks = vec![disk(&odd, true)]),
                "disk DIR/odd: 1000 bytes are not a multiple of 512; if it is a raw image, pad it with \
                 `truncate -s %512 DIR/odd`",
                2,
            ),
            (
                "empty",
                Box::new(|c| c.devices.disks = vec![disk(&empty, true)]),
                "disk DIR/none: is empty; make it larger, for example `truncate -s 1G DIR/none`",
                2,
            ),
            (
                "twice for writing",
                Box::new(|c| c.devices.disks = vec![disk(&good, false), disk(&good, false)]),
                &format!("disk DIR/good: {twice}"),
                2,
            ),
            (
                "once for reading, once for writing by another name",
                Box::new(|c| c.devices.disks = vec![disk(&good, true), disk(&link, false)]),
                &format!("disk DIR/link: {twice}"),
                2,
            ),
            (
                "locked by another process",
                Box::new(|c| c.devices.disks = vec![disk(&taken, false)]),
                &format!("disk DIR/taken: {busy}"),
                21,
            ),
            (
                "queues",
                Box::new(|c| {
                    let queues = Some(17);
                    c.devices.disks = vec![Disk {
                        queues,
                        ..disk(&good, false)
                    }];
                }),
                "disk DIR/good: 17 queues are not between 1 and 16; give queues=N in that range",
                2,
            ),
        ],
    );
}

#[test]
fn two_machines_cannot_write_one_disk_but_can_read_it() {
    let place = Place::new("lock");
    let image = place.sized("image", 4096);
    let with = |readonly| {
        let mut config = place.config();
        config.devices.disks = vec![disk(&image, readonly)];
        config
    };
    let writer = MachineSpec::resolve(with(false), facts()).unwrap();
    assert_eq!(place.refuse(with(false)).1, 21);
    assert_eq!(place.refuse(with(true)).1, 21);
    drop(writer);
    let _readers = [(); 2].map(|()| MachineSpec::resolve(with(true), facts()).unwrap());
    assert_eq!(place.refuse(with(false)).1, 21);
}

#[test]
fn nets() {
    let place = Place::new("net");
    let number = {
        use std::os::fd::AsRawFd;
        // Nobody opens descriptors this high, so this number is closed.
        u32::try_from(io::stderr().as_raw_fd()).unwrap() + 900
    };
    let closed = format!(
        "net fd {number}: not an open descriptor; let the process that starts cvmm pass it on, as in \
         `cvmm … {number}<>FILE`"
    );
    check(
        &place,
        vec![
            (
                "absent tap",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("cvmm-none".into()))]),
                "net tap=cvmm-none: no such interface; create it with `ip tuntap add cvmm-none mode tap && ip link \
                 set cvmm-none up`",
                2,
            ),
            (
                "not a tap",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("lo".into()))]),
                "net tap=lo: not a tap interface; create one with `ip tuntap add NAME mode tap`",
                2,
            ),
            (
                "long name",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("sixteen-letters-".into()))]),
                "net tap=sixteen-letters-: not the name of an interface (1 to 15 bytes, no `/` or space); see \
                 `ip link`",
                2,
            ),
            (
                "path as name",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("../x".into()))]),
                "net tap=../x: not the name of an interface (1 to 15 bytes, no `/` or space); see `ip link`",
                2,
            ),
            (
                "closed descriptor",
                Box::new(|c| c.devices.nets = vec![net(Backend::Fd(number))]),
                &closed,
                2,
            ),
            (
                "absent passt",
                Box::new(|c| c.devices.nets = vec![net(Backend::Passt("/nonexistent".into()))]),
                "net passt=/nonexistent: no socket; start passt first, as in `passt --socket /nonexistent`",
                2,
            ),
        ],
    );
}

#[test]
fn net_addresses_and_queues() {
    let place = Place::new("mac");
    let socket = place.path("passt");
    let _listener = UnixListener::bind(&socket).unwrap();
    let passt = || net(Backend::Passt(socket.clone()));
    let mac = |first| Some(Mac([first, 0, 0, 0, 0, 1]));
    check(
        &place,
        vec![
            (
                "one host side twice",
                Box::new(|c| c.devices.nets = vec![passt(), passt()]),
                "net passt=DIR/passt: given twice; remove one",
                2,
            ),
            (
                "multicast address",
                Box::new(|c| {
                    c.devices.nets = vec![Net {
                        mac: mac(3),
                        ..passt()
                    }]
                }),
                "net mac=03:00:00:00:00:01: a multicast or zero address; give one whose first byte is even, for \
                 example 02:00:00:00:00:01",
                2,
            ),
            (
                "more queues than passt has",
                Box::new(|c| {
                    c.devices.nets = vec![Net {
                        queues: Some(2),
                        ..passt()
                    }]
                }),
                "net passt=DIR/passt: 2 queues are not between 1 and 1; give queues=N in that range",
                2,
            ),
        ],
    );
    let mut config = place.config();
    config.devices.nets = vec![passt()];
    let address = |config| {
        let spec = MachineSpec::resolve(config, facts()).unwrap();
        spec.parts().devices.nets[0].mac
    };
    let first = address(config.clone());
    assert_eq!(first.bytes()[0], 2);
    assert_eq!(address(config), first, "the address is the same in every run");
}

#[test]
fn sockets_and_console() {
    let place = Place::new("socket");
    let used = place.path("used");
    let _listener = UnixListener::bind(&used).unwrap();
    let file = place.sized("file", 1);
    let long = place.path(&"x".repeat(120));
    let vsock = |cid, uds: &Path| Some(Vsock { cid, uds: uds.into() });
    let long_text = format!(
        "vsock DIR/{}: {} bytes are more than the 107 of a socket path; give a shorter one",
        "x".repeat(120),
        long.as_os_str().len()
    );
    let free = place.path("free");
    let texts: Vec<_> = [0, 2, u32::MAX]
        .map(|cid| {
            (
                cid,
                format!("vsock cid={cid}: reserved; give one from 3 to 4294967294"),
            )
        })
        .into();
    let mut cases: Vec<Case<'_>> = vec![
        (
            "vsock path in use",
            Box::new(|c| c.devices.vsock = vsock(3, &used)),
            "vsock DIR/used: in use by another process; stop that one or give another path",
            21,
        ),
        (
            "console path in use",
            Box::new(|c| c.devices.console = Some(Console::Socket(used.clone()))),
            "console DIR/used: in use by another process; stop that one or give another path",
            21,
        ),
        (
            "a file where the socket shall be",
            Box::new(|c| c.devices.vsock = vsock(3, &file)),
            "vsock DIR/file: is a regular file; give another path or remove it",
            2,
        ),
        (
            "long path",
            Box::new(|c| c.devices.vsock = vsock(3, &long)),
            &long_text,
            2,
        ),
        (
            "no directory",
            Box::new(|c| c.devices.vsock = vsock(3, Path::new("/nonexistent/v"))),
            "vsock /nonexistent/v: not found; give a path in a directory that exists and that this user may write to",
            2,
        ),
        (
            "one path for both",
            Box::new(|c| {
                c.devices.vsock = vsock(3, &free);
                c.devices.console = Some(Console::Socket(free.clone()));
            }),
            "console DIR/free: also the path of vsock; give another one",
            2,
        ),
        (
            "console on a directory",
            Box::new(|c| c.devices.console = Some(Console::File(place.0.clone()))),
            "console DIR: is a directory; give a file, or socket=PATH for a socket",
            2,
        ),
    ];
    for (cid, text) in &texts {
        let free = &free;
        cases.push((
            "cid",
            Box::new(move |c| c.devices.vsock = vsock(*cid, free)),
            text,
            2,
        ));
    }
    check(&place, cases);
}

#[test]
fn what_is_created_last_is_undone_when_it_fails() {
    let place = Place::new("undo");
    let mut config = place.config();
    config.devices.vsock = Some(Vsock {
        cid: 3,
        uds: place.path("vsock"),
    });
    config.devices.console = Some(Console::File("/nonexistent/log".into()));
    let (message, code) = place.refuse(config);
    assert!(
        message.starts_with("console file /nonexistent/log cannot be opened"),
        "{message}"
    );
    assert_eq!(code, 2);
}

#[test]
fn a_socket_that_a_killed_process_left_is_replaced() {
    let place = Place::new("stale");
    let path = place.path("vsock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let mut config = place.config();
    config.devices.vsock = Some(Vsock { cid: 3, uds: path });
    assert!(MachineSpec::resolve(config, facts()).is_ok());
}

#[test]
fn too_many_devices() {
    let place = Place::new("many");
    let image = place.sized("image", 512);
    let mut config = place.config();
    config.devices.disks = vec![disk(&image, true); 32];
    let message = "32 devices are more than the 31 of machine v1; remove some";
    assert_eq!(place.refuse(config), (message.to_owned(), 2));
}

#[test]
fn hosts_without_what_is_asked_for() {
    let place = Place::new("host");
    let host = |platform, kvm: Result<u32, io::ErrorKind>| {
        let mut config = place.config();
        config.platform = Some(platform);
        let mut facts = facts();
        match kvm {
            Ok(types) => {
                facts.kvm = facts.kvm.map(|kvm| Capabilities {
                    vm_types: types,
                    ..kvm
                })
            }
            Err(kind) => facts.kvm = Err(kind.into()),
        }
        let error = MachineSpec::resolve(config, facts).unwrap_err();
        (error.to_string(), error.class() as u8)
    };
    let no_snp = "this CPU has no SEV-SNP; it takes an AMD EPYC of the 7003 series or later";
    let cases = [
        (
            host(PlatformName::Soft, Err(io::ErrorKind::NotFound)),
            "/dev/kvm: not found; load kvm_amd or kvm_intel, or enable virtualisation in the firmware (`cvmm doctor` \
             tells more)"
                .to_owned(),
        ),
        (
            host(PlatformName::Soft, Err(io::ErrorKind::PermissionDenied)),
            "/dev/kvm: permission denied; add this user to the group kvm (`usermod -aG kvm $USER`, then log in again)"
                .to_owned(),
        ),
        (host(PlatformName::Snp, Ok(1)), format!("platform snp: {no_snp}")),
        (
            host(PlatformName::Auto, Ok(1)),
            format!(
                "platform auto: this host can protect no guest (no TDX; for SEV-SNP: {no_snp}); for a guest without \
                 any protection say --platform soft"
            ),
        ),
        (
            host(PlatformName::Tdx, Ok(1)),
            "platform tdx: KVM on this host offers no TDX guests; `cvmm doctor --for tdx` names what is missing"
                .to_owned(),
        ),
        (
            host(PlatformName::Auto, Ok(1 << 5)),
            "platform tdx: this version of cvmm cannot launch TDX guests; take --platform snp, or soft for no \
             protection"
                .to_owned(),
        ),
    ];
    for (got, message) in cases {
        assert_eq!(got, (message, 20));
    }
}

#[test]
fn options_of_snp() {
    let place = Place::new("snp");
    let offered = |features, policy| {
        let mut facts = facts();
        facts.snp = Some(Ok(host::SnpHost {
            sev: std::sync::Arc::new(File::open("/dev/null").unwrap()),
            offered: ::snp::host::Offered {
                features,
                policy,
                certificates: false,
            },
        }));
        facts
    };
    let with = |snp: Snp| {
        let mut config = place.config();
        config.platform = Some(PlatformName::Snp);
        config.snp = snp;
        config
    };
    let refuse = |snp, facts| {
        let error = MachineSpec::resolve(with(snp), facts).unwrap_err();
        (error.to_string(), error.class() as u8)
    };
    let good = MachineSpec::resolve(with(Snp::default()), offered(0, 0x3_0000)).unwrap();
    let PlatformSpec::Snp(spec) = &good.parts().platform else {
        panic!("not SNP");
    };
    assert_eq!(spec.config.policy.bits(), 0x3_0000);

    let policy = Some(Policy(0x1_0000));
    let (text, code) = refuse(
        Snp {
            policy,
            ..Snp::default()
        },
        offered(0, 0x3_0000),
    );
    assert!(
        text.starts_with("policy: 0x10000 is not a guest policy: bit 17 must be set"),
        "{text}"
    );
    assert_eq!(code, 2);

    let tsc = Snp {
        secure_tsc: true,
        ..Snp::default()
    };
    let (text, _) = refuse(tsc.clone(), offered(0x20, 0x3_0000));
    assert!(text.contains("does not offer secure-tsc"), "{text}");

    let half = Snp {
        id_block: Some("b".into()),
        ..Snp::default()
    };
    let (text, _) = refuse(half, offered(0, 0x3_0000));
    assert_eq!(
        text,
        "--id-block: needs --id-auth too; `cvmm id-block` makes both"
    );

    let short = place.sized("short", 10);
    let both = Snp {
        id_block: Some(short.clone()),
        id_auth: Some(short),
        ..Snp::default()
    };
    let (text, _) = refuse(both, offered(0, 0x3_0000));
    assert!(
        text.ends_with("/short: an ID block has 96 bytes, this one has 10"),
        "{text}"
    );

    let mut soft = place.config();
    soft.snp = tsc;
    let message = "--secure-tsc: only an SNP guest has it; add --platform snp or remove it";
    assert_eq!(place.refuse(soft), (message.to_owned(), 2));
}
