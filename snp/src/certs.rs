//! Certificates that the host hands to its guests with their reports: a table of GUIDs, then DER (GHCB
//! specification, revision 2.04, "SNP Extended Guest Request", "Certificate table").

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use x509_cert::der::Document;

use crate::bytes::{array, le32, put};
use crate::exit::CertAnswer;
use crate::measure::PAGE;

/// GUID in the order of its printed digits' groups, as the table stores it.
type Name = [u8; 16];

/// GUID, `u32` offset, `u32` length.
const ENTRY: usize = 24;
/// More than any set of certificates needs, and what a guest of ours could take.
const MAX_BYTES: u64 = 128 << 10;

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertKind {
    /// Versioned chip endorsement key.
    Vcek,
    /// Versioned loaded endorsement key.
    Vlek,
    /// Intermediate key (for a VLEK: ASVK).
    Ask,
    /// AMD's root key.
    Ark,
    /// Revocation list.
    Crl,
}

const KINDS: [(CertKind, Name); 5] = [
    (CertKind::Vcek, name(0x63da_758d_e664_4564_adc5_f4b9_3be8_accd)),
    (CertKind::Vlek, name(0xa807_4bc2_a25a_483e_aae6_39c0_45a0_b8a1)),
    (CertKind::Ask, name(0x4ab7_b379_bbac_4fe4_a02f_05ae_f327_c782)),
    (CertKind::Ark, name(0xc0b4_06a4_a803_4952_9743_3fb6_014c_d0ae)),
    (CertKind::Crl, name(0x92f8_1bc3_5811_4d3d_97ff_d19f_88dc_67ea)),
];

/// The first three groups of a GUID are stored little-endian (RFC 4122 through EFI).
const fn name(printed: u128) -> Name {
    let [a, b, c, d, e, f, g, h, rest @ ..] = printed.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// A table that cannot be made or read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum CertError {
    #[error("not a certificate in PEM or DER form")]
    NotACertificate,
    #[error("the certificate table is cut off or damaged: {what}; make it again")]
    Damaged { what: &'static str },
    #[error("the certificate table is larger than 128 KiB")]
    TooLarge,
    #[error("reading the certificate table {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Certificates by kind, DER.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertTable {
    certs: Vec<(Name, Vec<u8>)>,
}

impl CertTable {
    /// Adds a certificate in PEM or DER form.
    ///
    /// # Errors
    /// Something else.
    pub fn add(&mut self, kind: CertKind, file: &[u8]) -> Result<(), CertError> {
        let der = der(file).ok_or(CertError::NotACertificate)?;
        let name = KINDS
            .iter()
            .find(|k| k.0 == kind)
            .map(|k| k.1)
            .unwrap_or_default();
        self.certs.push((name, der));
        Ok(())
    }

    /// The first certificate of `kind`.
    pub fn get(&self, kind: CertKind) -> Option<&[u8]> {
        let name = KINDS.iter().find(|k| k.0 == kind)?.1;
        self.certs.iter().find(|c| c.0 == name).map(|c| c.1.as_slice())
    }

    /// The table as a guest gets it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let header = self.certs.len().saturating_add(1).saturating_mul(ENTRY);
        let mut out = vec![0; header];
        for (index, (name, der)) in self.certs.iter().enumerate() {
            let at = index.saturating_mul(ENTRY);
            let (offset, len) = (out.len(), der.len());
            put(&mut out, at, name);
            put(
                &mut out,
                at.saturating_add(16),
                &u32::try_from(offset).unwrap_or(0).to_le_bytes(),
            );
            put(
                &mut out,
                at.saturating_add(20),
                &u32::try_from(len).unwrap_or(0).to_le_bytes(),
            );
            out.extend_from_slice(der);
        }
        out
    }

    /// Reads a table, from a file or from a guest (`auxblob`).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, CertError> {
        let damaged = |what| CertError::Damaged { what };
        let mut certs = Vec::new();
        let mut left = bytes.len();
        for entry in bytes.chunks(ENTRY) {
            let name: Name = array(entry, 0).ok_or(damaged("it does not end with an empty entry"))?;
            let fields = le32(entry, 16).zip(le32(entry, 20));
            let (offset, len) = fields.ok_or(damaged("it does not end with an empty entry"))?;
            if name == [0; 16] {
                return Ok(Self { certs });
            }
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let der = bytes
                .get(start..)
                .and_then(|b| b.get(..usize::try_from(len).ok()?));
            let der = der.ok_or(damaged("an entry points outside"))?;
            let rest = left.checked_sub(der.len());
            left = rest.ok_or(damaged("its entries share their bytes"))?;
            certs.push((name, der.to_vec()));
        }
        Err(damaged("it does not end with an empty entry"))
    }
}

