//! What is read from files, and what the shim reads from a hostile host.

use std::sync::LazyLock;

use arch::x86::cpuid::{CpuidEntry, CpuidTable};
use snp::certs::{CertKind, CertTable};
use snp::cpuid_page;
use snp::id_block::{IdAuth, IdBlock};
use snp::ovmf::{Firmware, Flavour, Guest, KernelHashes};
use snp::report::{Chain, Expected, REPORT_BYTES, Report, Roots, check};
use snp::vmsa::CpuSignature;
use vmm::config::Config;
use vmm::spec::bzimage;

use crate::input::Input;

/// A configuration file: what was read can be written and read again, and is still the same.
pub fn config(data: &[u8]) {
    let Ok(config) = serde_json::from_slice::<Config>(data) else {
        return;
    };
    let whole = config.clone().with_defaults();
    for config in [config.clone(), whole.clone(), config.overlaid(whole)] {
        let text = serde_json::to_vec(&config).expect("a configuration cannot be written");
        let again: Config = serde_json::from_slice(&text).expect("a configuration cannot be read again");
        assert_eq!(again, config);
    }
}

/// A kernel, as `cvmm` sees it and as the shim does.
pub fn kernel(data: &[u8]) {
    let mut input = Input::new(data);
    let (more, cmdline) = (u64::from(input.u32()), usize::from(input.u16()));
    let file = input.rest();
    let len = file.len() as u64 + more;
    let head = file.get(..bzimage::HEAD_BYTES).unwrap_or(file);
    if let Ok(header) = bzimage::Header::parse(head, len) {
        assert!(header.payload_offset < len);
    }
    if let Ok(kernel) = shim::bzimage::Kernel::parse(file, len, cmdline) {
        assert!(kernel.setup_len < len && kernel.init_size >= len - kernel.setup_len);
        assert!(kernel.header.start == 0x1f1 && kernel.header.end <= shim::bzimage::HEADER_END);
    }
}

/// The parameter page and the descriptor that a hostile host gives to the shim: the shim's own decisions.
pub fn shim_plan(data: &[u8]) {
    let mut input = Input::new(data);
    let mut descriptor = [0; shim::descriptor::DESCRIPTOR_LEN];
    let part = input.take(descriptor.len());
    descriptor[..part.len()].copy_from_slice(part);
    let mut page = [0; shim::config::CONFIG_LEN];
    let part = input.take(page.len());
    page[..part.len()].copy_from_slice(part);
    let descriptor = shim::descriptor::Descriptor::decode(&descriptor);
    if let Some(descriptor) = descriptor {
        let again = shim::descriptor::Descriptor::decode(&descriptor.encode());
        assert_eq!(again, Some(descriptor));
    }
    let Ok(config) = shim::config::Config::decode(&page) else {
        return;
    };
    let again = config.encode().expect("a parameter page cannot be written");
    assert_eq!(shim::config::Config::decode(&again).as_ref(), Ok(&config));
    if let Some(descriptor) = descriptor
        && let Ok(plan) = shim::plan::Plan::new(&config, &descriptor)
    {
        let (low, initrd) = (plan.ram.low(), plan.initrd_range());
        let kernel = plan
            .kernel_range(plan.kernel.len)
            .expect("a plan without room for its kernel");
        assert!(low.start <= kernel.start && kernel.end <= initrd.start || initrd.is_empty());
        assert!(initrd.end <= low.end && kernel.end <= low.end);
    }
}

/// An OVMF image, launched in each way that is known.
pub fn ovmf(data: &[u8]) {
    let mut input = Input::new(data);
    let (vcpus, signature) = (u32::from(input.u8() & 3), input.u32());
    // The image's end is what is parsed; its length has to be whole pages.
    let tail = input.rest();
    let mut image = vec![0; tail.len().next_multiple_of(4096)];
    let start = image.len() - tail.len();
    image[start..].copy_from_slice(tail);
    let Ok(firmware) = Firmware::parse(image) else {
        return;
    };
    let hashes = KernelHashes::of(b"kernel", b"initrd", "console=ttyS0");
    for flavour in [Flavour::Qemu, Flavour::Ec2, Flavour::Gce] {
        for kernel in [None, Some(&hashes)] {
            let guest = Guest {
                flavour,
                vcpus,
                signature: CpuSignature(signature),
                kernel,
            };
            if let Ok(plan) = firmware.clone().plan(&guest) {
                let pages: u64 = plan.pages.iter().map(|page| page.range.bytes() >> 12).sum();
                assert_eq!(plan.vcpus.len(), vcpus as usize);
                if pages < 64 {
                    let _ = snp::measure::image(&plan);
                }
            }
        }
    }
}

