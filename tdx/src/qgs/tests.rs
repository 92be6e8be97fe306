use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use super::*;

/// Message of an answer with these parts; the lengths are right.
fn answer(major: u16, kind: u32, code: u32, ids: &[u8], quote: &[u8]) -> Vec<u8> {
    let size = 24 + ids.len() + quote.len();
    let mut message = (u32::from(major) | 0x1_0000).to_le_bytes().to_vec();
    for word in [kind, size as u32, code, ids.len() as u32, quote.len() as u32] {
        message.extend(word.to_le_bytes());
    }
    message.extend(ids);
    message.extend(quote);
    message
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_be_bytes()[..], message].concat()
}

#[test]
fn a_request_has_the_bytes_of_the_protocol() {
    let report: TdReport = std::array::from_fn(|n| n as u8);
    let message = request(&report);
    let expected = [
        [0, 0, 0x04, 0x18], // length: 1048, big-endian
        [1, 0, 1, 0],       // version 1.1
        [0, 0, 0, 0],       // GET_QUOTE_REQ
        [0x18, 0x04, 0, 0], // 1048 again
        [0, 0, 0, 0],       // no error
        [0, 4, 0, 0],       // 1024
        [0, 0, 0, 0],       // no ids
    ];
    assert_eq!(message[..28], expected.concat());
    assert_eq!(message[28..], report);
}

#[test]
fn only_a_whole_answer_holds_a_quote() {
    let quote = [0x51; 40];
    assert_eq!(parse_response(&answer(1, 1, 0, &[], &quote)), Ok(&quote[..]));
    assert_eq!(parse_response(&answer(1, 1, 0, &[9; 16], &quote)), Ok(&quote[..]));
    let whole = answer(1, 1, 0, &[9; 16], &quote);
    let with = |at: usize, value: u32| {
        let mut changed = whole.clone();
        changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
        changed
    };
    let header_only = &answer(1, 1, 0x1_2001, &[], &[])[..16];
    let cases = [
        ("nothing", vec![], BadAnswer::Short(0)),
        (
            "a piece of the header",
            whole[..15].to_vec(),
            BadAnswer::Short(15),
        ),
        ("the header", whole[..16].to_vec(), BadAnswer::Short(16)),
        (
            "a piece of the lengths",
            whole[..23].to_vec(),
            BadAnswer::Short(23),
        ),
        ("cut off", whole[..79].to_vec(), BadAnswer::Lengths),
        (
            "with more behind",
            [&whole[..], &[0]].concat(),
            BadAnswer::Lengths,
        ),
        ("version 2", answer(2, 1, 0, &[], &quote), BadAnswer::Version(2)),
        ("a request", with(4, 0), BadAnswer::Type(0)),
        ("a collateral", with(4, 3), BadAnswer::Type(3)),
        ("an error", header_only.to_vec(), BadAnswer::Refused(0x1_2001)),
        ("an error with a quote", with(12, 7), BadAnswer::Refused(7)),
        ("size too small", with(8, 79), BadAnswer::Lengths),
        ("size too large", with(8, u32::MAX), BadAnswer::Lengths),
        ("ids past the end", with(16, 57), BadAnswer::Lengths),
        ("endless ids", with(16, u32::MAX), BadAnswer::Lengths),
        ("quote past the end", with(20, 41), BadAnswer::Lengths),
        ("endless quote", with(20, u32::MAX), BadAnswer::Lengths),
        ("no quote", answer(1, 1, 0, &[9; 16], &[]), BadAnswer::Empty),
    ];
    for (what, bytes, error) in cases {
        assert_eq!(parse_response(&bytes), Err(error), "{what}");
    }
}

#[test]
fn only_lengths_that_an_answer_can_have_are_read() {
    let cases = [
        (15, false),
        (16, true),
        (128 << 10, true),
        ((128 << 10) + 1, false),
        (u32::MAX, false),
    ];
    for (bytes, ok) in cases {
        assert_eq!(answer_bytes(bytes.to_be_bytes()).is_ok(), ok, "{bytes}");
    }
}

/// A stand-in for one request: reads it, then does what the test says.
struct StandIn {
    path: PathBuf,
}

impl StandIn {
    fn new(name: &str, act: impl FnOnce(&mut UnixStream) + Send + 'static) -> Self {
        let path = std::env::temp_dir().join(format!("cvmm-qgs-{}-{name}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 28 + TD_REPORT_BYTES];
            stream.read_exact(&mut request).unwrap();
            act(&mut stream);
        });
        Self { path }
    }

