//! Firmware images as QEMU and two clouds launch them.

use std::path::{Path, PathBuf};

use arch::platform::LaunchPlan;
use clap::ValueEnum;
use serde::{Serialize, Serializer};
use snp::measure::sha256;
use snp::ovmf::{Firmware, Flavour, Guest, KernelHashes};
use snp::vmsa::{CpuSignature, SevFeatures};

use super::Unpredictable;
use crate::config::{Boot, Policy as Number};
use crate::hex::Hex;
use crate::plan;
use crate::spec::file::{FileError, InputFile};

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Measure")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Ovmf {
    /// What the launch consists of [default: shim, and if --firmware is given tdvf on TDX, else ovmf]
    #[arg(long, value_name = "NAME")]
    pub payload: Option<PayloadName>,
    /// OVMF or td-shim image, the file that holds the code
    #[arg(long, value_name = "PATH", required_if_eq_any([("payload", "ovmf"), ("payload", "tdvf")]))]
    pub firmware: Option<PathBuf>,
    /// With a firmware image on SNP: QEMU's name for the type of the virtual CPUs [default: EPYC-v4]
    #[arg(long, value_name = "NAME", requires = "firmware")]
    pub vcpu_type: Option<String>,
    /// With a firmware image on SNP: who launches it [default: qemu]
    #[arg(long, value_name = "NAME", requires = "firmware")]
    pub vmm_type: Option<VmmType>,
    /// With a firmware image on SNP: SEV_FEATURES as the host sets them [default: 0x1, and what --debug-swap and
    /// --secure-tsc add]
    #[arg(long, value_name = "HEX", requires = "firmware", conflicts_with_all = ["debug_swap", "secure_tsc"])]
    pub guest_features: Option<Number>,
}

/// What is launched.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadName {
    /// A kernel through cvmm's shim, as `cvmm run` launches it
    Shim,
    /// An OVMF image as an SNP guest
    Ovmf,
    /// A TDVF (OVMF) or td-shim image as a TD
    Tdvf,
}

/// Who launches a firmware image.
#[derive(ValueEnum, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum VmmType {
    /// QEMU
    Qemu,
    /// Amazon EC2
    Ec2,
    /// Google Compute Engine
    Gce,
}

/// What a launch was made of.
#[derive(Serialize, Debug)]
pub struct Source {
    firmware: PathBuf,
    vmm_type: VmmType,
    vcpu_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel_hashes: Option<Hashes>,
}

#[derive(Debug)]
struct Hashes(KernelHashes);

impl Serialize for Hashes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let KernelHashes {
            kernel,
            initrd,
            cmdline,
        } = &self.0;
        let named = [("kernel", kernel), ("initrd", initrd), ("cmdline", cmdline)];
        to.collect_map(named.map(|(name, hash)| (name, Hex(hash).to_string())))
    }
}

impl Ovmf {
    /// The image, if that is what is launched.
    pub(super) fn firmware(&self) -> Result<Option<&Path>, Unpredictable> {
        match (self.payload, &self.firmware) {
            (Some(PayloadName::Shim), Some(_)) => Err(Unpredictable::TwoPayloads),
            (_, firmware) => Ok(firmware.as_deref()),
        }
    }

    /// Refuses what has no part in a TD's digest.
    pub(super) fn check_td(&self) -> Result<(), Unpredictable> {
        if self.payload == Some(PayloadName::Ovmf) {
            return Err(Unpredictable::OvmfAsTd);
        }
        let given = [
            ("--vcpu-type", self.vcpu_type.is_some()),
            ("--vmm-type", self.vmm_type.is_some()),
            ("--guest-features", self.guest_features.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Unpredictable::NoRegisters { flag }),
            None => Ok(()),
        }
    }

    /// Features that were asked for by number.
    pub(super) fn features(&self) -> Option<SevFeatures> {
        self.guest_features.map(|bits| SevFeatures::from_bits(bits.0))
    }
}

/// The launch of `firmware`, with the kernel of `boot` if there is one.
pub(super) fn plan(
    options: &Ovmf,
    firmware: &Path,
    boot: &Boot,
    cpus: u32,
) -> Result<(Source, LaunchPlan), Unpredictable> {
    let vcpu_type = options.vcpu_type.as_deref().unwrap_or("EPYC-v4");
    let vmm_type = options.vmm_type.unwrap_or(VmmType::Qemu);
    let unknown = || Unpredictable::VcpuType {
        name: vcpu_type.into(),
    };
    let signature = CpuSignature::named(vcpu_type).ok_or_else(unknown)?;
    let hashes = hashes(boot)?;
    let guest = Guest {
        flavour: match vmm_type {
            VmmType::Qemu => Flavour::Qemu,
            VmmType::Ec2 => Flavour::Ec2,
            VmmType::Gce => Flavour::Gce,
        },
        vcpus: cpus,
        signature,
        kernel: hashes.as_ref(),
    };
    // The parser refuses what is longer than an image can be.
    let bytes = InputFile::open("firmware", firmware)?.read_start("firmware", IMAGE_MAX)?;
    let image = Firmware::parse(bytes).map_err(|cause| Unpredictable::Firmware {
        path: firmware.into(),
        cause,
    })?;
    let plan = image.plan(&guest)?;
    let source = Source {
        firmware: firmware.into(),
        vmm_type,
        vcpu_type: vcpu_type.into(),
        kernel_hashes: hashes.map(Hashes),
    };
    Ok((source, plan))
}

/// One byte more than an image may have.
pub(super) const IMAGE_MAX: usize = (64 << 20) + 1;

/// Hashes as QEMU makes them with `-kernel`: of whatever the files hold.
fn hashes(boot: &Boot) -> Result<Option<KernelHashes>, Unpredictable> {
    let Some(kernel) = &boot.kernel else {
        let given = [
            ("initrd", boot.initrd.is_some()),
            ("cmdline", boot.cmdline.is_some()),
        ];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((what, _)) => Err(Unpredictable::NoKernel { what }),
            None => Ok(None),
        };
    };
    let open = |role, path: &Path| -> Result<InputFile, FileError> { InputFile::open(role, path) };
    let kernel = open("kernel", kernel)?;
    let initrd = boot.initrd.as_deref().map(|path| open("initrd", path));
    let initrd = initrd.transpose()?;
    let (kernel, initrd) = plan::blobs(&kernel, initrd.as_ref())?;
    let cmdline = boot.cmdline.as_deref().unwrap_or_default();
    Ok(Some(KernelHashes {
        kernel: kernel.sha256,
        initrd: initrd.map_or_else(|| sha256(&[]), |blob| blob.sha256),
        cmdline: sha256(&[cmdline.as_bytes(), &[0]].concat()),
    }))
}