/// A real certificate and those that lead to its root.
static REAL: LazyLock<Chain> = LazyLock::new(|| {
    let vcek = include_bytes!("../../../snp/tests/recorded/report/vcek-milan.der");
    Chain::find(vcek, None, &Roots::amd()).expect("the recorded certificate has no chain")
});

/// A report with a certificate that is to have signed it, or a list of revoked ones.
pub fn report(data: &[u8]) {
    let mut input = Input::new(data);
    let raw = input.take(REPORT_BYTES);
    let Ok(report) = Report::parse(raw) else { return };
    let _ = format!("{report:?} {:?} {:?}", report.cpu(), report.mitigations());
    let _ = report.reported_tcb().parts(report.tcb_layout());
    assert_eq!(report.bytes().as_slice(), raw);
    let rest = input.rest();
    if let Ok(chain) = REAL.clone().with_revoked(rest) {
        let now = std::time::SystemTime::now();
        assert!(
            !check(&report, &chain, &Expected::default(), now).is_empty(),
            "AMD did not sign the list"
        );
    }
    let (signer, intermediate) = rest.split_at(rest.len() / 2);
    let own = Roots::only(signer).into_iter();
    for roots in std::iter::once(Roots::amd()).chain(own) {
        for (signer, intermediate) in [(rest, None), (signer, Some(intermediate))] {
            if let Ok(chain) = Chain::find(signer, intermediate, &roots) {
                let failures = check(
                    &report,
                    &chain,
                    &Expected::default(),
                    std::time::SystemTime::now(),
                );
                for failure in failures {
                    assert!(!failure.to_string().is_empty());
                }
            }
        }
    }
}

/// The CPUID page that firmware sends back, and a table that it is made from.
pub fn cpuid(data: &[u8]) {
    let mut input = Input::new(data);
    let count = usize::from(input.u8());
    let entry = |input: &mut Input<'_>| CpuidEntry {
        leaf: input.u32() & 0x8000_003f,
        subleaf: Some(u32::from(input.u8())).filter(|subleaf| subleaf & 0x80 == 0),
        eax: input.u32(),
        ebx: input.u32(),
        ecx: input.u32(),
        edx: input.u32(),
    };
    let mut table = CpuidTable((0..count).map(|_| entry(&mut input)).collect());
    let back = input.rest();
    cpuid_page::sanitise(&mut table);
    if let Ok(page) = cpuid_page::build(&table) {
        assert!(cpuid_page::corrections(&page, &page).is_empty());
        let corrections = cpuid_page::corrections(&page, back);
        let _ = format!(
            "{}",
            corrections.iter().map(ToString::to_string).collect::<String>()
        );
        cpuid_page::accept(&corrections, &mut table);
    }
    cpuid_page::accept(&cpuid_page::corrections(back, &[0; 4096]), &mut table);
}

/// A certificate table, and files that are to go into one.
pub fn certs(data: &[u8]) {
    if let Ok(table) = CertTable::parse(data) {
        let again = CertTable::parse(&table.to_bytes()).expect("a table cannot be read again");
        assert_eq!(again, table);
        let _ = table.get(CertKind::Vcek);
    }
    let mut table = CertTable::default();
    if table.add(CertKind::Vcek, data).is_ok() {
        assert!(table.get(CertKind::Vcek).is_some());
    }
}

/// An ID block with its signatures.
pub fn id_block(data: &[u8]) {
    let (block, auth) = data.split_at(data.len().min(96));
    let mut page = auth.to_vec();
    page.resize(4096, 0);
    let (block, auth) = (IdBlock::parse(block), IdAuth::parse(&page));
    if let Ok(block) = &block {
        assert_eq!(IdBlock::parse(&block.to_bytes()).as_ref().ok(), Some(block));
    }
    if let (Ok(block), Ok(auth)) = (block, auth) {
        let _ = (auth.id_key(), auth.author_key(), auth.check(&block));
    }
}
