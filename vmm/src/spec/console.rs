//! The console: what would make opening it fail is found before anything is created.

use devices::console::ConsoleSpec;

use super::SpecError;
use super::file::describe;
use super::socket;
use crate::config::Console;

/// Looks at the path without creating anything.
pub(super) fn check(console: &Console) -> Result<(), SpecError> {
    match console {
        Console::Stdio | Console::Pty | Console::None => Ok(()),
        Console::Socket(path) => Ok(socket::check_free("console", path)?),
        Console::File(path) => match path.metadata() {
            Ok(m) if m.is_dir() || describe(m.file_type()) == "socket" => Err(SpecError::ConsoleFile {
                path: path.clone(),
                found: describe(m.file_type()),
            }),
            _ => Ok(()),
        },
    }
}

/// In the words of the device.
pub(super) fn device_spec(console: Console) -> ConsoleSpec {
    match console {
        Console::Stdio => ConsoleSpec::Stdio,
        Console::Pty => ConsoleSpec::Pty,
        Console::File(path) => ConsoleSpec::File(path),
        Console::Socket(path) => ConsoleSpec::Socket(path),
        Console::None => ConsoleSpec::Null,
    }
}
