//! The ID block: the owner's signed statement of what may be launched. Firmware refuses any other launch, and every
//! report names the keys (SEV-SNP Firmware ABI, revision 1.58, "ID Block" and "ID Authentication Information").

use crate::bytes::{array, le32, le64, put};
use crate::measure::{Measurement, PAGE};
use crate::p384::{KEY_BYTES, KeyError, PublicKey, SIGNATURE_BYTES, Signature, SigningKey};
use crate::policy::{Policy, PolicyError};

/// Length of an ID block.
pub const ID_BLOCK_BYTES: usize = 96;
const VERSION: u32 = 1;
/// ECDSA P-384 with SHA-384.
const ALGORITHM: u32 = 1;

const BLOCK_SIGNATURE: usize = 0x40;
const ID_KEY: usize = 0x240;
const ID_KEY_SIGNATURE: usize = 0x680;
const AUTHOR_KEY: usize = 0x880;

/// Reserved bytes, from and up to.
const RESERVED: [(usize, usize); 3] = [(8, 0x40), (0x644, 0x680), (0xc84, 0x1000)];
/// The same where no author key is named.
const RESERVED_WITHOUT_AUTHOR: [(usize, usize); 2] = [(8, 0x40), (0x644, 0x1000)];

/// An ID block that would be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum IdBlockError {
    #[error("an ID block has 96 bytes, this one has {bytes}")]
    BlockLength { bytes: usize },
    #[error("an ID authentication structure has 4096 bytes, this one has {bytes}")]
    AuthLength { bytes: usize },
    #[error("ID block version {version}; only version 1 is known")]
    Version { version: u32 },
    #[error("the ID block's policy is none")]
    Policy(#[from] PolicyError),
    #[error(
        "the ID block is for launch digest {block}, but this launch has {launch}; \
         sign a new block with cvmm id-block and the same arguments"
    )]
    OtherDigest { block: Measurement, launch: Measurement },
    #[error(
        "the ID block is for policy {block:#x}, but this launch has {launch:#x}; give the same --policy to both"
    )]
    OtherPolicy { block: u64, launch: u64 },
    #[error("the ID authentication structure holds no valid {what}; make it again with cvmm id-block")]
    Malformed { what: &'static str },
    #[error("the {what} does not verify; make block and authentication together with cvmm id-block")]
    BadSignature { what: &'static str },
    #[error("signing the ID block")]
    Signing(#[source] KeyError),
}

/// What may be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// The launch digest.
    pub measurement: Measurement,
    /// Free, in reports.
    pub family_id: [u8; 16],
    /// Free, in reports.
    pub image_id: [u8; 16],
    /// Security version of the guest, in reports.
    pub guest_svn: u32,
    /// The launch policy.
    pub policy: Policy,
}

impl IdBlock {
    /// As firmware and signature see it.
    pub fn to_bytes(&self) -> [u8; ID_BLOCK_BYTES] {
        let mut out = [0; ID_BLOCK_BYTES];
        put(&mut out, 0, &self.measurement.0);
        put(&mut out, 0x30, &self.family_id);
        put(&mut out, 0x40, &self.image_id);
        put(&mut out, 0x50, &VERSION.to_le_bytes());
        put(&mut out, 0x54, &self.guest_svn.to_le_bytes());
        put(&mut out, 0x58, &self.policy.bits().to_le_bytes());
        out
    }

    /// Reads a block.
    ///
    /// # Errors
    /// Another length or version, or no policy.
    pub fn parse(bytes: &[u8]) -> Result<Self, IdBlockError> {
        let wrong = IdBlockError::BlockLength { bytes: bytes.len() };
        if bytes.len() != ID_BLOCK_BYTES {
            return Err(wrong);
        }
        let version = le32(bytes, 0x50).ok_or(wrong)?;
        if version != VERSION {
            return Err(IdBlockError::Version { version });
        }
        Ok(Self {
            measurement: Measurement(array(bytes, 0).ok_or(wrong)?),
            family_id: array(bytes, 0x30).ok_or(wrong)?,
            image_id: array(bytes, 0x40).ok_or(wrong)?,
            guest_svn: le32(bytes, 0x54).ok_or(wrong)?,
            policy: Policy::from_bits(le64(bytes, 0x58).ok_or(wrong)?)?,
        })
    }

    /// Signs the block, and the key that does with `author` if there is one.
    ///
    /// # Errors
    /// A key that does not sign.
    pub fn sign(
        &self,
        id_key: &SigningKey,
        author: Option<&SigningKey>,
    ) -> Result<Box<IdAuth>, IdBlockError> {
        let mut page = [0; PAGE];
        let key = id_key.public().to_amd();
        let signature = id_key.sign(&self.to_bytes()).map_err(IdBlockError::Signing)?;
        put(&mut page, 0, &ALGORITHM.to_le_bytes());
        put(&mut page, BLOCK_SIGNATURE, &signature.to_amd());
        put(&mut page, ID_KEY, &key);
        if let Some(author) = author {
            let signature = author.sign(&key).map_err(IdBlockError::Signing)?;
            put(&mut page, 4, &ALGORITHM.to_le_bytes());
            put(&mut page, ID_KEY_SIGNATURE, &signature.to_amd());
            put(&mut page, AUTHOR_KEY, &author.public().to_amd());
        }
        Ok(Box::new(IdAuth(page)))
    }

    /// Compares with the launch that it is for.
    ///
    /// # Errors
    /// Another digest or policy: firmware would answer BAD_MEASUREMENT or POLICY_FAILURE.
    pub fn check(&self, launch: &Measurement, policy: Policy) -> Result<(), IdBlockError> {
        if self.policy != policy {
            return Err(IdBlockError::OtherPolicy {
                block: self.policy.bits(),
                launch: policy.bits(),
            });
        }
        if self.measurement != *launch {
            return Err(IdBlockError::OtherDigest {
                block: self.measurement,
                launch: *launch,
            });
        }
        Ok(())
    }
}

/// Keys and signatures of an ID block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdAuth([u8; PAGE]);

impl IdAuth {
    /// Reads the structure; [`IdAuth::check`] looks inside.
    ///
    /// # Errors
    /// Another length.
    pub fn parse(bytes: &[u8]) -> Result<Box<Self>, IdBlockError> {
        let page = bytes
            .try_into()
            .map_err(|_| IdBlockError::AuthLength { bytes: bytes.len() })?;
        Ok(Box::new(Self(page)))
    }

    /// As firmware sees it.
    pub fn bytes(&self) -> &[u8; PAGE] {
        &self.0
    }

    /// True if an author key vouches for the ID key.
    pub fn has_author_key(&self) -> bool {
        le32(&self.0, 4) == Some(ALGORITHM)
    }

    fn part(&self, at: usize, len: usize) -> &[u8] {
        self.0.get(at..).and_then(|b| b.get(..len)).unwrap_or_default()
    }

    fn key(&self, at: usize, what: &'static str) -> Result<PublicKey, IdBlockError> {
        PublicKey::from_amd(self.part(at, KEY_BYTES)).ok_or(IdBlockError::Malformed { what })
    }

    fn signature(&self, at: usize, what: &'static str) -> Result<Signature, IdBlockError> {
        Signature::from_amd(self.part(at, SIGNATURE_BYTES)).ok_or(IdBlockError::Malformed { what })
    }

    /// The key that signed the block.
    ///
    /// # Errors
    /// No P-384 key.
    pub fn id_key(&self) -> Result<PublicKey, IdBlockError> {
        self.key(ID_KEY, "ID key")
    }

    /// The key that vouches for the ID key.
    ///
    /// # Errors
    /// No P-384 key.
    pub fn author_key(&self) -> Result<Option<PublicKey>, IdBlockError> {
        self.has_author_key()
            .then(|| self.key(AUTHOR_KEY, "author key"))
            .transpose()
    }

    /// Checks the signatures as firmware will, so that a mistake shows before the launch.
    ///
    /// # Errors
    /// What is malformed or does not verify.
    pub fn check(&self, block: &IdBlock) -> Result<(), IdBlockError> {
        if le32(&self.0, 0) != Some(ALGORITHM) || !matches!(le32(&self.0, 4), Some(0 | ALGORITHM)) {
            return Err(IdBlockError::Malformed { what: "algorithm" });
        }
        // Firmware wants the rest zero, and so a forgotten algorithm is no way around the author key.
        let unused = if self.has_author_key() {
            &RESERVED[..]
        } else {
            &RESERVED_WITHOUT_AUTHOR[..]
        };
        let nonzero =
            |(from, to): &(usize, usize)| self.part(*from, to.saturating_sub(*from)).iter().any(|b| *b != 0);
        if unused.iter().any(nonzero) {
            return Err(IdBlockError::Malformed {
                what: "reserved field",
            });
        }
        let (id_key, signature) = (
            self.id_key()?,
            self.signature(BLOCK_SIGNATURE, "block signature")?,
        );
        if !id_key.verifies(&block.to_bytes(), &signature) {
            return Err(IdBlockError::BadSignature {
                what: "ID block's signature",
            });
        }
        if let Some(author) = self.author_key()? {
            let signature = self.signature(ID_KEY_SIGNATURE, "ID key signature")?;
            if !author.verifies(&id_key.to_amd(), &signature) {
                return Err(IdBlockError::BadSignature {
                    what: "ID key's signature by the author key",
                });
            }
        }
        Ok(())
    }
}
