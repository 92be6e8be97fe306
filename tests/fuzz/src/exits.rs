//! vCPU exits: conversions, faults on the wrong side, port and memory accesses, as KVM passes them on.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use arch::addr::{Gpa, PAGE_SIZE, PageRange};
use arch::exit::{Exit, PlatformExit, Reply};
use arch::kvm::vcpu::RunError;
use arch::mem::map::HostRam;
use arch::mem::{SharedMem, Visibility, VisibilityMap};
use arch::platform::{PlatformError, PlatformFlow, Sealed};
use devices::bus::Bus;
use devices::power::PowerPorts;
use devices::serial::{Serial, SerialLine};
use snp::exit::{CertAnswer, SnpExit};
use tdx::exit::{TdxExit, notify_vector};
use tdx::get_quote::QuoteService;
use vmm::ram::{Backing, GuestRam, ranges};
use vmm::vcpu::{Enter, Flow, Memory, Services, step};

use crate::input::Input;

/// RAM: a piece below 3 GiB and one page of the rest above 4 GiB would need 3 GiB, so only the first exists.
const RAM: u64 = 2 << 20;
const PAGES: u64 = RAM / PAGE_SIZE;
const STEPS: usize = 300;
/// Bytes of an exit's body that a program gives: all that is looked at.
const BODY: usize = 144;

/// One exit, with room for what is answered.
struct Script {
    kind: u8,
    number: [u64; 2],
    to: Visibility,
    reply: [u8; 8],
    bytes: Vec<u8>,
    body: Box<[u8; 256]>,
    populated: u64,
}

impl Enter for Script {
    fn enter(&mut self) -> Result<Exit<'_>, RunError> {
        let [first, second] = self.number;
        let gpa = Gpa(first);
        Ok(match self.kind % 10 {
            0..=2 => Exit::Convert {
                gpa: first,
                pages: second,
                to: self.to,
                reply: Reply(&mut self.reply),
            },
            3 | 4 => match PageRange::new(gpa, second) {
                Ok(range) => Exit::WrongSide {
                    range,
                    wants: self.to,
                },
                Err(_) => Exit::Interrupted,
            },
            5 => Exit::PioOut {
                port: first as u16,
                size: 1 << (second % 3),
                data: &self.bytes,
            },
            6 => Exit::PioIn {
                port: first as u16,
                size: 1 << (second % 3),
                data: &mut self.bytes,
            },
            7 => Exit::MmioRead {
                gpa,
                data: self.bytes.get_mut(..8).unwrap_or_default(),
            },
            8 => Exit::MmioWrite {
                gpa,
                data: self.bytes.get(..8).unwrap_or_default(),
            },
            _ => Exit::Platform(PlatformExit {
                vcpu: 0,
                reason: first as u32,
                body: &mut self.body,
            }),
        })
    }

    fn finish(&mut self) -> Result<Exit<'_>, RunError> {
        Ok(Exit::Interrupted)
    }

    fn populate(&mut self, range: PageRange) {
        self.populated += range.bytes() / PAGE_SIZE;
        assert!(range.end().0 <= RAM, "pages outside RAM are backed");
    }
}

/// What the host was told, as frames that are private.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<BTreeSet<u64>>>);

impl Backing for Told {
    fn set_attribute(&self, range: PageRange, to: Visibility) -> io::Result<()> {
        assert!(
            range.end().0 <= RAM,
            "the host is asked to convert what is no RAM"
        );
        let mut private = self.0.lock().unwrap();
        for frame in range.frames() {
            match to {
                Visibility::Private => private.insert(frame),
                Visibility::Shared => private.remove(&frame),
            };
        }
        Ok(())
    }

    fn discard(&self, range: PageRange, old: Visibility) -> io::Result<()> {
        let private = self.0.lock().unwrap();
        let left = range
            .frames()
            .all(|frame| private.contains(&frame) == (old == Visibility::Shared));
        assert!(left, "the side that the guest uses is discarded");
        Ok(())
    }
}

/// Decodes what guests of both technologies ask, and answers.
#[derive(Debug)]
struct Platform(QuoteService);

impl Sealed for Platform {
    fn handle_exit(&self, exit: PlatformExit<'_>) -> Result<PlatformFlow, PlatformError> {
        let is_fatal = exit.reason == 24 && exit.body.first() == Some(&7);
        if exit.reason != 40 && !is_fatal {
            return Ok(serve_snp(exit));
        }
        Ok(match TdxExit::decode(exit) {
            Some(TdxExit::Fatal(fatal)) => {
                let words = fatal.words(|code| (code == 7).then(|| "seven".into()));
                assert!(
                    !words.contains(|c: char| c.is_control() || !c.is_ascii()),
                    "{words:?}"
                );
                PlatformFlow::Terminated(words)
            }
            Some(TdxExit::GetQuote { gpa, bytes, call }) => {
                call.answer(self.0.request(gpa, bytes));
                PlatformFlow::Resume
            }
            Some(TdxExit::GetInfo { call, .. }) => {
                call.answer_info(1);
                PlatformFlow::Resume
            }
            Some(TdxExit::SetupNotify { vector, .. }) => {
                assert!(notify_vector(vector).is_none_or(|vector| vector >= 32));
                PlatformFlow::Resume
            }
            Some(TdxExit::Unknown { .. }) | None => PlatformFlow::Resume,
        })
    }
}

