//! Raw mode on the user's terminal, and the way back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};

/// The terminal that is raw now, and the mode to go back to.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Puts the terminal back as it was, if a console changed it. For every way out of the process that runs no
/// destructors: it takes no lock that it would have to wait for, so a panic hook may call it, and does nothing
/// the second time.
pub fn restore_terminal() {
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some((terminal, mode)) = saved.take()
    {
        let _ = tcsetattr(terminal, OptionalActions::Now, &mode);
    }
}

/// A terminal in raw mode until dropped. There is one at a time.
#[derive(Debug)]
pub(super) struct RawMode(());

impl RawMode {
    /// Switches `terminal` to raw mode, until the process panics at most. Output processing stays on, so that
    /// our own log lines look right on the same terminal.
    pub(super) fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let old = tcgetattr(terminal)?;
        let own = fcntl_dupfd_cloexec(terminal, 3)?;
        let mut raw = old.clone();
        raw.make_raw();
        let post = OutputModes::OPOST | OutputModes::ONLCR;
        raw.output_modes |= old.output_modes & post;
        if let Ok(mut saved) = SAVED.lock() {
            saved.get_or_insert((own, old));
        }
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore_terminal();
                previous(info);
            }));
        });
        let guard = Self(());
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// True if standard input is a terminal and ours. A background job that touches it would be stopped.
pub(super) fn owns_terminal() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

/// Columns and rows; `None` if `fd` is no terminal or does not know.
pub(super) fn size(fd: impl AsFd) -> Option<(u16, u16)> {
    let size = tcgetwinsize(fd).ok()?;
    (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
}
