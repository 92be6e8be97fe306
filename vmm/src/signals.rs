//! SIGTERM and SIGINT as events: the first asks the guest to power off, the second ends the machine at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use arch::host::SignalFd;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Press the guest's power button; the number of the signal.
    PowerOff(u32),
    /// End now; the number of the signal.
    End(u32),
}

/// The process's stop signals. Poll its descriptor for reading, then take them with [`take`](Self::take).
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    asked: bool,
}

impl Signals {
    /// Takes SIGTERM and SIGINT away from their default action. Call it before starting any thread.
    ///
    /// # Errors
    /// The kernel's.
    pub fn catch() -> io::Result<Self> {
        let fd = SignalFd::block(&[libc::SIGTERM, libc::SIGINT])?;
        Ok(Self { fd, asked: false })
    }

    /// What the next pending signal asks for, if there is one; never blocks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take(&mut self) -> io::Result<Option<Ask>> {
        let signal = self.fd.take()?;
        Ok(signal.map(|signal| {
            if std::mem::replace(&mut self.asked, true) {
                Ask::End(signal)
            } else {
                Ask::PowerOff(signal)
            }
        }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Signals are the whole process's, so this test runs in a process of its own.
    #[test]
    fn the_first_signal_asks_and_the_second_ends() {
        const CHILD: &str = "CVMM_TEST_SIGNALS";
        if std::env::var_os(CHILD).is_none() {
            let status = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "signals::tests::the_first_signal_asks_and_the_second_ends",
                ])
                .env(CHILD, "1")
                .status()
                .unwrap();
            assert!(status.success());
            return;
        }
        let mut signals = Signals::catch().unwrap();
        assert_eq!(signals.take().unwrap(), None);
        let own_thread = std::fs::read_link("/proc/thread-self").unwrap();
        let thread = own_thread.file_name().unwrap().to_str().unwrap().to_owned();
        let send = |name: &str| {
            let sent = Command::new("sh")
                .args(["-c", &format!("kill -{name} {thread}")])
                .status();
            assert!(sent.unwrap().success());
        };
        send("TERM");
        assert_eq!(signals.take().unwrap(), Some(Ask::PowerOff(15)));
        send("INT");
        assert_eq!(signals.take().unwrap(), Some(Ask::End(2)));
        assert_eq!(signals.take().unwrap(), None);
    }
}
