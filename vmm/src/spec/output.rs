//! Files that are written must be none of those that are read, or that belong to the guest: opening them cuts them off.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::{Config, Console, EventSink};

/// A file to write that is another one already.
#[derive(Debug, thiserror::Error)]
#[error("{output} {}: the same file as {other}, which it would destroy; give another one", path.display())]
pub struct OutputError {
    output: &'static str,
    path: PathBuf,
    other: &'static str,
}

/// Looks at what `cvmm run` would write, before any of it is opened.
///
/// # Errors
/// Events or the console's output would go into a file of another purpose.
pub fn check(config: &Config, file: Option<&Path>) -> Result<(), OutputError> {
    let disks = config
        .devices
        .disks
        .iter()
        .map(|disk| ("--disk", Some(disk.path.as_path())));
    let inputs = [
        ("--config", file),
        ("--kernel", config.boot.kernel.as_deref()),
        ("--initrd", config.boot.initrd.as_deref()),
        ("--id-block", config.snp.id_block.as_deref()),
        ("--id-auth", config.snp.id_auth.as_deref()),
        ("--certs", config.snp.certs.as_deref()),
    ];
    let inputs: Vec<_> = inputs.into_iter().chain(disks).collect();
    let events = match &config.notify.events {
        Some(EventSink::Path(path)) => Some(path.as_path()),
        _ => None,
    };
    if let Some(path) = events {
        apart("events", path, &inputs)?;
    }
    if let Some(Console::File(path)) = &config.devices.console {
        apart("console", path, &inputs)?;
        apart("console", path, &[("--events", events)])?;
    }
    Ok(())
}

/// Checks that the file at `path`, which option `output` names, is none of `others`, each with its option.
///
/// # Errors
/// It is one of them.
pub fn apart(
    output: &'static str,
    path: &Path,
    others: &[(&'static str, Option<&Path>)],
) -> Result<(), OutputError> {
    let same = others
        .iter()
        .find(|(_, other)| other.is_some_and(|other| is_same(path, other)));
    match same {
        Some((other, _)) => Err(OutputError {
            output,
            path: path.into(),
            other,
        }),
        None => Ok(()),
    }
}

/// True if both paths lead to one file with content, or will. Terminals, /dev/null and FIFOs may be shared.
fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(a), Ok(b)) => {
            let keeps = a.is_file() || a.file_type().is_block_device();
            keeps && (a.dev(), a.ino()) == (b.dev(), b.ino())
        }
        _ => one == other,
    }
}
