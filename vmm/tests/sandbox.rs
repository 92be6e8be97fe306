//! Each kind of thread under its own list, in a process that the test starts and watches: what is on the list works, and
//! what is not ends the process with SIGSYS. Every forbidden call is also made without the sandbox, where it must work:
//! otherwise its failure would prove nothing.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::arithmetic_side_effects,
    reason = "a test stops at the first surprise"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use arch::blockio::Disk;
use arch::kvm::system::Host;
use arch::kvm::vm::Vm;
use tdx::qgs::{Address, Qgs, Stop, TD_REPORT_BYTES};
use vm_memory::mmap::MmapRegionBuilder;
use vmm::sandbox::{Jail, Plan, Powers, Reach, Sandbox, Thread};

const SIGSYS: i32 = 31;
/// Everything that a call needs, opened before the sandbox.
struct Tools {
    kvm: Option<Host>,
    disk: Disk,
    file: File,
    folder: PathBuf,
    stop: Stop,
}

/// Makes a call of this name. An answer of the kernel's, good or bad, is an answer.
fn call(name: &str, tools: &Tools) -> io::Result<()> {
    let map = |protection| {
        let region = MmapRegionBuilder::<()>::new(4096).with_mmap_prot(protection);
        region.build().map(drop).map_err(io::Error::other)
    };
    match name {
        "eventfd" => rustix::event::eventfd(0, EVENT).map(drop).map_err(Into::into),
        "memory" => map(libc::PROT_READ | libc::PROT_WRITE),
        // More than the C library keeps for a thread, in pieces that it does not map one by one. (Not for the main
        // thread: here it is a thread of the harness, which has its own heap already.)
        "heap" => {
            let pieces: Vec<_> = (0..64).map(|i| vec![1_u8; 100_000 + i]).collect();
            drop(std::hint::black_box(pieces));
            Ok(())
        }
        "code" => map(libc::PROT_READ | libc::PROT_EXEC),
        "thread" => thread::Builder::new()
            .spawn(|| ())?
            .join()
            .map_err(|_| io::Error::other("panicked")),
        "process" => Command::new("/bin/true").status().map(drop),
        "signal" => rustix::process::test_kill_process(rustix::process::getpid()).map_err(Into::into),
        "internet" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "unix" => UnixDatagram::unbound().map(drop),
        "open" => File::open(tools.folder.join("there/file")).map(drop),
        "open elsewhere" => File::open(tools.folder.join("file")).map(drop),
        "create" => File::create(tools.folder.join("there/new")).map(drop),
        "remove" => fs::remove_file(tools.folder.join("there/socket")),
        "remove elsewhere" => fs::remove_file(tools.folder.join("file")),
        "sync" => tools.file.sync_data(),
        "ring" => tools.disk.uring_engine(4).map(drop),
        "vm" => Vm::create(tools.kvm.as_ref().unwrap(), 0).map(drop),
        "quote" => quote(tools),
        "parent" => {
            std::hint::black_box(rustix::process::getppid());
            Ok(())
        }
        other => panic!("no call {other}"),
    }
}

/// A request for a quote, from connection to answer.
fn quote(tools: &Tools) -> io::Result<()> {
    let qgs = Qgs::new(Address::Unix(tools.folder.join("there/qgs")));
    let until = Instant::now() + Duration::from_secs(20);
    let quote = qgs.quote(&[0; TD_REPORT_BYTES], 4096, until, &tools.stop);
    quote.map(drop).map_err(io::Error::other)
}

/// Answers one such request with three bytes.
fn serve_quote(folder: &Path) {
    let listener = UnixListener::bind(folder.join("there/qgs")).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 1052]).unwrap();
        let words = [0x0001_0001, 1, 27, 0, 0, 3_u32].map(u32::to_le_bytes);
        let answer = [&[0, 0, 0, 27][..], &words.concat(), b"yes"].concat();
        stream.write_all(&answer).unwrap();
    });
}

const EVENT: rustix::event::EventfdFlags =
    rustix::event::EventfdFlags::CLOEXEC.union(rustix::event::EventfdFlags::NONBLOCK);

