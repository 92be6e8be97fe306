//! The guest policy: what the host may do with the guest, fixed at launch and stated in every report
//! (SEV-SNP Firmware ABI, revision 1.58, "Guest Policy").

use std::fmt;

/// Policy bits of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy(u64);

/// A bit that stands for one permission or demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PolicyBit {
    /// May run on a host with simultaneous multithreading.
    Smt = 16,
    /// May be associated with a migration agent.
    MigrationAgent = 18,
    /// May be debugged: the host can read and write the guest's memory.
    Debug = 19,
    /// Must stay on one socket.
    SingleSocket = 20,
    /// May use memory on CXL devices.
    CxlAllowed = 21,
    /// Requires AES-256-XTS memory encryption.
    Aes256Xts = 22,
    /// Requires that running average power limits are off.
    RaplDisabled = 23,
    /// Requires ciphertext hiding.
    CiphertextHiding = 24,
    /// Requires that pages cannot be swapped by the host.
    PageSwapDisabled = 25,
}

/// Must be set in every policy.
const ALWAYS_ONE: u64 = 1 << 17;

/// Bit, name in configuration, and meaning.
const BITS: [(PolicyBit, &str, &str); 9] = [
    (PolicyBit::Smt, "smt", "runs on hosts with SMT"),
    (
        PolicyBit::MigrationAgent,
        "migration-agent",
        "may have a migration agent",
    ),
    (
        PolicyBit::Debug,
        "debug",
        "THE HOST MAY READ AND WRITE GUEST MEMORY",
    ),
    (PolicyBit::SingleSocket, "single-socket", "stays on one socket"),
    (PolicyBit::CxlAllowed, "cxl", "may use CXL memory"),
    (PolicyBit::Aes256Xts, "aes-256-xts", "requires AES-256-XTS"),
    (
        PolicyBit::RaplDisabled,
        "rapl-disabled",
        "requires RAPL to be off",
    ),
    (
        PolicyBit::CiphertextHiding,
        "ciphertext-hiding",
        "requires ciphertext hiding",
    ),
    (
        PolicyBit::PageSwapDisabled,
        "page-swap-disabled",
        "requires page swapping to be off",
    ),
];

/// Bits with a meaning, beside the ABI version.
const KNOWN: u64 = 0x3ff_ffff;

/// A policy that cannot be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A number with bits that mean nothing or lack bit 17.
    #[error(
        "{0:#x} is not a guest policy: bit 17 must be set and bits above 25 clear; 0x30000 allows SMT and nothing else"
    )]
    Malformed(u64),
    /// The kernel refuses a bit.
    #[error(
        "the host does not offer the policy bit \"{0}\"; leave it out, or update the host's kernel and SEV firmware"
    )]
    NotOffered(&'static str),
    /// KVM never takes this bit.
    #[error("KVM does not support migration agents; leave \"migration-agent\" out of the policy")]
    MigrationAgent,
    /// The firmware is older than the policy demands.
    #[error(
        "the policy demands firmware ABI {wanted_major}.{wanted_minor}, the host has {major}.{minor}; lower it, or update the SEV firmware"
    )]
    #[expect(missing_docs, reason = "the message says it")]
    AbiTooOld {
        wanted_major: u8,
        wanted_minor: u8,
        major: u8,
        minor: u8,
    },
}

impl Default for Policy {
    /// SMT allowed, as most hosts have it on; nothing else.
    fn default() -> Self {
        Self(ALWAYS_ONE | 1 << PolicyBit::Smt as u8)
    }
}

impl Policy {
    /// Takes a policy as the firmware writes it.
    ///
    /// # Errors
    /// Bits that mean nothing, or bit 17 clear.
    pub fn from_bits(bits: u64) -> Result<Self, PolicyError> {
        if bits & !KNOWN != 0 || bits & ALWAYS_ONE == 0 {
            return Err(PolicyError::Malformed(bits));
        }
        Ok(Self(bits))
    }

    /// A policy as some report states it; nothing is checked.
    pub(crate) const fn stated(bits: u64) -> Self {
        Self(bits)
    }

    /// As the firmware writes it.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Bits that mean nothing to this version of cvmm; later firmware may give more by them.
    pub const fn unknown(self) -> u64 {
        self.0 & !KNOWN
    }

    /// True if `bit` is set.
    pub const fn has(self, bit: PolicyBit) -> bool {
        self.0 >> (bit as u8) & 1 != 0
    }

    /// With `bit` set or cleared.
    #[must_use]
    pub const fn set(self, bit: PolicyBit, on: bool) -> Self {
        let mask = 1 << (bit as u8);
        Self(if on { self.0 | mask } else { self.0 & !mask })
    }

    /// Lowest firmware ABI that may run the guest, major and minor.
    pub const fn min_abi(self) -> (u8, u8) {
        let [minor, major, ..] = self.0.to_le_bytes();
        (major, minor)
    }

