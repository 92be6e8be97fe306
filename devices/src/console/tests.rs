use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::termios::{LocalModes, tcgetattr};

use super::open::Link;
use super::stream::Stream;
use super::terminal::RawMode;
use super::*;

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cvmm-console-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn ready(console: &Console, ms: i64) -> bool {
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: ms.saturating_mul(1_000_000),
    };
    let fd = console.descriptor();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap() != 0
}

/// Serves until there is nothing to do; fails if that never comes.
fn settle(console: &Console) -> Option<ConsoleRequest> {
    for _ in 0..10_000 {
        if !ready(console, 0) {
            return None;
        }
        if let Some(request) = console.service() {
            return Some(request);
        }
    }
    panic!("the descriptor stays readable although nothing happens");
}

fn socket(path: &Path) -> Console {
    Console::open(&ConsoleSpec::Socket(path.to_owned())).unwrap()
}

fn join(console: &Console, path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_nonblocking(true).unwrap();
    settle(console);
    client
}

/// What the client has to read now.
fn received(mut client: &UnixStream) -> Vec<u8> {
    let mut bytes = vec![];
    if let Err(error) = client.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
    bytes
}

fn taken(console: &Console) -> Vec<u8> {
    let mut line = console.clone();
    let (mut all, mut buf) = (vec![], [0; 100]);
    loop {
        settle(console);
        let count = line.receive(&mut buf);
        if count == 0 {
            return all;
        }
        all.extend(&buf[..count]);
    }
}

fn piped() -> (Console, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let link = Link {
        reader: Some(Stream::shared(reader.as_fd(), OFlags::RDONLY).unwrap()),
        ..Link::default()
    };
    (Console::over(link).unwrap(), writer)
}

#[test]
fn the_first_byte_is_seen_at_once() {
    let scratch = Scratch::new("first");
    let path = scratch.at("log");
    fs::write(&path, "old").unwrap();
    let console = Console::open(&ConsoleSpec::File(path.clone())).unwrap();
    console.put(b"!");
    assert_eq!(fs::read(&path).unwrap(), b"!");
}

#[test]
fn the_rest_of_a_line_is_one_write_and_never_waits_long() {
    let (host, user) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    user.set_nonblocking(true).unwrap();
    let link = Link {
        writer: Some(Stream::new(host.into())),
        ..Link::default()
    };
    let console = Console::over(link).unwrap();
    for byte in b"a line of text\r\n$ " {
        console.put(&[*byte]);
    }
    let until = Instant::now() + Duration::from_secs(5);
    let (mut text, mut writes) = (Vec::<u8>::new(), 0);
    while text.len() < 18 && Instant::now() < until {
        if ready(&console, 50) {
            console.service();
        }
        let mut buf = [0; 64];
        while let Ok(count) = user.recv(&mut buf) {
            text.extend(&buf[..count]);
            writes += 1;
        }
    }
    assert_eq!(text, b"a line of text\r\n$ ");
    assert!(writes <= 9, "{writes} writes for a line and a prompt");
    std::thread::sleep(Duration::from_millis(10));
    settle(&console);
    assert!(!ready(&console, 20), "no timer runs without output");
}

#[test]
fn pending_output_leaves_when_the_console_goes() {
    let scratch = Scratch::new("last");
    let path = scratch.at("log");
    let console = Console::open(&ConsoleSpec::File(path.clone())).unwrap();
    for byte in b"the end" {
        console.put(&[*byte]);
    }
    drop(console);
    assert_eq!(fs::read(&path).unwrap(), b"the end");
}

#[test]
fn a_late_client_gets_the_newest_output() {
    let scratch = Scratch::new("late");
    let console = socket(&scratch.at("s"));
    let sent: Vec<u8> = (0..=255_u8).cycle().take(100_000).collect();
    for part in sent.chunks(7) {
        console.put(part);
    }
    let client = join(&console, &scratch.at("s"));
    assert_eq!(received(&client), sent[sent.len() - 65536..]);
    assert_eq!(console.dropped(), 100_000 - 65536);
}

