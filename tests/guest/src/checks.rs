//! The tests of an L2 guest, each asked for by name in `cvmm.run=` and answered by one `CVMM-TEST` line.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sha2::{Digest, Sha256};

use crate::bench;
use crate::cmdline::CommandLine;
use crate::endpoint;
use crate::init::{Then, end};
use crate::report;
use crate::transfer::{self, Pattern, hex};

const DISK: &str = "/dev/vda";
const MOUNTED_AT: &str = "/mnt";
const BLOCKS_PER_MIB: u32 = 16;
/// A peer in L1 may start after the guest: connecting is tried again for this long.
const PEER_PATIENCE: Duration = Duration::from_secs(60);
/// The kernel's log takes lines of less than 1 KiB.
const KMSG_BYTES: usize = 900;
const KEY_EVENT: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on 64 bit: two 8-byte times, type, code, value.
const INPUT_EVENT_BYTES: usize = 24;

/// Runs what `cvmm.run=` names, and gives what `cvmm.then=` wants.
pub(crate) fn run(wanted: &CommandLine) -> Then {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("CVMM-INIT up {} s", uptime.split(' ').next().unwrap_or("?"));
    for name in wanted.get("run").unwrap_or("TOUR").split(',') {
        let began = Instant::now();
        let outcome = match name {
            "TOUR" => tour(wanted),
            "smp" => fs::read_to_string("/sys/devices/system/cpu/online")
                .map(|list| format!("online {}", list.trim())),
            "hotplug" => hotplug(),
            "memory" => memory(),
            "touch" => touch(wanted),
            "disk" => disk(wanted),
            "net" => net(wanted),
            "vsock" => vsock(wanted),
            "vsock-listen" => vsock_listen(wanted),
            "rng" => rng(),
            "report" => attest(wanted),
            "registers" => registers(),
            "idle" => bench::idle(wanted),
            "bench-disk" => bench::disk(wanted),
            "bench-net" => bench_net(wanted),
            "soak" => soak(wanted),
            "wait" => wait_for_the_end(),
            "shell" => Ok(shell()),
            _ => Err(io::Error::other("no such test")),
        };
        let seconds = began.elapsed().as_secs_f64();
        match outcome {
            Ok(details) => tell(
                wanted,
                &format!("CVMM-TEST {name} PASS {details} ({seconds:.1} s)"),
            ),
            Err(error) => tell(wanted, &format!("CVMM-TEST {name} FAIL {error} ({seconds:.1} s)")),
        }
    }
    match wanted.get("then") {
        Some("shell") => {
            shell();
            Then::PowerOff
        }
        Some("reboot") => Then::Reboot,
        _ => Then::PowerOff,
    }
}

/// Prints a line, and with `cvmm.kmsg=1` puts it into the kernel's log: a console without interrupts shows only that.
fn tell(wanted: &CommandLine, line: &str) {
    println!("{line}");
    if wanted.get("kmsg").is_some() {
        for piece in line.as_bytes().chunks(KMSG_BYTES) {
            let _ = fs::write("/dev/kmsg", piece);
        }
    }
}

/// Powers off when a key or button says so, in the background.
pub(crate) fn watch_power_button() {
    let Ok(inputs) = fs::read_dir("/dev/input") else {
        return;
    };
    for input in inputs
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
    {
        std::thread::spawn(move || {
            let Ok(mut events) = File::open(input.path()) else {
                return;
            };
            let mut event = [0_u8; INPUT_EVENT_BYTES];
            while events.read_exact(&mut event).is_ok() {
                let [.., t0, t1, c0, c1, v0, v1, v2, v3] = event;
                let pressed = i32::from_le_bytes([v0, v1, v2, v3]) == 1;
                if u16::from_le_bytes([t0, t1]) == KEY_EVENT
                    && u16::from_le_bytes([c0, c1]) == KEY_POWER
                    && pressed
                {
                    println!("CVMM-POWER-BUTTON");
                    end(Then::PowerOff);
                }
            }
        });
    }
}

/// Unmounts what a test has mounted.
pub(crate) fn release_disks() {
    let _ = umount2(MOUNTED_AT, MntFlags::empty());
}

/// A short walk for a person: the kernel, the disks, a file, the network, vsock.
fn tour(wanted: &CommandLine) -> io::Result<String> {
    let show = |title: &str, words: &[&str]| {
        println!("--- {title}");
        busybox(words)
    };
    show("kernel", &["uname", "-a"])?;
    println!("--- disks");
    for entry in fs::read_dir("/sys/block")?
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with("loop"))
    {
        let sectors = fs::read_to_string(entry.path().join("size")).unwrap_or_default();
        println!(
            "{:<8} {} MiB",
            entry.file_name().to_string_lossy(),
            sectors.trim().parse::<u64>().unwrap_or(0) / 2048
        );
    }
    if Path::new(DISK).exists() {
        println!("--- a file on the disk");
        mount_disk()?;
        let path = Path::new(MOUNTED_AT).join("tour.txt");
        fs::write(&path, "written by the guest\n")?;
        File::open(&path)?.sync_all()?;
        println!("{}: {}", path.display(), fs::read_to_string(&path)?.trim());
        show("disk space", &["df", "-h", MOUNTED_AT])?;
    }
    if Path::new("/sys/class/net/eth0").exists() && wanted.get("ip").is_some() {
        network_up(wanted)?;
        let peer = wanted
            .get("peer")
            .and_then(|peer| peer.split(':').next())
            .unwrap_or_default();
        show("network", &["ping", "-c", "3", peer])?;
    }
    println!(
        "--- vsock: /dev/vsock is {}there",
        if Path::new("/dev/vsock").exists() {
            ""
        } else {
            "not "
        }
    );
    Ok("done".into())
}