    /// Checks against what the kernel offers (`KVM_X86_SNP_POLICY_BITS`), so that a refusal has a name.
    ///
    /// # Errors
    /// The first bit that the host does not offer.
    pub fn check(self, offered: u64) -> Result<(), PolicyError> {
        if self.has(PolicyBit::MigrationAgent) {
            return Err(PolicyError::MigrationAgent);
        }
        let refused = BITS
            .iter()
            .find(|(bit, ..)| self.has(*bit) && offered >> (*bit as u8) & 1 == 0);
        refused.map_or(Ok(()), |(_, name, _)| Err(PolicyError::NotOffered(name)))
    }

    /// Checks the demanded ABI against the firmware's.
    ///
    /// # Errors
    /// The firmware is older.
    pub fn check_abi(self, major: u8, minor: u8) -> Result<(), PolicyError> {
        let (wanted_major, wanted_minor) = self.min_abi();
        if (major, minor) < (wanted_major, wanted_minor) {
            return Err(PolicyError::AbiTooOld {
                wanted_major,
                wanted_minor,
                major,
                minor,
            });
        }
        Ok(())
    }

    /// The bits of `self` that give the host or firmware more than `allowed` does: permissions set here and not
    /// there, demands missing here and set there.
    pub fn weaker_than(self, allowed: Self) -> Vec<PolicyBit> {
        let weaker = |bit: PolicyBit| match bit {
            PolicyBit::Smt | PolicyBit::MigrationAgent | PolicyBit::Debug | PolicyBit::CxlAllowed => {
                self.has(bit) && !allowed.has(bit)
            }
            PolicyBit::SingleSocket
            | PolicyBit::Aes256Xts
            | PolicyBit::RaplDisabled
            | PolicyBit::CiphertextHiding
            | PolicyBit::PageSwapDisabled => !self.has(bit) && allowed.has(bit),
        };
        BITS.iter().map(|row| row.0).filter(|bit| weaker(*bit)).collect()
    }
}

impl PolicyBit {
    /// Name in configuration and messages.
    pub fn name(self) -> &'static str {
        BITS.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// The bit with this name.
    pub fn named(name: &str) -> Option<Self> {
        BITS.iter().find(|row| row.1 == name).map(|row| row.0)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.min_abi();
        write!(f, "{:#x}", self.0)?;
        let mut separator = ": ";
        for (_, _, words) in BITS.iter().filter(|(bit, ..)| self.has(*bit)) {
            write!(f, "{separator}{words}")?;
            separator = ", ";
        }
        if (major, minor) != (0, 0) {
            write!(f, "{separator}firmware ABI at least {major}.{minor}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_checked() {
        for bad in [0, 0x10000, 0x400_0000 | ALWAYS_ONE, u64::MAX] {
            assert_eq!(Policy::from_bits(bad), Err(PolicyError::Malformed(bad)));
        }
        assert_eq!(Policy::from_bits(0x30000), Ok(Policy::default()));
    }

    #[test]
    fn words_say_what_the_bits_allow() {
        let policy = Policy::default().set(PolicyBit::Debug, true);
        assert_eq!(
            policy.to_string(),
            "0xb0000: runs on hosts with SMT, THE HOST MAY READ AND WRITE GUEST MEMORY"
        );
        let policy = Policy::from_bits(0x20000 | 0x0137).unwrap();
        assert_eq!(policy.to_string(), "0x20137: firmware ABI at least 1.55");
    }

    #[test]
    fn the_host_is_asked_bit_by_bit() {
        let offered = 0x1b_ffff;
        let policy = Policy::default();
        assert_eq!(policy.check(offered), Ok(()));
        let hiding = policy.set(PolicyBit::CiphertextHiding, true);
        assert_eq!(
            hiding.check(offered),
            Err(PolicyError::NotOffered("ciphertext-hiding"))
        );
        let agent = policy.set(PolicyBit::MigrationAgent, true);
        assert_eq!(agent.check(u64::MAX), Err(PolicyError::MigrationAgent));
    }

    #[test]
    fn older_firmware_is_refused() {
        let policy = Policy::from_bits(0x3_0137).unwrap();
        assert_eq!(policy.check_abi(1, 55), Ok(()));
        assert_eq!(policy.check_abi(2, 0), Ok(()));
        assert!(policy.check_abi(1, 54).is_err());
    }

    #[test]
    fn a_permission_too_many_and_a_demand_too_few_are_both_weaker() {
        let owner = Policy::default()
            .set(PolicyBit::Smt, false)
            .set(PolicyBit::CiphertextHiding, true);
        let host = Policy::default().set(PolicyBit::SingleSocket, true);
        assert_eq!(
            host.weaker_than(owner),
            [PolicyBit::Smt, PolicyBit::CiphertextHiding]
        );
        assert_eq!(owner.weaker_than(owner), []);
    }

    #[test]
    fn every_bit_has_one_name() {
        for (bit, name, _) in BITS {
            assert_eq!((PolicyBit::named(name), bit.name()), (Some(bit), name));
        }
        assert_eq!(PolicyBit::named("turbo"), None);
    }
}
