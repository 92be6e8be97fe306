use super::*;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::time::Instant;

fn to_pipe() -> (io::PipeReader, Events) {
    let (reader, writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let file = File::from(OwnedFd::from(writer));
    (reader, Events::new(Some(Target::File(file)), None))
}

fn line(reader: &mut impl BufRead) -> serde_json::Value {
    let mut text = String::new();
    reader.read_line(&mut text).unwrap();
    parse(&text)
}

fn parse(text: &str) -> serde_json::Value {
    let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
    let time = value.as_object_mut().unwrap().remove("time_ns").unwrap();
    assert!(time.as_u64().unwrap() > 1_700_000_000_000_000_000);
    value
}

#[test]
fn events_are_lines_of_the_documented_shape() {
    let (reader, events) = to_pipe();
    let mut reader = BufReader::new(reader);
    let measured = Event::Measured {
        digest: "ab".into(),
        protected: false,
    };
    let cases = [
        (
            Event::Started {
                pid: 7,
                platform: "soft",
                console: None,
            },
            r#"{"event": "started", "pid": 7, "platform": "soft"}"#,
        ),
        (
            measured,
            r#"{"event": "measured", "digest": "ab", "protected": false}"#,
        ),
        (
            Event::Running {
                vcpu_threads: vec![8, 9],
            },
            r#"{"event": "running", "vcpu_threads": [8, 9]}"#,
        ),
        (Event::GuestOff, r#"{"event": "guest_off"}"#),
        (Event::GuestReboot, r#"{"event": "guest_reboot"}"#),
        (
            Event::DeviceBroken {
                device: "virtio-blk 0".into(),
                reason: "loop".into(),
            },
            r#"{"event": "device_broken", "device": "virtio-blk 0", "reason": "loop"}"#,
        ),
        (
            Event::GuestTerminated {
                reason: "x\ny".into(),
            },
            r#"{"event": "guest_terminated", "reason": "x\ny"}"#,
        ),
        (
            Event::Stopping { signal: 15 },
            r#"{"event": "stopping", "signal": 15}"#,
        ),
        (
            Event::Error {
                message: "m".into(),
                code: 20,
            },
            r#"{"event": "error", "message": "m", "code": 20}"#,
        ),
        (Event::Stopped { code: 0 }, r#"{"event": "stopped", "code": 0}"#),
    ];
    for (event, json) in cases {
        events.clone().emit(&event);
        let expected: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(line(&mut reader), expected);
    }
}

#[test]
fn a_full_disk_is_a_slow_reader_and_no_lost_one() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let events = Events::new(Some(Target::File(full)), None);
    events.emit(&Event::GuestReboot);
    let (reader, writer) = io::pipe().unwrap();
    let mut sink = events.0.sink.lock().unwrap();
    assert!(sink.to.is_some(), "given up");
    sink.to = Some(Target::File(File::from(OwnedFd::from(writer))));
    drop(sink);
    events.emit(&Event::GuestOff);
    let mut reader = BufReader::new(reader);
    assert_eq!(line(&mut reader)["event"], "guest_reboot");
    assert_eq!(line(&mut reader)["event"], "guest_off");
}

#[test]
fn a_slow_reader_never_blocks_the_machine_and_learns_what_it_missed() {
    let (reader, events) = to_pipe();
    let start = Instant::now();
    for _ in 0..10_000 {
        events.emit(&Event::GuestReboot);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let in_pipe = rustix::io::ioctl_fionread(&reader).unwrap();
    let mut reader = BufReader::new(reader);
    let (mut kept, mut bytes) = (0_u64, 0_u64);
    let mut text = String::new();
    // What the pipe and the buffer held comes out whole, line by line.
    let missed = loop {
        if kept % 100 == 0 {
            events.emit(&Event::GuestOff);
        }
        text.clear();
        reader.read_line(&mut text).unwrap();
        if let Some(dropped) = parse(&text).get("dropped") {
            break dropped.as_u64().unwrap();
        }
        kept += 1;
        bytes += text.len() as u64;
    };
    assert!(missed >= 10_000 - kept, "{missed} and {kept}");
    let held = bytes - in_pipe;
    let room = (64 << 10) - text.len() as u64;
    assert!((room..=64 << 10).contains(&held), "{held} bytes were kept");
}

#[test]
fn a_reader_that_has_gone_is_tolerated() {
    let (reader, events) = to_pipe();
    drop(reader);
    events.emit(&Event::GuestOff);
    events.emit(&Event::GuestOff);
    assert!(
        events.0.sink.lock().unwrap().to.is_none(),
        "nobody is left to wait for"
    );
    events.finish();
}

#[test]
fn files_fifos_and_sockets_are_opened() {
    let dir = env::temp_dir().join(format!("cvmm-events-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let open = |name: &str| {
        let sink = Some(EventSink::Path(dir.join(name)));
        Events::open(&Notify {
            events: sink,
            ..Notify::default()
        })
    };
    open("file").unwrap().emit(&Event::GuestOff);
    open("file").unwrap().emit(&Event::GuestReboot);
    let text = std::fs::read_to_string(dir.join("file")).unwrap();
    assert_eq!(text.lines().count(), 2);

    let fifo = dir.join("fifo");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .unwrap();
    let events = open("fifo").unwrap();
    events.emit(&Event::GuestOff);
    let mut reader = BufReader::new(File::open(&fifo).unwrap());
    assert_eq!(line(&mut reader)["event"], "guest_off");

    let listener = UnixListener::bind(dir.join("socket")).unwrap();
    let events = open("socket").unwrap();
    events.emit(&Event::GuestOff);
    let mut reader = BufReader::new(listener.accept().unwrap().0);
    assert_eq!(line(&mut reader)["event"], "guest_off");

    let error = open("none/file").unwrap_err().to_string();
    assert!(
        error.ends_with("give a file, a FIFO or a Unix socket that somebody listens on"),
        "{error}"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn ready_is_told_once() {
    let (mut reader, writer) = io::pipe().unwrap();
    let events = Events::new(None, Some(File::from(OwnedFd::from(writer))));
    events.ready();
    events.clone().ready();
    drop(events);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "READY=1\n");
}