fn serve_snp(exit: PlatformExit<'_>) -> PlatformFlow {
    match SnpExit::decode(exit) {
        Some(SnpExit::Terminated(how)) => PlatformFlow::Terminated(how.words(|_| None)),
        Some(SnpExit::Certificates(request)) => {
            let pages = request.pages();
            request.answer(CertAnswer::TooSmall { pages });
            PlatformFlow::Finish(Box::new(()))
        }
        None => PlatformFlow::Resume,
    }
}

struct Nobody;

impl SerialLine for Nobody {
    fn send(&mut self, _bytes: &[u8]) {}
    fn receive(&mut self, buf: &mut [u8]) -> usize {
        buf.fill(b'x');
        buf.len()
    }
}

/// Runs a list of exits and compares what became of memory with a model.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let all = ranges(RAM).unwrap();
    let host = HostRam::allocate(&all).unwrap();
    let visible = Arc::new(VisibilityMap::new(&all, Visibility::Private));
    let told = Told(Arc::new(Mutex::new((0..PAGES).collect())));
    let (mut ports, mmio) = (Bus::default(), Bus::default());
    ports
        .attach(0x3f8, 8, Box::new(Serial::new(Box::new(Nobody))))
        .unwrap();
    ports
        .attach(0x600, 8, Box::new(PowerPorts::new(Box::new(|_| {}))))
        .unwrap();
    let shared = SharedMem::new(Arc::clone(host.map()), Arc::clone(&visible));
    let quotes = QuoteService::new(shared.clone(), None, Box::new(|| {})).unwrap();
    let to = Services {
        ports,
        mmio,
        ram: Arc::new(GuestRam::new(
            shared,
            Arc::clone(&visible),
            Box::new(told.clone()),
        )),
        private_backing: true,
        platform: Box::new(Platform(quotes)),
    };
    let (mut memory, mut pins) = (Memory::default(), vec![]);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let mut vcpu = script(&mut input);
        // A device holds on to memory meanwhile, now and then. A conversion of it would wait half a second.
        if vcpu.kind & 0xf0 == 0xf0 {
            pins.clear();
        }
        let flow = step(&mut vcpu, &mut memory, &to).expect("a guest's request is a failure of the host");
        if vcpu.kind % 10 < 3 {
            assert!(
                matches!(u64::from_ne_bytes(vcpu.reply), 0 | 11 | 22),
                "KVM fails on this answer"
            );
        }
        assert!(matches!(flow, Flow::Resume | Flow::Terminated(_)));
        agree(&visible, &told, &to);
        if vcpu.kind & 0xf0 == 0xe0 {
            pins.extend(to.ram.shared().pin(Gpa(vcpu.number[0]), 1));
            pins.clear();
        }
    }
}

fn script(input: &mut Input<'_>) -> Script {
    let (kind, how) = (input.u8(), input.u8());
    let mut number = [0, 0];
    number[0] = match how & 7 {
        0..=4 => u64::from(input.u16() % (PAGES as u16 + 8)) * PAGE_SIZE,
        5 => u64::from(input.u16()),
        6 => u64::MAX - u64::from(input.u16()),
        _ => input.u64(),
    };
    let small = u64::from(input.u8());
    number[1] = match (how >> 3) & 7 {
        7 => input.u64(),
        _ if (3..5).contains(&(kind % 10)) => (small + 1) * PAGE_SIZE,
        _ => small,
    };
    let mut body = Box::new([0; 256]);
    let mut bytes = input.take(if how & 0x40 == 0 { 0 } else { BODY }).to_vec();
    body[..bytes.len()].copy_from_slice(&bytes);
    bytes.resize(32, 0);
    Script {
        kind,
        number,
        to: if how & 0x80 == 0 {
            Visibility::Shared
        } else {
            Visibility::Private
        },
        reply: u64::MAX.to_ne_bytes(),
        bytes,
        body,
        populated: 0,
    }
}

/// # Panics
/// Devices see as shared what the host holds as private, or the gauges are wrong.
fn agree(visible: &VisibilityMap, told: &Told, to: &Services) {
    let private = told.0.lock().unwrap();
    assert_eq!(visible.shared_frames(), PAGES - private.len() as u64);
    for frame in 0..PAGES {
        let shared = visible.all_shared(Gpa(frame * PAGE_SIZE), PAGE_SIZE);
        assert_ne!(shared, private.contains(&frame), "frame {frame}");
    }
    let gauges = to.ram.gauges();
    assert_eq!(gauges.shared_bytes + gauges.private_bytes, RAM);
}