/// DER of a PEM or DER file.
pub(crate) fn der(file: &[u8]) -> Option<Vec<u8>> {
    match std::str::from_utf8(file) {
        Ok(text) if text.trim_start().starts_with("-----BEGIN") => Document::from_pem(text.trim_start())
            .ok()
            .map(|(_, document)| document.as_bytes().to_vec()),
        _ => Document::try_from(file)
            .ok()
            .map(|document| document.as_bytes().to_vec()),
    }
}

/// The file from which requests are answered. It is read anew for each request, so replacing it needs no restart;
/// whoever replaces it together with the firmware holds an exclusive lock (`flock`) meanwhile.
#[derive(Clone, Debug)]
pub struct CertFile {
    path: PathBuf,
}

/// An answer, and what keeps it true.
#[derive(Debug)]
pub struct Served {
    /// For KVM.
    pub answer: CertAnswer,
    /// Held until firmware has made the report: drop it after the next `KVM_RUN` has returned.
    pub lock: Option<File>,
}

impl Served {
    fn new(answer: CertAnswer) -> Self {
        Self { answer, lock: None }
    }
}

impl CertFile {
    /// A table at `path`, which must be good now.
    ///
    /// # Errors
    /// Missing, too large or damaged.
    pub fn new(path: &Path) -> Result<Self, CertError> {
        let file = Self {
            path: path.to_owned(),
        };
        let read = file.open().and_then(|mut f| read(&mut f));
        let bytes = read.map_err(|source| CertError::Read {
            path: path.to_owned(),
            source,
        })?;
        CertTable::parse(&bytes.ok_or(CertError::TooLarge)?)?;
        Ok(file)
    }

    /// A FIFO in the file's place must not hold up a vCPU.
    fn open(&self) -> io::Result<File> {
        let mut how = File::options();
        how.read(true).custom_flags(libc::O_NONBLOCK).open(&self.path)
    }

    /// Answers a guest that has `pages` pages; `write` puts the table into its shared memory, or refuses.
    pub fn serve(&self, pages: u64, write: impl FnOnce(&[u8]) -> bool) -> Served {
        let Ok(mut file) = self.open() else {
            return Served::new(CertAnswer::Failed);
        };
        match file.try_lock_shared() {
            Err(std::fs::TryLockError::WouldBlock) => return Served::new(CertAnswer::Busy),
            Err(std::fs::TryLockError::Error(_)) => return Served::new(CertAnswer::Failed),
            Ok(()) => {}
        }
        let Ok(Some(table)) = read(&mut file) else {
            return Served::new(CertAnswer::Failed);
        };
        if CertTable::parse(&table).is_err() {
            return Served::new(CertAnswer::Failed);
        }
        let needed = (table.len() as u64).div_ceil(PAGE as u64);
        if needed > pages {
            return Served::new(CertAnswer::TooSmall { pages: needed });
        }
        if !write(&table) {
            return Served::new(CertAnswer::Failed);
        }
        Served {
            answer: CertAnswer::Written,
            lock: Some(file),
        }
    }
}

