//! The whole order of work on a machine of 64 MiB made of vectors.
#![expect(clippy::arithmetic_side_effects, reason = "a test may overflow and fail")]

use super::*;
use crate::bytes::{get_u32, get_u64};
use crate::bzimage::tests::file;
use crate::config::Blob;
use crate::layout::STAGING_KERNEL;
use crate::sha256::{Plain, digest};
use std::vec::Vec;

const RAM: u64 = 64 << 20;
const KERNEL_FILE: usize = 3 << 20;
const INIT_SIZE: u32 = 12 << 20;

fn index(gpa: u64) -> usize {
    usize::try_from(gpa).unwrap()
}

/// RAM, the staging area as the host sees it, and what happened to them.
struct Fake {
    ram: Vec<u8>,
    staging: Vec<u8>,
    /// How often each page was validated.
    validated: Vec<u8>,
    /// A staging byte that the host changes after it was read.
    flip_after_read: Option<usize>,
    extended: Vec<(u8, Digest)>,
    released: bool,
}

impl Fake {
    fn new(descriptor: &Descriptor, kernel: &[u8], initrd: &[u8]) -> Self {
        let mut staging = std::vec![0; 8 << 20];
        for (gpa, bytes) in [
            (STAGING, &descriptor.encode()[..]),
            (descriptor.kernel.gpa, kernel),
            (descriptor.initrd.gpa, initrd),
        ] {
            let at = index(gpa.max(STAGING) - STAGING);
            if bytes.is_empty() {
                continue;
            }
            staging[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Fake {
            ram: std::vec![0xaa; index(RAM)],
            staging,
            validated: std::vec![0; index(RAM / PAGE)],
            flip_after_read: None,
            extended: Vec::new(),
            released: false,
        }
    }

    fn assert_validated(&self, range: &Range<u64>) {
        let pages = index(range.start / PAGE)..index(range.end.div_ceil(PAGE));
        assert!(
            self.validated[pages].iter().all(|&times| times == 1),
            "{range:x?} is used unvalidated"
        );
    }
}

impl Machine for Fake {
    fn validate(&mut self, range: &Range<u64>) -> Result<(), Reason> {
        for page in &mut self.validated[index(range.start / PAGE)..index(range.end / PAGE)] {
            *page += 1;
            assert_eq!(*page, 1, "{range:x?} is validated twice");
        }
        Ok(())
    }

    fn wipe(&mut self, range: &Range<u64>) {
        self.assert_validated(range);
        self.ram[index(range.start)..index(range.end)].fill(0);
    }

    fn memory(&mut self, gpa: u64, len: u64) -> Result<&mut [u8], Reason> {
        self.assert_validated(&(gpa..gpa + len));
        Ok(&mut self.ram[index(gpa)..index(gpa + len)])
    }

    fn fetch(&mut self, staged: u64, to: u64, len: u64) -> Result<(), Reason> {
        assert!(!self.released, "the staging area is gone");
        let from = index(staged - STAGING)..index(staged - STAGING + len);
        let copy = self.staging[from.clone()].to_vec();
        self.memory(to, len)?.copy_from_slice(&copy);
        if let Some(at) = self.flip_after_read.filter(|at| from.contains(at)) {
            self.staging[at] ^= 1;
        }
        Ok(())
    }

    fn compress(&self) -> impl Compress + use<> {
        Plain
    }

    fn extend(&mut self, register: u8, digest: &Digest) -> Result<(), Reason> {
        self.extended.push((register, *digest));
        Ok(())
    }

    fn release_staging(&mut self) -> Result<(), Reason> {
        assert!(!core::mem::replace(&mut self.released, true));
        Ok(())
    }
}

/// A boot that succeeds, to be varied.
struct Case {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    descriptor: Descriptor,
    flags: u32,
    cmdline: &'static [u8],
}

impl Case {
    fn new() -> Self {
        let kernel = file(KERNEL_FILE, INIT_SIZE);
        let initrd: Vec<u8> = (0u32..700_001).map(|i| u8::try_from(i % 253).unwrap()).collect();
        let staged = |gpa, bytes: &[u8]| Staged {
            gpa,
            len: u64::try_from(bytes.len()).unwrap(),
        };
        let descriptor = Descriptor {
            vcpus: 2,
            low_ram_top: RAM,
            high_ram_top: 0,
            kernel: staged(STAGING_KERNEL, &kernel),
            initrd: staged(STAGING_KERNEL + (4 << 20), &initrd),
        };
        Case {
            kernel,
            initrd,
            descriptor,
            flags: FLAG_LAZY_ACCEPT,
            cmdline: b"console=ttyS0",
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let blob = |bytes: &[u8]| Blob {
            len: u64::try_from(bytes.len()).unwrap(),
            sha256: digest(bytes),
        };
        let config = Config {
            flags: self.flags,
            kernel: blob(&self.kernel),
            initrd: blob(&self.initrd),
            ram: (0, u64::MAX),
            max_vcpus: 4,
            cmdline: self.cmdline,
        };
        config.encode().unwrap()
    }

    fn fake(&self) -> Fake {
        Fake::new(&self.descriptor, &self.kernel, &self.initrd)
    }
}

#[test]
fn a_good_machine_boots_with_everything_in_place() {
    for mode in [Mode::Soft, Mode::Snp, Mode::Tdx] {
        let case = Case::new();
        let mut fake = case.fake();
        let entry = prepare(&mut fake, mode, &case.config());
        assert_eq!(
            entry,
            Ok(Entry {
                rip: 0x100_0200,
                zero_page: 0x12_0000
            }),
            "{mode:?}"
        );
        assert!(fake.released);
        assert_eq!(
            fake.ram[0x100_0000..0x100_0000 + KERNEL_FILE - 0x800],
            case.kernel[0x800..]
        );
        let page = &fake.ram[0x12_0000..0x12_1000];
        assert_eq!(get_u64(page, 0x70), Some(0x13_0000));
        assert_eq!(page[0x210], 0xff);
        let initrd = index(get_u32(page, 0x218).unwrap().into());
        assert_eq!(fake.ram[initrd..initrd + case.initrd.len()], case.initrd);
        assert_eq!(get_u32(page, 0x21c), u32::try_from(case.initrd.len()).ok());
        let cmdline = index(get_u32(page, 0x228).unwrap().into());
        let words = b"efi=noruntime console=ttyS0\0";
        assert_eq!(&fake.ram[cmdline..cmdline + words.len()], words);
        let (link, efi) = (get_u64(page, 0x250), &page[0x1c0..0x1c4]);
        match mode {
            Mode::Soft => assert_eq!((link, efi), (Some(0), &[0; 4][..])),
            Mode::Snp => assert_eq!((link, efi), (Some(0x12_2040), &b"EL64"[..])),
            Mode::Tdx => assert_eq!((link, efi), (Some(0), &b"EL64"[..])),
        }
    }
}

#[test]
fn the_addition_stands_where_the_kernel_reads_it_and_costs_no_word_of_the_owner() {
    const LONG: [u8; 2034] = [b'x'; 2034];
    let cases: [(&'static [u8], u8, &[u8]); 5] = [
        (b"", 7, b"efi=noruntime \0"),
        (b"quiet -- 3", 7, b"efi=noruntime quiet -- 3\0"),
        (&LONG[1..], 7, b"efi=noruntime xx"),
        (&LONG, 7, b"xx"),
        (&LONG[..500], 1, b"xx"),
    ];
    for (cmdline, kernel_max, expected) in cases {
        let mut case = Case::new();
        case.cmdline = cmdline;
        case.kernel[0x239] = kernel_max;
        let mut fake = case.fake();
        prepare(&mut fake, Mode::Soft, &case.config()).unwrap();
        let found = &fake.ram[0x12_1000..0x12_2000];
        assert!(found.starts_with(expected), "{} bytes", cmdline.len());
        let len = found.iter().position(|&byte| byte == 0).unwrap();
        assert!(found[..len].ends_with(cmdline), "{} bytes", cmdline.len());
    }
}

#[test]
fn a_td_measures_what_it_boots_and_logs_it() {
    let case = Case::new();
    let (mut fake, page) = (case.fake(), case.config());
    prepare(&mut fake, Mode::Tdx, &page).unwrap();
    let events = events::of(&page).unwrap();
    let expected: Vec<(u8, Digest)> = events
        .iter()
        .map(|event| (event.register, event.digest()))
        .collect();
    assert_eq!(fake.extended, expected);
    let mut log = [0; 4096];
    events::write_log(&mut log, &events).unwrap();
    assert_eq!(fake.ram[0x12_4000..0x12_5000], log);
    for mode in [Mode::Soft, Mode::Snp] {
        let mut fake = case.fake();
        prepare(&mut fake, mode, &page).unwrap();
        assert_eq!(fake.extended, []);
    }
}

#[test]
fn a_td_accepts_the_first_mib_and_what_only_snp_launches() {
    let case = Case::new();
    let mut fake = case.fake();
    prepare(&mut fake, Mode::Tdx, &case.config()).unwrap();
    let accepted = |gpa: u64| fake.validated[index(gpa / PAGE)] == 1;
    assert!((0..0x10_0000).step_by(4096).all(accepted));
    assert!((0x10_0000..0x11_0000).step_by(4096).all(|gpa| !accepted(gpa)));
    assert!((0x11_0000..0x11_2000).step_by(4096).all(accepted));
    assert!((0x11_2000..0x11_4000).step_by(4096).all(|gpa| !accepted(gpa)));
    assert!((0x11_4000..0x20_0000).step_by(4096).all(accepted));
}

#[test]
fn memory_is_validated_once_or_left_to_the_kernel() {
    for (mode, flags) in [
        (Mode::Snp, FLAG_LAZY_ACCEPT),
        (Mode::Snp, 0),
        (Mode::Tdx, FLAG_LAZY_ACCEPT),
        (Mode::Tdx, 0),
        (Mode::Soft, FLAG_LAZY_ACCEPT),
    ] {
        let case = Case { flags, ..Case::new() };
        let mut fake = case.fake();
        prepare(&mut fake, mode, &case.config()).unwrap();
        let table = fake.ram[0x14_0000..0x15_0000].to_vec();
        let lazy = mode != Mode::Soft && flags != 0;
        for unit in 1..RAM / UNIT {
            let first = index(unit * UNIT / PAGE);
            let times = &fake.validated[first..first + 512];
            let unaccepted = unaccepted::next(&table, unit) == Some(unit);
            assert!(
                times.iter().all(|&times| times == u8::from(!unaccepted)),
                "unit {unit}, lazy {lazy}"
            );
            assert!(lazy || !unaccepted);
        }
        assert_eq!(unaccepted::next(&table, 0), lazy.then_some(1));
    }
}

#[test]
fn a_changed_payload_stops_the_machine() {
    type Change = fn(&mut Fake);
    let cases: [(&str, Change, Reason); 5] = [
        (
            "kernel",
            |fake| fake.staging[(2 << 20) + 70_000] ^= 1,
            Reason::KernelMismatch,
        ),
        (
            "last byte of the kernel",
            |fake| fake.staging[(5 << 20) - 1] ^= 1,
            Reason::KernelMismatch,
        ),
        (
            "initrd",
            |fake| fake.staging[6 << 20] ^= 1,
            Reason::InitrdMismatch,
        ),
        (
            "last byte of the initrd",
            |fake| fake.staging[(6 << 20) + 700_000] ^= 1,
            Reason::InitrdMismatch,
        ),
        ("descriptor", |fake| fake.staging[0] ^= 1, Reason::BadDescriptor),
    ];
    for (name, change, reason) in cases {
        let case = Case::new();
        let mut fake = case.fake();
        change(&mut fake);
        assert_eq!(
            prepare(&mut fake, Mode::Snp, &case.config()),
            Err(reason),
            "{name}"
        );
        assert!(!fake.released, "{name}");
    }
}

#[test]
fn what_the_host_changes_after_it_was_copied_has_no_effect() {
    for at in [0x10, (2 << 20) + 0x1f1, (5 << 20) - 1, (6 << 20) + 5] {
        let case = Case::new();
        let mut fake = case.fake();
        fake.flip_after_read = Some(at);
        assert!(
            prepare(&mut fake, Mode::Snp, &case.config()).is_ok(),
            "byte {at:#x}"
        );
        assert_eq!(
            fake.ram[0x100_0000..0x100_0000 + KERNEL_FILE - 0x800],
            case.kernel[0x800..]
        );
    }
}

#[test]
fn other_faults_have_their_reason() {
    let mut case = Case::new();
    case.kernel[0x202] = b'h';
    assert_eq!(
        prepare(&mut case.fake(), Mode::Soft, &case.config()),
        Err(Reason::BadKernel)
    );
    let mut case = Case::new();
    case.kernel = file(KERNEL_FILE, 47 << 20);
    assert_eq!(
        prepare(&mut case.fake(), Mode::Soft, &case.config()),
        Err(Reason::NoRoom)
    );
    let case = Case::new();
    let mut config = case.config();
    config[0xff0] = 1;
    assert_eq!(
        prepare(&mut case.fake(), Mode::Soft, &config),
        Err(Reason::BadConfig)
    );
}

#[test]
fn a_kernel_without_initrd_boots() {
    let mut case = Case::new();
    case.initrd.clear();
    case.descriptor.initrd = Staged::default();
    let mut fake = case.fake();
    assert!(prepare(&mut fake, Mode::Snp, &case.config()).is_ok());
    assert_eq!(get_u64(&fake.ram, 0x12_0218), Some(0));
}