#[test]
fn a_client_that_does_not_read_costs_nothing_but_its_own_output() {
    let scratch = Scratch::new("slow");
    let console = socket(&scratch.at("s"));
    let client = join(&console, &scratch.at("s"));
    let start = Instant::now();
    for _ in 0..5000 {
        console.put(&[b'.'; 1023]);
        console.put(b"\n");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(console.dropped() > 4_000_000);
    assert!(!ready(&console, 0), "no spinning while blocked");
    console.put(b"newest");
    let mut all = vec![];
    for _ in 0..100 {
        all.extend(received(&client));
        settle(&console);
    }
    assert!(all.ends_with(b"newest"));
    assert_eq!(all.len() as u64 + console.dropped(), 5000 * 1024 + 6);
}

#[test]
fn the_next_client_waits_for_the_first_to_leave() {
    let scratch = Scratch::new("turns");
    let console = socket(&scratch.at("s"));
    let first = join(&console, &scratch.at("s"));
    let mut second = join(&console, &scratch.at("s"));
    console.put(b"one\n");
    second.write_all(b"mine").unwrap();
    settle(&console);
    assert_eq!((received(&first), received(&second)), (b"one\n".to_vec(), vec![]));
    assert_eq!(taken(&console), b"");
    drop(first);
    settle(&console);
    console.put(b"two\n");
    assert_eq!(received(&second), b"two\n");
    assert_eq!(taken(&console), b"mine");
}

#[test]
fn a_storm_of_clients_leaks_no_descriptors() {
    let scratch = Scratch::new("storm");
    let console = socket(&scratch.at("s"));
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    for _ in 0..500 {
        drop(join(&console, &scratch.at("s")));
        settle(&console);
    }
    // Other tests run beside this one.
    assert!(count() < before + 100);
}

#[test]
fn a_socket_path_is_taken_over_only_from_the_dead() {
    let scratch = Scratch::new("paths");
    let path = scratch.at("s");
    let live = socket(&path);
    let open = || Console::open(&ConsoleSpec::Socket(path.clone()));
    assert!(matches!(open(), Err(ConsoleError::InUse { .. })));
    drop(live);
    assert!(!path.exists(), "removed on the way out");

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(open().unwrap());

    fs::write(&path, "precious").unwrap();
    assert!(matches!(open(), Err(ConsoleError::NotSocket { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");

    let absent = scratch.at("absent/s");
    let error = Console::open(&ConsoleSpec::Socket(absent)).unwrap_err();
    assert!(matches!(error, ConsoleError::Socket { .. }));
    let long = scratch.at(&"l".repeat(200));
    let error = Console::open(&ConsoleSpec::Socket(long)).unwrap_err();
    assert!(matches!(error, ConsoleError::Socket { .. }));
    let error = Console::open(&ConsoleSpec::File(scratch.at("absent/log"))).unwrap_err();
    assert!(matches!(error, ConsoleError::File { .. }));
}

#[test]
fn a_sender_is_held_back_and_loses_nothing() {
    let (console, mut writer) = piped();
    let sent: Vec<u8> = (0..=250_u8).cycle().take(60_000).collect();
    writer.write_all(&sent).unwrap();
    settle(&console);
    assert!(!ready(&console, 0), "waits for the guest");
    let waiting = rustix::io::ioctl_fionread(&writer).unwrap();
    assert_eq!(60_000 - waiting, 16 << 10, "what the console took");
    drop(writer);
    assert_eq!(taken(&console), sent);
    assert!(!ready(&console, 0), "no spinning at the end of input");
}

#[test]
fn a_file_as_input_is_read_to_its_end() {
    let scratch = Scratch::new("input");
    let path = scratch.at("typed");
    let sent: Vec<u8> = (0..=250_u8).cycle().take(50_000).collect();
    fs::write(&path, &sent).unwrap();
    let file = fs::File::open(&path).unwrap();
    let link = Link {
        reader: Some(Stream::shared(file.as_fd(), OFlags::RDONLY).unwrap()),
        ..Link::default()
    };
    let console = Console::over(link).unwrap();
    assert_eq!(taken(&console), sent);
    assert!(!ready(&console, 0));
}

#[test]
fn input_goes_to_the_port_while_its_driver_is_up() {
    let (console, mut writer) = piped();
    let mut line = console.clone();
    let mut buf = [0; 8];
    writer.write_all(b"abc").unwrap();
    settle(&console);
    assert_eq!(line.receive(&mut buf[..1]), 1);
    assert_eq!(console.input_ready().clear(), 0);
    console.attach_port(true);
    assert_eq!(console.input_ready().clear(), 1, "what waited is announced");
    assert_eq!(line.receive(&mut buf), 0);
    assert_eq!(console.take_for_port(&mut buf[..1]), 1);
    writer.write_all(b"d").unwrap();
    settle(&console);
    assert_eq!(console.input_ready().clear(), 1);
    console.attach_port(false);
    assert_eq!(line.receive(&mut buf), 2);
    assert_eq!(&buf[..2], b"cd");
}

#[test]
fn a_pseudo_terminal_carries_bytes_unchanged_and_survives_its_users() {
    let console = Console::open(&ConsoleSpec::Pty).unwrap();
    for _ in 0..2 {
        let path = console.terminal_path().unwrap();
        let mut user = fs::File::options().read(true).write(true).open(path).unwrap();
        console.put(b"\x01\x03out\r\n");
        let mut buf = [0; 7];
        user.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"\x01\x03out\r\n");
        user.write_all(b"\x01x\x03\n").unwrap();
        assert!(ready(&console, 500));
        assert_eq!(taken(&console), b"\x01x\x03\n");
        drop(user);
        assert!(!ready(&console, 0), "no spinning on hang-up");
    }
}

#[test]
fn a_terminal_is_raw_for_a_while_and_ctrl_a_x_quits() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let user = openpt(flags).unwrap();
    unlockpt(&user).unwrap();
    let terminal = ioctl_tiocgptpeer(&user, flags).unwrap();
    let cooked = || {
        tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    };
    let link = || Link {
        reader: Some(Stream::shared(terminal.as_fd(), OFlags::RDONLY).unwrap()),
        writer: Some(Stream::shared(terminal.as_fd(), OFlags::WRONLY).unwrap()),
        raw: Some(RawMode::enter(terminal.as_fd()).unwrap()),
        ..Link::default()
    };
    assert!(cooked());
    let console = Console::over(link()).unwrap();
    assert!(!cooked());
    rustix::io::write(&user, b"a\x01b\x03\x01x").unwrap();
    assert!(ready(&console, 500));
    assert_eq!(settle(&console), Some(ConsoleRequest::Quit));
    assert_eq!(taken(&console), b"a\x01b\x03");

    // A guest that takes nothing cannot lock the user out.
    for _ in 0..30 {
        rustix::io::write(&user, &[b'p'; 1000]).unwrap();
        assert!(ready(&console, 500));
        settle(&console);
    }
    rustix::io::write(&user, b"\x01x").unwrap();
    assert!(ready(&console, 500));
    assert_eq!(settle(&console), Some(ConsoleRequest::Quit));
    drop(console);
    assert!(cooked());

    let console = Console::over(link()).unwrap();
    assert!(!cooked());
    restore_terminal();
    assert!(cooked());
    drop(console);
    assert!(cooked());
}

/// A guest can fill the file system that its console's file is on; then its words are lost, and nothing else.
#[test]
fn a_full_disk_costs_the_guest_its_output() {
    let console = Console::open(&ConsoleSpec::File("/dev/full".into())).unwrap();
    for round in 1..100 {
        console.put(&[b'x'; 4096]);
        assert_eq!(console.dropped(), round * 4096);
        assert_eq!(settle(&console), None);
    }
    assert!(!ready(&console, 20));
}

#[test]
fn nothing_is_kept_where_nobody_listens() {
    let console = Console::open(&ConsoleSpec::Null).unwrap();
    console.put(&[b'x'; 100_000]);
    assert_eq!(console.dropped(), 0);
    assert!(!ready(&console, 20));
}

#[test]
fn lost_output_is_told_of_once_per_second() {
    assert_eq!(state::GATE.lines_in_a_second(), 1);
}
