//! What a quote states about its trust domain (Intel TDX DCAP Quoting Library API, "A.3.2 TD Quote Body").

use std::fmt;

use arch::measurement::Measurement;

use super::{BodyKind, Quote};

/// A measurement of 48 bytes, SHA-384 or the owner's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// The initial image.
    Mrtd,
    /// Measured at run time: by convention firmware configuration, which cvmm's shim leaves alone.
    Rtmr0,
    /// Measured at run time: the kernel.
    Rtmr1,
    /// Measured at run time: what the kernel is given.
    Rtmr2,
    /// Measured at run time: the guest's own.
    Rtmr3,
    /// The owner's: configuration.
    MrConfigId,
    /// The owner's: identity.
    MrOwner,
    /// The owner's: configuration of the owner's.
    MrOwnerConfig,
    /// The TDX module.
    MrSeam,
    /// The TDX module's signer; zeros for Intel.
    MrSignerSeam,
}

impl Register {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 10] = [
        Self::Mrtd,
        Self::Rtmr0,
        Self::Rtmr1,
        Self::Rtmr2,
        Self::Rtmr3,
        Self::MrConfigId,
        Self::MrOwner,
        Self::MrOwnerConfig,
        Self::MrSeam,
        Self::MrSignerSeam,
    ];

    /// Name, as options and JSON write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mrtd => "mrtd",
            Self::Rtmr0 => "rtmr0",
            Self::Rtmr1 => "rtmr1",
            Self::Rtmr2 => "rtmr2",
            Self::Rtmr3 => "rtmr3",
            Self::MrConfigId => "mrconfigid",
            Self::MrOwner => "mrowner",
            Self::MrOwnerConfig => "mrownerconfig",
            Self::MrSeam => "mrseam",
            Self::MrSignerSeam => "mrsignerseam",
        }
    }

    fn offset(self) -> usize {
        match self {
            Self::MrSeam => 16,
            Self::MrSignerSeam => 64,
            Self::Mrtd => 136,
            Self::MrConfigId => 184,
            Self::MrOwner => 232,
            Self::MrOwnerConfig => 280,
            Self::Rtmr0 => 328,
            Self::Rtmr1 => 376,
            Self::Rtmr2 => 424,
            Self::Rtmr3 => 472,
        }
    }
}

/// Attributes of a trust domain (Intel TDX module ABI, "ATTRIBUTES").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes(pub u64);

/// Bits that give the host a view into the TD: debugging and three ways of profiling.
const UNDER_DEBUG: u64 = 0xff;

/// Bit, and what it means.
const ATTRIBUTES: [(u32, &str); 9] = [
    (16, "single-step defence"),
    (17, "extended service TD"),
    (27, "LASS"),
    (28, "access to pages not accepted ends it"),
    (29, "may migrate"),
    (30, "supervisor keys"),
    (31, "Key Locker"),
    (62, "provisions devices"),
    (63, "performance counters"),
];

impl Attributes {
    /// True if the host may read or profile the TD: nothing protects it.
    pub fn debug(self) -> bool {
        self.0 & UNDER_DEBUG != 0
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let debug = if self.debug() {
            "the host may debug it"
        } else {
            "no debugging"
        };
        write!(f, "{:#x}: {debug}", self.0)?;
        let set = ATTRIBUTES.iter().filter(|(bit, _)| self.0 >> bit & 1 == 1);
        set.into_iter().try_for_each(|(_, words)| write!(f, ", {words}"))
    }
}

impl Quote {
    /// A measurement.
    pub fn register(&self, register: Register) -> Measurement {
        Measurement(self.field(register.offset()))
    }

    /// What the guest put in, 64 bytes.
    pub fn report_data(&self) -> [u8; 64] {
        self.field(520)
    }

    /// The TD's attributes.
    pub fn attributes(&self) -> Attributes {
        Attributes(u64::from_le_bytes(self.field(120)))
    }

    /// Extended CPU state that the TD may use.
    pub fn xfam(&self) -> u64 {
        u64::from_le_bytes(self.field(128))
    }

    /// Security versions of the TDX module and the firmware below it when the TD began.
    pub fn tee_tcb_svn(&self) -> [u8; 16] {
        self.field(0)
    }

    /// The same now, and the hash of the service TD, where the body has them.
    pub fn td15(&self) -> Option<([u8; 16], [u8; 48])> {
        match self.kind {
            BodyKind::Td10 => None,
            BodyKind::Td15 | BodyKind::Td15Extended => Some((self.field(584), self.field(600))),
        }
    }
}