/// What the started process does: `THREAD POWERS MODE FOLDER CALL`.
#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn child() {
    let words = std::env::var("CVMM_SANDBOX_CHILD").unwrap();
    let words: Vec<_> = words.splitn(5, ' ').collect();
    let &[thread, powers, mode, folder, name] = words.as_slice() else {
        panic!("{words:?}");
    };
    let folder = PathBuf::from(folder);
    let file = File::options()
        .read(true)
        .write(true)
        .open(folder.join("file"))
        .unwrap();
    let tools = Tools {
        kvm: Host::open(Path::new("/dev/kvm")).ok(),
        disk: Disk::open(file.try_clone().unwrap()).unwrap(),
        file,
        folder: folder.clone(),
        stop: Stop::new().unwrap(),
    };
    let there = vec![folder.join("there")];
    let plan = Plan {
        on: mode != "off",
        jail: Jail {
            user: (mode == "jail").then_some((12345, 54321)),
            ..Jail::default()
        },
        reach: Reach {
            reads: there.clone(),
            connects: there.clone(),
            removes: there,
        },
        powers: Powers {
            vsock: powers.contains("vsock"),
            certs: powers.contains("certs"),
            quotes: powers.contains("quotes"),
        },
    };
    let sandbox = Sandbox::enter(&plan).unwrap();
    let thread = match thread {
        "main" => None,
        "events" => Some(Thread::Events),
        "vcpu" => Some(Thread::Vcpu),
        "disk" => Some(Thread::Disk),
        "quotes" => Some(Thread::Quotes),
        other => panic!("no thread {other}"),
    };
    let act = move || {
        if let Some(thread) = thread {
            sandbox.confine(thread).unwrap();
        }
        println!("confined");
        if name == "wait" {
            io::stdin().read_exact(&mut [0]).unwrap();
        }
        match call(if name == "wait" { "memory" } else { name }, &tools) {
            Ok(()) => println!("answer good"),
            Err(e) => println!("answer {:?}", e.kind()),
        }
    };
    match thread {
        None => act(),
        Some(_) => thread::scope(|scope| scope.spawn(act).join().unwrap()),
    }
    // What a machine does when it ends; the harness of the tests would do more.
    io::stdout().flush().unwrap();
    std::process::exit(0);
}

/// A folder for one process.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cvmm-sandbox-{name}-{}", std::process::id()));
        fs::create_dir_all(path.join("there")).unwrap();
        for file in ["file", "there/file"] {
            fs::write(path.join(file), [0; 4096]).unwrap();
        }
        drop(UnixListener::bind(path.join("there/socket")).unwrap());
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn start(words: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env("CVMM_SANDBOX_CHILD", words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(child.stdout.take().unwrap());
    (child, said)
}

/// The last word of the process, and its end.
fn run(thread: &str, powers: &str, mode: &str, name: &str) -> (String, ExitStatus) {
    let place = Place::new(&format!("{thread}-{mode}-{name}").replace(' ', "-"));
    if name == "quote" {
        serve_quote(&place.0);
    }
    let (mut child, mut said) = start(&format!("{thread} {powers} {mode} {} {name}", place.0.display()));
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(
        text.contains("confined"),
        "{thread} {name}: {status}\n{text}{errors}"
    );
    let last = text.lines().find_map(|line| line.strip_prefix("answer "));
    (last.unwrap_or("killed").to_owned(), status)
}

/// Asserts what becomes of each call on a thread with these powers.
fn check(thread: &str, powers: &str, cases: &[(&str, &str)]) {
    for &(name, expected) in cases {
        let (answer, status) = run(thread, powers, "on", name);
        assert_eq!(
            answer, expected,
            "{thread} with {powers}: {name} ended with {status}"
        );
        if expected == "killed" {
            assert_eq!(status.signal(), Some(SIGSYS), "{thread}: {name}");
            let (free, status) = run(thread, powers, "off", name);
            assert_eq!(
                (free.as_str(), status.code()),
                ("good", Some(0)),
                "{thread}: {name} without sandbox"
            );
        } else {
            assert_eq!(status.code(), Some(0), "{thread}: {name}");
        }
    }
}

/// Dies on every thread.
const NEVER: [(&str, &str); 6] = [
    ("code", "killed"),
    ("process", "killed"),
    ("signal", "killed"),
    ("internet", "killed"),
    ("create", "killed"),
    ("parent", "killed"),
];

#[test]
fn the_main_thread_builds_machines_and_nothing_else() {
    check("main", "none", &NEVER);
    check(
        "main",
        "none",
        &[
            ("memory", "good"),
            ("thread", "good"),
            ("unix", "good"),
            ("eventfd", "good"),
            ("remove", "good"),
            ("remove elsewhere", "PermissionDenied"),
            ("open", "killed"),
        ],
    );
    if Host::open(Path::new("/dev/kvm")).is_ok() {
        check("main", "none", &[("vm", "good")]);
    } else {
        println!("SKIPPED: no /dev/kvm here");
    }
}

#[test]
fn the_event_thread_has_sockets_only_for_vsock() {
    check("events", "none", &NEVER);
    check(
        "events",
        "none",
        &[
            ("memory", "good"),
            ("heap", "good"),
            ("sync", "good"),
            ("eventfd", "good"),
            ("unix", "killed"),
            ("thread", "killed"),
            ("open", "killed"),
            ("remove", "killed"),
            ("ring", "killed"),
        ],
    );
    check("events", "vsock", &[("unix", "good"), ("internet", "killed")]);
}

#[test]
fn a_vcpu_thread_reads_files_only_for_certificates() {
    check("vcpu", "none", &NEVER);
    check(
        "vcpu",
        "none",
        &[
            ("memory", "good"),
            ("heap", "good"),
            ("eventfd", "good"),
            ("unix", "killed"),
            ("thread", "killed"),
            ("open", "killed"),
            ("sync", "killed"),
            ("ring", "killed"),
        ],
    );
    check(
        "vcpu",
        "certs",
        &[
            ("open", "good"),
            ("open elsewhere", "PermissionDenied"),
            ("create", "killed"),
        ],
    );
    if Host::open(Path::new("/dev/kvm")).is_ok() {
        check("vcpu", "none", &[("vm", "killed")]);
    } else {
        println!("SKIPPED: no /dev/kvm here");
    }
}

#[test]
fn the_thread_for_quotes_talks_to_the_quote_service() {
    check("quotes", "quotes", &NEVER);
    check(
        "quotes",
        "quotes",
        &[
            ("memory", "good"),
            ("heap", "good"),
            ("unix", "good"),
            ("quote", "good"),
            ("thread", "killed"),
            ("open", "killed"),
            ("sync", "killed"),
        ],
    );
}

#[test]
fn a_disk_thread_does_io_on_its_disk() {
    check("disk", "none", &NEVER);
    check(
        "disk",
        "none",
        &[
            ("memory", "good"),
            ("heap", "good"),
            ("sync", "good"),
            ("eventfd", "killed"),
            ("unix", "killed"),
            ("thread", "killed"),
            ("open", "killed"),
            ("ring", "killed"),
        ],
    );
}

/// `/proc/PID/task/*/status` of the thread that waits, as fields.
fn status(
    child: &Child,
    mut said: BufReader<ChildStdout>,
) -> (BTreeMap<String, String>, BufReader<ChildStdout>) {
    let mut line = String::new();
    while !line.contains("confined") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "the process ended early");
    }
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let confined = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    // The harness's own thread is not confined; only the newest is.
    let text = confined.last().unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    (
        fields
            .map(|(name, value)| (name.into(), value.trim().into()))
            .collect(),
        said,
    )
}

