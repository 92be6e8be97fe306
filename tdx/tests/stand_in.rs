//! A TDREPORT's way to a quote and back, through the stand-in that the rig uses too.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ring::digest::{SHA384, digest};
use tdx::get_quote::Status;
use tdx::qgs::{Address, Qgs, QgsError, Stop, TdReport};
use tdx::quote::{self, Register};

/// `tests/qgs.py` on a socket of its own.
struct StandIn {
    child: Child,
    socket: PathBuf,
}

impl StandIn {
    fn new(how: &str) -> Self {
        let name = format!("cvmm-stand-in-{}-{}", std::process::id(), how.replace('=', "-"));
        let socket = std::env::temp_dir().join(name);
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/qgs.py");
        let mut child = Command::new("python3")
            .arg(program)
            .arg(&socket)
            .args(["--misbehave", how])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut says = BufReader::new(child.stdout.take().unwrap());
        says.read_line(&mut line).unwrap();
        assert_eq!(line, "listening\n");
        // It must not meet a closed pipe.
        std::thread::spawn(move || std::io::copy(&mut says, &mut std::io::sink()));
        Self { child, socket }
    }

    fn ask(&self, report: &TdReport, time: Duration) -> Result<Vec<u8>, QgsError> {
        let until = Instant::now() + time;
        let qgs = Qgs::new(Address::Unix(self.socket.clone()));
        qgs.quote(report, 8000, until, &Stop::new().unwrap())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A TDREPORT whose fields are all different, with the hashes that a module puts in.
fn report() -> TdReport {
    let mut report: TdReport = std::array::from_fn(|at| (at / 3) as u8);
    report[0] = 0x81;
    report[512..520].copy_from_slice(&0x1000_0000_u64.to_le_bytes());
    for (at, start, length) in [(32, 256, 239), (80, 512, 512)] {
        let hash = digest(&SHA384, &report[start..start + length]);
        report[at..at + 48].copy_from_slice(hash.as_ref());
    }
    report
}

#[test]
fn a_quote_states_what_the_report_stated() {
    let service = StandIn::new("");
    let report = report();
    let bytes = service.ask(&report, Duration::from_secs(20)).unwrap();
    let quote = quote::parse(&bytes).unwrap();
    assert_eq!(quote.check_signature(), Ok(()));
    assert_eq!(quote.version(), 4);
    assert_eq!(quote.report_data(), report[128..192]);
    assert_eq!(quote.tee_tcb_svn(), report[264..280]);
    assert_eq!(
        (quote.attributes().0, &quote.xfam().to_le_bytes()[..]),
        (0x1000_0000, &report[520..528])
    );
    let places = [
        (Register::MrSeam, 280),
        (Register::MrSignerSeam, 328),
        (Register::Mrtd, 528),
        (Register::MrConfigId, 576),
        (Register::MrOwner, 624),
        (Register::MrOwnerConfig, 672),
        (Register::Rtmr0, 720),
        (Register::Rtmr1, 768),
        (Register::Rtmr2, 816),
        (Register::Rtmr3, 864),
    ];
    for (register, at) in places {
        assert_eq!(quote.register(register).0, report[at..at + 48], "{register:?}");
    }
    // The service keeps serving, and refuses a report that was changed.
    let mut changed = report;
    changed[600] ^= 1;
    let error = service.ask(&changed, Duration::from_secs(20)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "it refuses: invalid parameter (0x12003); its log says more"
    );
}

#[test]
fn each_misbehaviour_of_the_stand_in_has_its_status() {
    let cases = [
        ("late=3", Status::Unavailable),
        ("silent", Status::Unavailable),
        ("close", Status::Unavailable),
        ("cut", Status::Unavailable),
        ("long", Status::Error),
        ("error", Status::Error),
        ("type", Status::Error),
        ("length", Status::Error),
    ];
    for (how, status) in cases {
        let service = StandIn::new(how);
        let slow = matches!(how, "late=3" | "silent");
        let time = Duration::from_millis(if slow { 500 } else { 20_000 });
        let start = Instant::now();
        let error = service.ask(&report(), time).unwrap_err();
        assert_eq!(error.status(), status, "{how}: {error}");
        assert!(start.elapsed() < Duration::from_secs(10), "{how}");
    }
}
