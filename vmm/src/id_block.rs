//! `cvmm id-block`: the owner's signed statement of the one launch that firmware may finish.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use snp::id_block::{IdBlock, IdBlockError};
use snp::measure::Measurement;
use snp::p384::{KeyError, SigningKey};

use crate::cli;
use crate::ending::ExitClass;
use crate::hex::padded;
use crate::measure::{Launch, Subject, Unpredictable, say};
use crate::spec::file::{FileError, InputFile};
use crate::spec::output::{OutputError, apart};
use crate::spec::snp as options;

#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "ID block")]
#[expect(
    missing_docs,
    reason = "clap would take the text for the command's description"
)]
pub struct Args {
    /// Private P-384 key that signs the block: PKCS#8 or SEC1, PEM or DER
    #[arg(long, value_name = "PATH")]
    pub id_key: PathBuf,
    /// Private P-384 key that vouches for the ID key
    #[arg(long, value_name = "PATH")]
    pub author_key: Option<PathBuf>,
    /// Launch digest to approve [default: that of the guest which the flags describe]
    #[arg(long, value_name = "HEX")]
    pub digest: Option<Measurement>,
    /// Family of the guest, free for the owner's use: up to 16 bytes, the rest zeros
    #[arg(long, value_name = "HEX", value_parser = padded::<16>)]
    pub family_id: Option<[u8; 16]>,
    /// Image of the guest, free for the owner's use: up to 16 bytes, the rest zeros
    #[arg(long, value_name = "HEX", value_parser = padded::<16>)]
    pub image_id: Option<[u8; 16]>,
    /// Security version of the guest
    #[arg(long, value_name = "N", default_value = "0")]
    pub svn: u32,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "clap would take the text for the command's description"
    )]
    pub subject: Subject,
}

/// An ID block that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Unsigned {
    /// The launch.
    #[error(transparent)]
    Launch(#[from] Unpredictable),
    /// The files to write are not named.
    #[error("no place for the result; add --id-block PATH and --id-auth PATH, which cvmm run takes too")]
    NoPlace,
    /// A result would go over another file.
    #[error(transparent)]
    SamePlace(#[from] OutputError),
    /// A file for a result cannot be made.
    #[error("{}: {cause}; give a file in a directory that exists and that you may write to", path.display())]
    Closed {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// A key file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key.
    #[error("{role} {}: {cause}", path.display())]
    Key {
        /// Which key.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: KeyError,
    },
    /// Signing.
    #[error(transparent)]
    Block(#[from] IdBlockError),
    /// A result cannot be written.
    #[error("writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
}

impl Unsigned {
    /// The class that decides cvmm's exit code.
    pub fn class(&self) -> ExitClass {
        match self {
            Self::Launch(e) => e.class(),
            Self::Write { .. } => ExitClass::HostFailed,
            Self::NoPlace
            | Self::SamePlace(_)
            | Self::Closed { .. }
            | Self::File(_)
            | Self::Key { .. }
            | Self::Block(_) => ExitClass::Usage,
        }
    }
}

/// Signs, writes the two files, and prints what `cvmm report` can compare.
///
/// # Errors
/// See [`Unsigned`].
pub fn run(args: &Args) -> Result<ExitClass, Unsigned> {
    let config =
        cli::merge(args.subject.config.clone(), args.subject.file.as_deref()).map_err(Unpredictable::from)?;
    let (Some(block_path), Some(auth_path)) = (&config.snp.id_block, &config.snp.id_auth) else {
        return Err(Unsigned::NoPlace);
    };
    let inputs = [
        ("--id-key", Some(args.id_key.as_path())),
        ("--author-key", args.author_key.as_deref()),
        ("--config", args.subject.file.as_deref()),
        ("--firmware", args.subject.ovmf.firmware.as_deref()),
        ("--kernel", config.boot.kernel.as_deref()),
        ("--initrd", config.boot.initrd.as_deref()),
    ];
    apart("id-block", block_path, &inputs)?;
    apart("id-auth", auth_path, &inputs)?;
    apart("id-auth", auth_path, &[("--id-block", Some(block_path))])?;
    let id_key = key("id-key", &args.id_key)?;
    let author = args.author_key.as_deref().map(|path| key("author-key", path));
    let author = author.transpose()?;
    let policy = options::policy(&config.snp).map_err(Unpredictable::from)?;
    let measurement = match args.digest {
        Some(digest) => digest,
        None => Launch::plan(&args.subject, config.clone())?
            .digest()
            .map_err(Unpredictable::from)?,
    };
    let block = IdBlock {
        measurement,
        family_id: args.family_id.unwrap_or_default(),
        image_id: args.image_id.unwrap_or_default(),
        guest_svn: args.svn,
        policy,
    };
    let auth = block.sign(&id_key, author.as_ref())?;
    write(block_path, &block.to_bytes())?;
    write(auth_path, auth.bytes()).inspect_err(|_| discard(block_path))?;
    let mut text = format!("measurement       {measurement}\n");
    let _ = writeln!(text, "policy            {policy}");
    let _ = writeln!(text, "id-key-digest     {}", digest(&id_key));
    if let Some(author) = &author {
        let _ = writeln!(text, "author-key-digest {}", digest(author));
    }
    say(&text).map_err(Unpredictable::from)?;
    Ok(ExitClass::Success)
}

/// As reports state it.
fn digest(key: &SigningKey) -> Measurement {
    Measurement(key.public().digest())
}

/// Longer than any key file.
const KEY_MAX: usize = 64 << 10;

fn key(role: &'static str, path: &Path) -> Result<SigningKey, Unsigned> {
    let file = InputFile::open(role, path)?.read_start(role, KEY_MAX)?;
    SigningKey::parse(&file).map_err(|cause| Unsigned::Key {
        role,
        path: path.into(),
        cause,
    })
}

/// Writes a whole file, or leaves none.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Unsigned> {
    let mut file = File::create(path).map_err(|cause| Unsigned::Closed {
        path: path.into(),
        cause,
    })?;
    file.write_all(bytes).map_err(|cause| {
        discard(path);
        Unsigned::Write {
            path: path.into(),
            cause,
        }
    })
}

/// A block is of no use without its signatures. What is no file of ours stays: a device, a FIFO.
fn discard(path: &Path) {
    if path.is_file() {
        let _ = fs::remove_file(path);
    }
}