/// The whole file, or `None` if it is too large.
fn read(file: &mut File) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= MAX_BYTES).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal DER value: SEQUENCE of `len` zero bytes, below 128.
    fn blob(len: u8) -> Vec<u8> {
        let mut der = vec![0x30, len];
        der.resize(usize::from(len).saturating_add(2), 0);
        der
    }

    fn table() -> CertTable {
        let mut table = CertTable::default();
        table.add(CertKind::Vcek, &blob(100)).unwrap();
        table.add(CertKind::Ask, &blob(50)).unwrap();
        table
    }

    #[test]
    fn tables_are_read_as_they_are_written() {
        let bytes = table().to_bytes();
        assert_eq!(bytes.len(), 3 * 24 + 102 + 52);
        assert_eq!(bytes[..4], [0x8d, 0x75, 0xda, 0x63], "GUIDs are mixed-endian");
        let back = CertTable::parse(&bytes).unwrap();
        assert_eq!(back, table());
        assert_eq!(back.get(CertKind::Ask), Some(blob(50).as_slice()));
        assert_eq!(back.get(CertKind::Ark), None);
        assert_eq!(CertTable::parse(&[0; 24]).unwrap(), CertTable::default());
    }

    #[test]
    fn every_truncation_of_a_table_is_noticed() {
        let bytes = table().to_bytes();
        for len in 0..bytes.len() {
            assert!(CertTable::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    /// Or a table of 256 KiB that a guest presents would take 700 MiB of whoever verifies it.
    #[test]
    fn entries_that_share_their_bytes_are_no_table() {
        let mut bytes = table().to_bytes();
        let (offset, len) = (72_u32, u32::try_from(bytes.len() - 72).unwrap());
        let mut entry = [1; 24];
        entry[16..20].copy_from_slice(&offset.to_le_bytes());
        entry[20..].copy_from_slice(&len.to_le_bytes());
        bytes[..48].copy_from_slice(&entry.repeat(2));
        assert!(matches!(CertTable::parse(&bytes), Err(CertError::Damaged { .. })));
    }

    #[test]
    fn flipped_tables_are_survived() {
        let mut bytes = table().to_bytes();
        for at in 0..72 {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                let _ = CertTable::parse(&bytes);
                bytes[at] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn only_der_and_pem_are_taken() {
        let mut table = CertTable::default();
        for bad in [
            &b""[..],
            b"hello",
            b"-----BEGIN CERTIFICATE-----\nxx",
            &[0x30, 0x10, 0],
        ] {
            assert!(table.add(CertKind::Ark, bad).is_err(), "{bad:?}");
        }
        let pem = "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n";
        table.add(CertKind::Ark, pem.as_bytes()).unwrap();
        assert_eq!(table.get(CertKind::Ark), Some(&[0x30, 3, 2, 1, 1][..]));
    }

    #[test]
    fn requests_are_served_from_the_file_as_it_is_now() {
        let path = std::env::temp_dir().join(format!("cvmm-certs-{}", std::process::id()));
        assert!(matches!(CertFile::new(&path), Err(CertError::Read { .. })));
        std::fs::write(&path, &table().to_bytes()[..100]).unwrap();
        assert!(matches!(CertFile::new(&path), Err(CertError::Damaged { .. })));
        std::fs::write(&path, table().to_bytes()).unwrap();
        let file = CertFile::new(&path).unwrap();

        let mut written = Vec::new();
        let served = file.serve(1, |bytes| {
            written = bytes.to_vec();
            true
        });
        assert_eq!(
            (served.answer, &written),
            (CertAnswer::Written, &table().to_bytes())
        );
        let updater = File::open(&path).unwrap();
        assert!(
            updater.try_lock().is_err(),
            "the lock is held until the report is made"
        );
        drop(served);
        updater.lock().unwrap();
        assert_eq!(file.serve(1, |_| true).answer, CertAnswer::Busy);
        updater.unlock().unwrap();

        assert_eq!(file.serve(0, |_| true).answer, CertAnswer::TooSmall { pages: 1 });
        assert_eq!(
            file.serve(1, |_| false).answer,
            CertAnswer::Failed,
            "private or no memory"
        );
        let mut padded = table().to_bytes();
        padded.resize(128 << 10, 0);
        std::fs::write(&path, &padded).unwrap();
        assert_eq!(file.serve(32, |_| true).answer, CertAnswer::Written);
        padded.push(0);
        std::fs::write(&path, &padded).unwrap();
        assert_eq!(file.serve(99, |_| true).answer, CertAnswer::Failed);
        assert!(matches!(CertFile::new(&path), Err(CertError::TooLarge)));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.serve(1, |_| true).answer, CertAnswer::Failed);
    }

    #[test]
    fn a_fifo_in_place_of_the_file_is_refused_without_waiting() {
        let path = std::env::temp_dir().join(format!("cvmm-certs-fifo-{}", std::process::id()));
        std::fs::write(&path, table().to_bytes()).unwrap();
        let file = CertFile::new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        assert!(CertFile::new(&path).is_err());
        assert_eq!(file.serve(1, |_| true).answer, CertAnswer::Failed);
        std::fs::remove_file(&path).unwrap();
    }
}
