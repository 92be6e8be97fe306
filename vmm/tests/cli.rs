//! The program as a shell or an orchestrator meets it: exit codes, one-line messages, JSON.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod kernel;

use std::fs::{self, File};
use std::io::{Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn cvmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvmm"));
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("NOTIFY_SOCKET");
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    told(cvmm(args).output().unwrap())
}

fn told(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn directory(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("cvmm-cli-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A file that passes for a kernel: no test here boots it.
fn kernel(dir: &std::path::Path) -> String {
    let path = dir.join("kernel");
    fs::write(&path, kernel::stand_in()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn mistakes_end_with_code_2_and_say_what_to_do() {
    let cases: [(&[&str], &str); 16] = [
        (&["run"], "cvmm: no kernel given; add --kernel PATH"),
        (
            &["run", "--kernel", "/nonexistent"],
            "cvmm: kernel /nonexistent: not found; check the path",
        ),
        (
            &["run", "--kernel", "/dev/null", "--memory", "0"],
            "cvmm: memory: 0 bytes are less than 64M",
        ),
        (
            &["run", "--memory", "1Q"],
            "write bytes or a suffix, for example 512M or 4G",
        ),
        (
            &["run", "--config", "/nonexistent"],
            "cvmm: config /nonexistent: ",
        ),
        (
            &["run", "--ready-fd", "77"],
            "cvmm: ready-fd 77: not an open descriptor",
        ),
        (
            &["run", "--events", "/nonexistent/e"],
            "cvmm: events /nonexistent/e: ",
        ),
        (&["run", "--frobnicate"], "unexpected argument '--frobnicate'"),
        (
            &["run", "--platform", "sgx"],
            "possible values: auto, soft, snp, tdx",
        ),
        (&["id-block"], "were not provided: --id-key <PATH>; see --help"),
        (
            &["run", "--disk", "d,bandwidth=1M,bandwidth=2M"],
            "bandwidth is given twice",
        ),
        (&["run", "--disk", "d,ro,ro"], "ro is given twice"),
        (&["run", "--net", "tap=a,tap=b"], "tap is given twice"),
        (&["run", "--policy", "x"], "not a hexadecimal number"),
        (
            &["measure", "--table", "257"],
            "cvmm: invalid value '257' for '--table <N>': 257 is not in 1..=256; see --help",
        ),
        (&["measure", "--table", "0"], "0 is not in 1..=256"),
    ];
    for (args, says) in cases {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
        assert!(err.starts_with("cvmm: "), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
}

/// One wrong word must not cost anybody a disk.
#[test]
fn what_cvmm_writes_never_goes_over_what_it_reads() {
    let dir = directory("over");
    let kernel = kernel(&dir);
    let (disk, link, new) = (dir.join("disk"), dir.join("link"), dir.join("new"));
    fs::write(&disk, vec![7; 1024]).unwrap();
    fs::hard_link(&disk, &link).unwrap();
    let (disk, link, new) = (
        disk.to_str().unwrap(),
        link.to_str().unwrap(),
        new.to_str().unwrap(),
    );
    let cases: [(&[&str], &str); 5] = [
        (&["--disk", disk, "--console", &format!("file={disk}")], "--disk"),
        (&["--disk", disk, "--console", &format!("file={link}")], "--disk"),
        (&["--disk", link, "--events", disk], "--disk"),
        (&["--initrd", disk, "--events", disk], "--initrd"),
        (
            &["--console", &format!("file={new}"), "--events", new],
            "--events",
        ),
    ];
    for (args, other) in cases {
        let start = ["run", "--platform", "soft", "--kernel", &kernel];
        let (code, _, err) = run(&[&start[..], args].concat());
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(&format!("the same file as {other}")), "{err}");
        assert_eq!(fs::read(disk).unwrap(), [7; 1024]);
        assert!(!fs::exists(new).unwrap());
    }
    let shared = [
        "run",
        "--kernel",
        "/nonexistent",
        "--console",
        "file=/dev/null",
        "--events",
        "/dev/null",
    ];
    assert!(run(&shared).2.contains("kernel /nonexistent: not found"));
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_configuration_comes_from_a_file_or_an_open_pipe_and_nobody_waits_for_a_fifo() {
    let dir = directory("config");
    let fifo = dir.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let fifo = fifo.to_str().unwrap();
    let cvmm = env!("CARGO_BIN_EXE_cvmm");
    let patient = Command::new("timeout")
        .args(["10", cvmm, "run", "--config", fifo, "--print-config"])
        .output();
    let refused = format!("cvmm: config {fifo}: is a FIFO; give a file, or /dev/stdin\n");
    assert_eq!(told(patient.unwrap()), (2, String::new(), refused));
    // Its writer takes its time.
    let script =
        format!("(sleep 0.1; echo '{{\"cpus\": 3}}') | {cvmm} run --config /dev/stdin --print-config");
    let (code, json, err) = told(Command::new("sh").args(["-c", &script]).output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(json.contains("\"cpus\": 3"), "{json}");
    fs::remove_dir_all(dir).unwrap();
}

/// The host has not failed at anything.
#[test]
fn a_path_that_json_cannot_hold_is_the_users_to_change() {
    let odd = std::ffi::OsStr::from_bytes(b"/boot/\xff");
    let mut command = cvmm(&["run", "--print-config", "--kernel"]);
    let (code, out, err) = told(command.arg(odd).output().unwrap());
    assert_eq!((code, out.as_str()), (2, ""));
    assert_eq!(
        err,
        "cvmm: print-config: path contains invalid UTF-8 characters, which JSON cannot hold; rename the file\n"
    );
}

#[test]
fn what_print_config_prints_means_the_same_again() {
    let dir = directory("print");
    let path = dir.join("guest.json");
    let flags = [
        "run",
        "--kernel",
        "k",
        "--memory",
        "1G",
        "--disk",
        "d,ro",
        "--net",
        "tap=t",
        "--print-config",
    ];
    let (code, json, err) = run(&flags);
    assert_eq!((code, err.as_str()), (0, ""));
    fs::write(&path, &json).unwrap();
    let file = path.to_str().unwrap();
    assert_eq!(
        run(&["run", "--config", file, "--print-config"]),
        (0, json, String::new())
    );
    let (_, json, _) = run(&["run", "--config", file, "--memory", "2G", "--print-config"]);
    let value: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&value["memory"], &value["cpus"]), (&"2G".into(), &1.into()));
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn help_shows_examples_and_every_exit_code() {
    let (code, help, _) = run(&["run", "--help"]);
    assert_eq!(code, 0);
    assert!(help.contains("cvmm run --platform soft --kernel"));
    assert!(help.contains(&vmm::ending::exit_code_table()));
    assert_eq!(
        run(&["--version"]).1,
        format!("cvmm {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn doctor_agrees_with_itself_in_text_json_and_exit_code() {
    let (code, json, _) = run(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["schema"], 1);
    let usable = |name: &str| report["usable"][name].as_bool().unwrap();
    let any = ["soft", "snp", "tdx"].into_iter().any(usable);
    assert_eq!(code, if any { 0 } else { 20 });
    for name in ["soft", "snp", "tdx"] {
        let expected = if usable(name) { 0 } else { 20 };
        assert_eq!(run(&["doctor", "--for", name]).0, expected, "{name}");
    }
    for check in report["checks"].as_array().unwrap() {
        let bad = check["status"] != "ok";
        assert_eq!(check["remedy"].is_string(), bad, "{check}");
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
    }
    let (_, text, _) = run(&["doctor"]);
    assert!(text.contains("kvm.module") && text.contains("A stock guest can run here:"));
}

#[test]
fn a_failure_is_told_as_events_too() {
    let dir = directory("events");
    let log = dir.join("events");
    let sink = log.to_str().unwrap();
    let (code, _, err) = run(&["run", "--kernel", "/nonexistent", "--events", sink]);
    assert_eq!(code, 2);
    let text = fs::read_to_string(&log).unwrap();
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(events.len(), 2, "{text}");
    let message = format!("cvmm: {}\n", events[0]["message"].as_str().unwrap());
    assert_eq!(
        (&events[0]["event"], &events[0]["code"], message),
        (&"error".into(), &2.into(), err)
    );
    assert_eq!(
        (&events[1]["event"], &events[1]["code"]),
        (&"stopped".into(), &2.into())
    );
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn an_inherited_descriptor_gets_the_events() {
    let (mut reader, writer) = pipe().unwrap();
    let mut command = cvmm(&["run", "--kernel", "/nonexistent", "--events", "fd:1"]);
    command.stdout(OwnedFd::from(writer)).stderr(Stdio::null());
    assert_eq!(command.status().unwrap().code(), Some(2));
    drop(command);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(
        text.lines()
            .all(|line| serde_json::from_str::<Value>(line).is_ok())
    );
}

#[test]
fn a_locked_disk_ends_with_code_21_and_a_host_without_kvm_with_20() {
    let dir = directory("codes");
    let kernel = kernel(&dir);
    let image = dir.join("image");
    let file = File::create(&image).unwrap();
    file.set_len(4096).unwrap();
    file.lock().unwrap();
    let disk = image.to_str().unwrap();
    let args = [
        "run",
        "--platform",
        "soft",
        "--console",
        "none",
        "--kernel",
        &kernel,
        "--disk",
        disk,
    ];
    let (code, _, err) = run(&args);
    assert_eq!(code, 21, "{err}");
    drop(file);

    // Nobody may open /dev/kvm as this user; where the test is not root it may not change users.
    let mut command = cvmm(&args[..args.len() - 2]);
    let own = fs::metadata("/proc/self")
        .map(|m| std::os::unix::fs::MetadataExt::uid(&m))
        .unwrap();
    let missing = !std::path::Path::new("/dev/kvm").exists();
    if own == 0 {
        command.uid(65534).gid(65534);
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    if own == 0 || missing {
        let output = command.output();
        match output {
            Ok(output) => {
                let (code, _, err) = told(output);
                assert_eq!(code, 20, "{err}");
                assert!(err.starts_with("cvmm: /dev/kvm: ") && err.contains("; "), "{err}");
            }
            // The build directory may be closed to other users.
            Err(e) => println!("skipped: cannot run cvmm as another user: {e}"),
        }
    } else {
        println!("skipped: only root can take /dev/kvm away from cvmm");
    }
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn what_cannot_be_printed_is_an_error() {
    let dir = directory("full");
    let kernel = kernel(&dir);
    for args in [
        ["doctor"].as_slice(),
        &["doctor", "--json"],
        &["run", "--kernel", &kernel, "--print-config"],
        &["measure", "--kernel", &kernel],
    ] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (code, _, text) = told(cvmm(args).stdout(full).output().unwrap());
        assert_eq!(code, 30, "{args:?}: {text}");
        assert!(
            text.starts_with("cvmm: ") && text.contains("No space left"),
            "{args:?}: {text}"
        );
    }
    fs::remove_dir_all(dir).unwrap();
}
