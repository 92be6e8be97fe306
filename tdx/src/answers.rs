//! What a sealed TD gets for its exits.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::exit::PlatformExit;
use arch::mem::SharedMem;
use arch::platform::PlatformFlow;

use crate::exit::{OwnReasons, TdxExit, notify_vector};
use crate::get_quote::{QuoteService, ReplyCode, Source};

/// Bit 1 of GetTdVmCallInfo's R11, leaf 1: SetupEventNotifyInterrupt is served.
const CALL_SETUP_NOTIFY: u64 = 1 << 1;

/// Sends an interrupt: APIC id of the vCPU, vector.
pub(crate) type Interrupt = dyn Fn(u32, u8) + Send + Sync;

/// What does not change while the guest lives.
#[derive(Debug)]
pub(crate) struct Terms {
    /// Knows the codes with which the measured firmware gives up.
    pub(crate) reasons: OwnReasons,
    /// The optional calls that KVM lets user space claim.
    pub(crate) user_calls: u64,
    /// Where quotes come from.
    pub(crate) quotes: Option<Source>,
}

/// Answers of one TD, shared by its vCPUs.
#[derive(Debug)]
pub(crate) struct Answers {
    reasons: OwnReasons,
    calls: u64,
    listener: Arc<Listener>,
    quotes: QuoteService,
}

/// The vCPU that wants to hear of events.
struct Listener {
    /// Its APIC id, and the vector.
    target: Mutex<Option<(u32, u8)>>,
    interrupt: Box<Interrupt>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl Listener {
    fn setup(&self, vcpu: u32, vector: u64) -> ReplyCode {
        let Some(vector) = notify_vector(vector) else {
            return ReplyCode::InvalidOperand;
        };
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some((vcpu, vector));
        ReplyCode::Success
    }

    /// A guest that has set up nothing polls.
    fn tell(&self) {
        let target = *self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((vcpu, vector)) = target {
            (self.interrupt)(vcpu, vector);
        }
    }
}

impl Answers {
    /// For a guest with this shared memory; `interrupt` reaches it.
    ///
    /// # Errors
    /// The process has no more threads or descriptors.
    pub(crate) fn new(shared: SharedMem, terms: Terms, interrupt: Box<Interrupt>) -> io::Result<Self> {
        let listener = Arc::new(Listener {
            target: Mutex::default(),
            interrupt,
        });
        let to_tell = Arc::clone(&listener);
        Ok(Self {
            reasons: terms.reasons,
            calls: terms.user_calls & CALL_SETUP_NOTIFY,
            listener,
            quotes: QuoteService::new(shared, terms.quotes, Box::new(move || to_tell.tell()))?,
        })
    }

    /// Serves `exit`; `None` if it is none of a TD's.
    pub(crate) fn serve(&self, exit: PlatformExit<'_>) -> Option<PlatformFlow> {
        let vcpu = exit.vcpu;
        match TdxExit::decode(exit)? {
            TdxExit::Fatal(fatal) => return Some(PlatformFlow::Terminated(fatal.words(self.reasons))),
            TdxExit::GetQuote { gpa, bytes, call } => call.answer(self.quotes.request(gpa, bytes)),
            TdxExit::GetInfo { leaf: 1, call } => call.answer_info(self.calls),
            TdxExit::GetInfo { call, .. } => call.answer(ReplyCode::InvalidOperand),
            TdxExit::SetupNotify { vector, call } => call.answer(self.listener.setup(vcpu, vector)),
            // KVM has put down that the call is not served.
            TdxExit::Unknown { number } => {
                log::debug!("the guest makes call {number:#x}, which is not served");
            }
        }
        Some(PlatformFlow::Resume)
    }
}

#[cfg(test)]
mod tests;