    fn ask(&self, time: Duration) -> Result<Vec<u8>, QgsError> {
        let qgs = Qgs::new(Address::Unix(self.path.clone()));
        let until = Instant::now() + time;
        qgs.quote(&[7; TD_REPORT_BYTES], 8000, until, &Stop::new().unwrap())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn a_quote_arrives_in_pieces() {
    let message = framed(&answer(1, 1, 0, &[], &[0x51; 5000]));
    let service = StandIn::new("pieces", move |stream| {
        for piece in message.chunks(700) {
            stream.write_all(piece).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let quote = service.ask(Duration::from_secs(10)).unwrap();
    assert_eq!(quote, [0x51; 5000]);
}

#[test]
fn every_misbehaviour_ends_in_time_with_a_cause() {
    type Act = Box<dyn FnOnce(&mut UnixStream) + Send>;
    let says = |bytes: Vec<u8>| -> Act { Box::new(move |stream| stream.write_all(&bytes).unwrap()) };
    let silent = || -> Act { Box::new(|_| std::thread::sleep(Duration::from_secs(5))) };
    let slow: Act = Box::new(|stream| {
        // A byte at a time, for longer than the caller waits.
        for byte in framed(&answer(1, 1, 0, &[], &[1; 4000])) {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let half: Act = Box::new(|stream| {
        let message = framed(&answer(1, 1, 0, &[], &[1; 4000]));
        stream.write_all(&message[..1000]).unwrap();
        std::thread::sleep(Duration::from_secs(5));
    });
    let long = framed(&answer(1, 1, 0, &[], &[1; 8001]));
    let cut = framed(&answer(1, 1, 0, &[], &[1; 4000]))[..3000].to_vec();
    let cases: Vec<(&str, Act, &str, Status)> = vec![
        (
            "silent",
            silent(),
            "no whole answer in time; look at the QGS",
            Status::Unavailable,
        ),
        (
            "slow",
            slow,
            "no whole answer in time; look at the QGS",
            Status::Unavailable,
        ),
        (
            "half",
            half,
            "no whole answer in time; look at the QGS",
            Status::Unavailable,
        ),
        (
            "closes",
            Box::new(|_| ()),
            "the connection broke (unexpected end of file)",
            Status::Unavailable,
        ),
        (
            "cut off",
            says(cut),
            "the connection broke (unexpected end of file)",
            Status::Unavailable,
        ),
        (
            "announces too much",
            says(vec![0xff; 4]),
            "it announces an answer of 4294967295 bytes, which no quote has",
            Status::Error,
        ),
        (
            "text",
            says(b"HTTP/1.1 400 Bad Request\r\n".to_vec()),
            "it announces an answer of 1213486160 bytes, which no quote has",
            Status::Error,
        ),
        (
            "too long",
            says(long),
            "its quote has 8001 bytes, the guest's buffer takes 8000",
            Status::Error,
        ),
        (
            "error",
            says(framed(&answer(1, 1, 0x1_2003, &[], &[]))),
            "it refuses: invalid parameter (0x12003); its log says more",
            Status::Error,
        ),
        (
            "own error",
            says(framed(&answer(1, 1, 0x1100d, &[], &[]))),
            "it refuses: error 0x1100d; its log says more",
            Status::Error,
        ),
        (
            "wrong type",
            says(framed(&answer(1, 5, 0, &[], &[1; 4000]))),
            "its answer has type 5, a quote has type 1",
            Status::Error,
        ),
    ];
    for (what, act, words, status) in cases {
        let service = StandIn::new(&what.replace(' ', "-"), act);
        let start = Instant::now();
        // A service that answers may take its time on a busy machine.
        let late = words.starts_with("no whole answer");
        let time = Duration::from_millis(if late { 500 } else { 20_000 });
        let error = service.ask(time).unwrap_err();
        assert!(!late || start.elapsed() < Duration::from_secs(4), "{what}");
        assert_eq!(
            (error.to_string().as_str(), error.status()),
            (words, status),
            "{what}"
        );
    }
}

#[test]
fn a_service_that_is_not_there_is_named_at_once() {
    let full = std::env::temp_dir().join(format!("cvmm-qgs-{}-full", std::process::id()));
    let listener = UnixListener::bind(&full).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&full).unwrap();
    let long = PathBuf::from("x".repeat(200));
    let cases = [
        (Address::Unix("/nonexistent/qgs.socket".into()), "No such file"),
        (Address::Unix("/dev/null".into()), "Connection refused"),
        (Address::Unix(long), "File name too long"),
        (Address::Unix(full.clone()), "Connection timed out"),
    ];
    let stop = Stop::new().unwrap();
    for (address, cause) in cases {
        let until = Instant::now() + Duration::from_millis(300);
        let qgs = Qgs::new(address.clone());
        let error = qgs.quote(&[7; TD_REPORT_BYTES], 8000, until, &stop).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, QgsError::Absent(_)) && text.contains(cause),
            "{address}: {text}"
        );
    }
    std::fs::remove_file(full).unwrap();

    // No context id 0x7fffffff exists anywhere; a host without vsock says so.
    let nowhere = Qgs::new(Address::Vsock {
        cid: 0x7fff_ffff,
        port: 4050,
    });
    let until = Instant::now() + Duration::from_secs(5);
    let error = nowhere
        .quote(&[7; TD_REPORT_BYTES], 8000, until, &stop)
        .unwrap_err();
    assert!(matches!(error, QgsError::Absent(_)), "{error}");
}

#[test]
fn a_raised_stop_ends_every_wait() {
    let service = StandIn::new("stop", |_| std::thread::sleep(Duration::from_secs(5)));
    let stop = Arc::new(Stop::new().unwrap());
    let other = Arc::clone(&stop);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        other.raise();
    });
    let start = Instant::now();
    let until = start + Duration::from_secs(20);
    let qgs = Qgs::new(Address::Unix(service.path.clone()));
    for _ in 0..2 {
        let error = qgs.quote(&[7; TD_REPORT_BYTES], 8000, until, &stop).unwrap_err();
        assert!(matches!(error, QgsError::Stopped), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(3));
}

proptest::proptest! {
    #[test]
    fn no_answer_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = parse_response(&bytes);
        let _ = crate::get_quote::Header::parse(&bytes);
    }
}