fn release(mut child: Child) {
    child.stdin.take().unwrap().write_all(b".").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn capabilities_and_new_privileges_are_gone() {
    let place = Place::new("caps");
    let (child, said) = start(&format!("vcpu none on {} wait", place.0.display()));
    let (status, _said) = status(&child, said);
    let none = "0".repeat(16);
    let root = rustix::process::geteuid().is_root();
    let sets = ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"];
    // Without CAP_SETPCAP the bounding set stays, and is worth nothing.
    for set in &sets[..if root { 5 } else { 4 }] {
        assert_eq!(status[*set], none, "{set}");
    }
    assert_eq!(
        (status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()),
        ("1", "2")
    );
    release(child);
}

#[test]
fn a_jailed_process_is_nobody_in_an_empty_root() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can become somebody else");
        return;
    }
    let place = Place::new("jail");
    let (child, said) = start(&format!("main none jail {} wait", place.0.display()));
    let (status, _said) = status(&child, said);
    assert_eq!(status["Uid"], ["12345"; 4].join("\t"));
    assert_eq!(status["Gid"], ["54321"; 4].join("\t"));
    assert_eq!(status["Groups"], "");
    assert_eq!(status["CapBnd"], "0".repeat(16));
    let tid = &status["Pid"];
    let root = PathBuf::from(format!("/proc/{}/task/{tid}/root", child.id()));
    let mut at = root.clone();
    for part in place.0.join("there").components().skip(1) {
        let entries: Vec<_> = fs::read_dir(&at)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(entries, [part.as_os_str()], "{}", at.display());
        at.push(part);
    }
    assert!(at.join("file").exists(), "what is needed is there");
    for space in ["mnt", "ipc", "uts", "net"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{space}")).unwrap();
        assert_ne!(of(&format!("{}/task/{tid}", child.id())), of("self"), "{space}");
    }
    release(child);
}
