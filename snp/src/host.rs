//! What this host has and what it lacks for SNP guests, piece by piece.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

use arch::kvm::system::Host;

use crate::bytes::{le32, le64};
use crate::error::Refusal;
use crate::ioctl;
use crate::policy::Policy;
use crate::report::Tcb;
use crate::vmsa::SevFeatures;

/// `KVM_X86_SNP_VM`.
pub const VM_TYPE: u64 = 4;

/// The piece that is missing.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Missing {
    #[error("this CPU has no SEV-SNP; it takes an AMD EPYC of the 7003 series or later")]
    Cpu,
    #[error(
        "this CPU may have SEV-SNP, but the kernel does not see it; \
         enable SMEE, SEV-SNP and the RMP table in the BIOS and start the host without mem_encrypt=off"
    )]
    Bios,
    #[error("the module kvm_amd is not loaded; load it: modprobe kvm_amd")]
    KvmAmd,
    #[error(
        "kvm_amd has SNP off; load it with sev=1 sev_es=1 sev_snp=1, and look for \"SEV-SNP\" and \"RMP\" in the \
         kernel log: the IOMMU must be on and not in passthrough mode, and the BIOS must reserve the RMP table"
    )]
    KernelParameter,
    #[error("this kernel's KVM has no SNP guests; it takes Linux 6.11 or later with CONFIG_KVM_AMD_SEV=y")]
    Kernel,
    #[error("{path} does not exist; load the module ccp and enable the security processor in the BIOS")]
    Device { path: String },
    #[error("{path} may not be opened by this user; add the user to its group or change its mode")]
    Permission {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{path} cannot be opened")]
    Open {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Opens `/dev/sev`, or names what is missing. `root` is `/`; `vm_types` is `KVM_CAP_VM_TYPES`.
///
/// # Errors
/// The first piece that is missing, from the CPU upwards.
pub fn open(root: &Path, vm_types: u32) -> Result<Arc<File>, Missing> {
    let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    if !cpuinfo.split_whitespace().any(|word| word == "sev_snp") {
        return Err(if may_have_snp(&cpuinfo) {
            Missing::Bios
        } else {
            Missing::Cpu
        });
    }
    match fs::read_to_string(root.join("sys/module/kvm_amd/parameters/sev_snp")) {
        Err(_) => return Err(Missing::KvmAmd),
        Ok(value) if !matches!(value.trim(), "Y" | "1") => return Err(Missing::KernelParameter),
        Ok(_) => {}
    }
    if vm_types >> VM_TYPE & 1 == 0 {
        return Err(Missing::Kernel);
    }
    let device = root.join("dev/sev");
    let path = device.display().to_string();
    let file = File::options().read(true).write(true).open(&device);
    file.map(Arc::new).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT) => Missing::Device { path },
        Some(libc::EACCES | libc::EPERM) => Missing::Permission { path, source },
        _ => Missing::Open { path, source },
    })
}

/// AMD family 25 (Zen 3) and later.
fn may_have_snp(cpuinfo: &str) -> bool {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let family = field("cpu family")
        .and_then(|f| f.parse::<u32>().ok())
        .unwrap_or(0);
    field("vendor_id") == Some("AuthenticAMD") && family >= 25
}

/// What KVM offers SNP guests on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// VMSA features that a launch may request.
    pub features: u64,
    /// Policy bits that a launch may set; kernels before the attribute existed take SMT and DEBUG.
    pub policy: u64,
    /// Extended report requests can come to user space.
    pub certificates: bool,
}

/// SMT, the bit that is always one, and DEBUG, above the ABI version.
const POLICY_BEFORE_ATTRIBUTE: u64 = 1 << 19 | 1 << 17 | 1 << 16 | 0xffff;

impl Offered {
    /// Asks `host`.
    pub fn ask(host: &Host) -> Self {
        Self {
            features: host.sev_attribute(0).unwrap_or(0),
            policy: host.sev_attribute(1).unwrap_or(POLICY_BEFORE_ATTRIBUTE),
            certificates: host.sev_attribute(2).is_ok_and(|supported| supported != 0),
        }
    }
}

/// A wish that this host cannot fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOffered {
    /// A VMSA feature.
    #[error(
        "the host does not offer {0} to SNP guests; leave it out, or update the host's kernel and SEV firmware"
    )]
    Feature(&'static str),
    /// Policy bits.
    #[error(transparent)]
    Policy(#[from] crate::policy::PolicyError),
    /// Certificates.
    #[error(
        "this kernel cannot hand certificates to SNP guests (it takes Linux 7.0 or later); leave --certs out"
    )]
    Certificates,
}

impl Offered {
    /// Checks a launch against the offer before it begins.
    ///
    /// # Errors
    /// The first wish that the host does not offer.
    pub fn check(&self, features: SevFeatures, policy: Policy, certificates: bool) -> Result<(), NotOffered> {
        policy.check(self.policy)?;
        let refused = features.request() & !self.features;
        if refused & SevFeatures::DEBUG_SWAP.bits() != 0 {
            return Err(NotOffered::Feature("debug-swap"));
        }
        if refused & SevFeatures::SECURE_TSC.bits() != 0 {
            return Err(NotOffered::Feature("secure-tsc"));
        }
        if refused != 0 {
            return Err(NotOffered::Feature("one of the requested VMSA features"));
        }
        if certificates && !self.certificates {
            return Err(NotOffered::Certificates);
        }
        Ok(())
    }
}