/// Takes the second processor off and brings it back.
fn hotplug() -> io::Result<String> {
    const CPUS: &str = "/sys/devices/system/cpu";
    let online = || fs::read_to_string(format!("{CPUS}/online"));
    let mut seen = online()?.trim().to_owned();
    for state in ["0", "1"] {
        fs::write(format!("{CPUS}/cpu1/online"), state)?;
        seen = format!("{seen}, {}", online()?.trim());
    }
    Ok(format!("online {seen}"))
}

fn memory() -> io::Result<String> {
    let info = fs::read_to_string("/proc/meminfo")?;
    Ok(info
        .lines()
        .take(2)
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join(", "))
}

/// Writes to `cvmm.touch_mib` MiB of memory.
fn touch(wanted: &CommandLine) -> io::Result<String> {
    let mebibytes = wanted.or("touch_mib", 64_usize);
    let block = vec![1_u8; mebibytes << 20];
    let sum: usize = block.iter().step_by(4096).map(|byte| usize::from(*byte)).sum();
    Ok(format!("{mebibytes} MiB, {sum} pages"))
}

/// Writes `cvmm.disk_mib` MiB to a file, and reads them back from the device.
fn disk(wanted: &CommandLine) -> io::Result<String> {
    let blocks = wanted.or("disk_mib", 256_u32) * BLOCKS_PER_MIB;
    mount_disk()?;
    let path = Path::new(MOUNTED_AT).join("data");
    let mut pattern = Pattern::new();
    let mut hash = Sha256::new();
    let mut file = File::create(&path)?;
    for _ in 0..blocks {
        let block = pattern.next();
        hash.update(block);
        file.write_all(block)?;
    }
    file.sync_all()?;
    drop(file);
    let written = hex(&hash.finalize());
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut hash = Sha256::new();
    let mut file = File::open(&path)?;
    let mut block = vec![0; 64 << 10];
    for _ in 0..blocks {
        file.read_exact(&mut block)?;
        hash.update(&block);
    }
    let read = hex(&hash.finalize());
    if read != written {
        return Err(io::Error::other(format!("wrote sha256 {written}, read {read}")));
    }
    Ok(format!("{} MiB sha256 {written}", blocks / BLOCKS_PER_MIB))
}

fn mount_disk() -> io::Result<()> {
    fs::create_dir_all(MOUNTED_AT)?;
    match mount(
        Some(DISK),
        MOUNTED_AT,
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    ) {
        Ok(()) | Err(nix::errno::Errno::EBUSY) => Ok(()),
        Err(error) => Err(io::Error::other(format!("{DISK}: {}", error.desc()))),
    }
}

/// Gives eth0 the address `cvmm.ip=ADDRESS/BITS`.
fn network_up(wanted: &CommandLine) -> io::Result<()> {
    let address = wanted
        .get("ip")
        .ok_or_else(|| io::Error::other("no cvmm.ip= on the command line"))?;
    let _ = busybox(&["ip", "addr", "add", address, "dev", "eth0"]);
    busybox(&["ip", "link", "set", "eth0", "up"])
}

/// Transfers `cvmm.net_mib` MiB each way with the peer that serves at `cvmm.peer=ADDRESS:PORT`.
fn net(wanted: &CommandLine) -> io::Result<String> {
    network_up(wanted)?;
    let peer = wanted
        .get("peer")
        .ok_or_else(|| io::Error::other("no cvmm.peer= on the command line"))?;
    let mebibytes = wanted.or("net_mib", 100);
    transfer::start(patiently(&format!("tcp:{peer}"))?, mebibytes, mebibytes)
}

/// Times the network with the peer that runs `cvmm-guest bench-serve`.
fn bench_net(wanted: &CommandLine) -> io::Result<String> {
    network_up(wanted)?;
    let peer = wanted.get("peer").ok_or_else(|| io::Error::other("no cvmm.peer= on the command line"))?;
    bench::net(patiently(&format!("tcp:{peer}"))?, wanted)
}

/// Transfers `cvmm.vsock_mib` MiB each way with the host that serves vsock port `cvmm.vsock_port`.
fn vsock(wanted: &CommandLine) -> io::Result<String> {
    let port = wanted.or("vsock_port", 5000_u32);
    let mebibytes = wanted.or("vsock_mib", 100);
    transfer::start(patiently(&format!("vsock:2:{port}"))?, mebibytes, mebibytes)
}

