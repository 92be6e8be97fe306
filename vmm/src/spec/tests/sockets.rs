//! Sockets and the console.

use std::os::unix::net::UnixListener;
use std::path::Path;

use super::*;

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