/// State of the security processor (SEV-SNP Firmware ABI, "SNP_PLATFORM_STATUS").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformStatus {
    /// Firmware ABI version, major and minor.
    pub abi: (u8, u8),
    /// Firmware build.
    pub build: u32,
    /// True if firmware is initialised for SNP.
    pub initialised: bool,
    /// Guests that firmware knows.
    pub guests: u32,
    /// Reports hide the chip's id.
    pub chip_id_masked: bool,
    /// Reports are not signed by the chip's own key.
    pub chip_key_masked: bool,
    /// A VLEK is loaded.
    pub vlek: bool,
    /// Version of everything that is trusted, as running.
    pub current_tcb: Tcb,
    /// The version that reports state.
    pub reported_tcb: Tcb,
}

impl PlatformStatus {
    /// Asks firmware by way of `/dev/sev`.
    ///
    /// # Errors
    /// The kernel's or firmware's.
    pub fn ask(sev: &File) -> Result<Self, Refusal> {
        Ok(Self::decode(&ioctl::platform_status(sev)?))
    }

    fn decode(raw: &[u8; ioctl::STATUS_LEN]) -> Self {
        let [major, minor, state, ..] = *raw;
        let word = |at| le32(raw, at).unwrap_or(0);
        let flags = word(8);
        Self {
            abi: (major, minor),
            build: word(4),
            initialised: state == 1,
            guests: word(12),
            chip_id_masked: flags & 1 != 0,
            chip_key_masked: flags & 2 != 0,
            vlek: flags & 4 != 0,
            current_tcb: Tcb(le64(raw, 16).unwrap_or(0)),
            reported_tcb: Tcb(le64(raw, 24).unwrap_or(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyBit;

    const ROME: &str = "vendor_id\t: AuthenticAMD\ncpu family\t: 23\nflags\t\t: fpu sev\n";
    const MILAN_OFF: &str = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu sev\n";
    const MILAN: &str = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu sev sev_es sev_snp\n";

    #[test]
    fn each_missing_piece_has_its_own_words() {
        let root = std::env::temp_dir().join(format!("cvmm-snp-host-{}", std::process::id()));
        let parameters = root.join("sys/module/kvm_amd/parameters");
        for dir in [&parameters, &root.join("proc"), &root.join("dev")] {
            fs::create_dir_all(dir).unwrap();
        }
        let with = |cpuinfo: &str, parameter: Option<&str>, device: bool, types: u32| {
            fs::write(root.join("proc/cpuinfo"), cpuinfo).unwrap();
            let _ = fs::remove_file(parameters.join("sev_snp"));
            let _ = fs::remove_file(root.join("dev/sev"));
            if let Some(value) = parameter {
                fs::write(parameters.join("sev_snp"), value).unwrap();
            }
            if device {
                fs::write(root.join("dev/sev"), "").unwrap();
            }
            open(&root, types).map(|_| ()).map_err(|e| e.to_string())
        };
        let cases: &[(&str, Option<&str>, bool, u32, &str)] = &[
            (ROME, Some("Y"), true, 0x10, "no SEV-SNP"),
            ("", None, false, 0, "no SEV-SNP"),
            (MILAN_OFF, Some("N"), true, 0x10, "BIOS"),
            (MILAN, None, true, 0x10, "modprobe kvm_amd"),
            (MILAN, Some("N\n"), true, 0x10, "sev_snp=1"),
            (MILAN, Some("Y\n"), true, 0x0f, "Linux 6.11"),
            (MILAN, Some("Y\n"), false, 0x10, "ccp"),
        ];
        for (cpuinfo, parameter, device, types, says) in cases {
            let error = with(cpuinfo, *parameter, *device, *types).unwrap_err();
            assert!(error.contains(says), "{says}: {error}");
        }
        assert_eq!(with(MILAN, Some("Y\n"), true, 0x10), Ok(()));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn wishes_are_checked_one_by_one() {
        let offered = Offered {
            features: 0x20,
            policy: 0x1b_ffff,
            certificates: false,
        };
        let check =
            |features, policy, certs| offered.check(features, policy, certs).map_err(|e| e.to_string());
        let (snp, policy) = (SevFeatures::SNP, Policy::default());
        assert_eq!(check(snp.with(SevFeatures::DEBUG_SWAP), policy, false), Ok(()));
        assert!(
            check(snp.with(SevFeatures::SECURE_TSC), policy, false)
                .unwrap_err()
                .contains("secure-tsc")
        );
        assert!(
            check(SevFeatures::from_bits(0x101), policy, false)
                .unwrap_err()
                .contains("VMSA features")
        );
        assert!(check(snp, policy, true).unwrap_err().contains("--certs"));
        let cxl = policy.set(PolicyBit::CxlAllowed, true);
        assert!(check(snp, cxl, false).unwrap_err().contains("\"cxl\""));
    }

    #[test]
    fn platform_status_is_decoded() {
        let mut raw = [0; ioctl::STATUS_LEN];
        raw[..4].copy_from_slice(&[1, 55, 1, 1]);
        raw[4] = 21;
        raw[8] = 4;
        raw[12] = 3;
        raw[16..24].copy_from_slice(&0xd115_0000_0000_0003_u64.to_le_bytes());
        let status = PlatformStatus::decode(&raw);
        assert_eq!(
            (status.abi, status.build, status.initialised, status.guests),
            ((1, 55), 21, true, 3)
        );
        assert!(status.vlek && !status.chip_id_masked && !status.chip_key_masked);
        assert_eq!(status.current_tcb, Tcb(0xd115_0000_0000_0003));
    }
}