/// Answers one transfer that the host starts to vsock port `cvmm.vsock_listen`.
fn vsock_listen(wanted: &CommandLine) -> io::Result<String> {
    let port = wanted.or("vsock_listen", 6000_u32);
    println!("CVMM-LISTENING {port}");
    // The address is that of any context id.
    transfer::answer(endpoint::accept(&format!("vsock:{}:{port}", u32::MAX))?)
}

fn patiently(endpoint: &str) -> io::Result<endpoint::Stream> {
    let began = Instant::now();
    loop {
        match endpoint::connect(endpoint) {
            Err(_) if began.elapsed() < PEER_PATIENCE => std::thread::sleep(Duration::from_millis(300)),
            Err(error) => return Err(io::Error::other(format!("{endpoint}: {error}"))),
            Ok(stream) => return Ok(stream),
        }
    }
}

fn rng() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    let source = fs::read_to_string("/sys/class/misc/hw_random/rng_current")?;
    Ok(format!("{} {}", source.trim(), hex(&bytes)))
}

/// Fetches a report over `cvmm.nonce=HEX`, or over the nonce that the host gives at vsock port `cvmm.report_port`.
fn attest(wanted: &CommandLine) -> io::Result<String> {
    let (provider, bytes) = match wanted.get("report_port") {
        Some(port) => report::hand_out(&format!("vsock:2:{port}"))?,
        None => report::fetch(&report::parse_hex(wanted.get("nonce").unwrap_or("00"))?)?,
    };
    tell(wanted, &format!("CVMM-REPORT {}", report::base64(&bytes)));
    let measurement = bytes
        .get(0x90..0xc0)
        .filter(|_| provider == "sev_guest")
        .map(hex)
        .unwrap_or_default();
    Ok(format!(
        "{provider} {} bytes measurement {measurement}",
        bytes.len()
    ))
}

/// The TD's measurement registers as the kernel shows them, before and after this program extends the last one.
fn registers() -> io::Result<String> {
    let before = report::registers()?;
    report::extend("rtmr3:sha384", &[0x5a; 48])?;
    let extended = report::registers()?
        .into_iter()
        .find(|(name, _)| name == "rtmr3:sha384")
        .map(|(_, value)| hex(&value))
        .unwrap_or_default();
    let shown: Vec<String> = before
        .iter()
        .map(|(name, value)| format!("{name}={}", hex(value)))
        .collect();
    Ok(format!("{} extended={extended}", shown.join(" ")))
}

/// All traffic at once for `cvmm.soak_seconds`: disk, network and vsock transfers, and on every processor attestation
/// reports where there are any, for which the kernel makes memory shared and private again each time.
fn soak(wanted: &CommandLine) -> io::Result<String> {
    let until = Instant::now() + Duration::from_secs(wanted.or("soak_seconds", 600));
    let reports = usize::from(fs::create_dir_all("/sys/kernel/config/tsm/report/probe").is_ok());
    let processors = std::thread::available_parallelism()?.get() * reports;
    let failed = AtomicBool::new(false);
    let (began, failed) = (Instant::now(), &failed);
    let repeat = |name: &str, work: &(dyn Fn() -> io::Result<()> + Sync)| {
        let mut rounds = 0_u32;
        while Instant::now() < until && !failed.load(Ordering::SeqCst) {
            work().map_err(|error| {
                failed.store(true, Ordering::SeqCst);
                let after = began.elapsed().as_secs();
                io::Error::other(format!("{name}, round {rounds}, after {after} s: {error}"))
            })?;
            rounds += 1;
        }
        io::Result::Ok(rounds)
    };
    std::thread::scope(|scope| {
        let disk = scope.spawn(|| repeat("disk", &|| disk(wanted).map(drop)));
        let net = scope.spawn(|| repeat("net", &|| net(wanted).map(drop)));
        let vsock = scope.spawn(|| repeat("vsock", &|| vsock(wanted).map(drop)));
        let reporters: Vec<_> = (0..processors)
            .map(|number| {
                let entry = format!("soak{number}");
                scope.spawn(move || repeat("report", &|| report::fetch_as(&entry, &[7]).map(drop)))
            })
            .collect();
        let total = |thread: std::thread::ScopedJoinHandle<'_, io::Result<u32>>| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        };
        let (disk, net, vsock) = (total(disk)?, total(net)?, total(vsock)?);
        let mut reports = 0;
        for reporter in reporters {
            reports += total(reporter)?;
        }
        Ok(format!("rounds: disk {disk}, net {net}, vsock {vsock}, reports {reports}"))
    })
}

/// Stays until the power button.
fn wait_for_the_end() -> io::Result<String> {
    println!("CVMM-WAITING");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// A shell on the console.
fn shell() -> String {
    println!("a shell in the guest; `exit` powers off");
    let status = Command::new("/bin/busybox")
        .args(["setsid", "-c", "/bin/busybox", "sh"])
        .status();
    format!("{status:?}")
}

fn busybox(words: &[&str]) -> io::Result<()> {
    let status = report::spawn(Command::new("/bin/busybox").args(words))?.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("`{}`: {status}", words.join(" "))))
    }
}
