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

    /// True once a signal has asked for the machine's end.
    pub fn asked(&self) -> bool {
        self.asked
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
    use std::sync::mpsc::channel;
    use std::thread;
    use vmm_sys_util::signal::Killable;

    #[test]
    fn the_first_signal_asks_and_the_second_ends() {
        // Signals go to the one thread that blocks them, not to the process, which other tests share.
        let (go, wait) = channel();
        let (report, asked) = channel();
        let thread = thread::spawn(move || {
            let mut signals = Signals::catch().unwrap();
            report.send(signals.take().unwrap()).unwrap();
            while wait.recv().is_ok() {
                report.send(signals.take().unwrap()).unwrap();
            }
        });
        assert_eq!(asked.recv().unwrap(), None);
        for (signal, ask) in [
            (libc::SIGTERM, Ask::PowerOff(15)),
            (libc::SIGINT, Ask::End(2)),
            (libc::SIGTERM, Ask::End(15)),
        ] {
            thread.kill(signal).unwrap();
            go.send(()).unwrap();
            assert_eq!(asked.recv().unwrap(), Some(ask));
        }
        drop(go);
        thread.join().unwrap();
    }
}
