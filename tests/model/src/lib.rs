//! The visibility map of `arch`, the same file, on shuttle's locks and atomics: every interleaving of a few threads is
//! run. All of the map's accesses are sequentially consistent, which is what shuttle models.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

#[cfg(test)]
mod addr {
    pub(crate) use arch::addr::{Gpa, PAGE_SIZE, PageRange};
}

/// What `arch::mem::sync` takes from the standard library.
#[cfg(test)]
mod sync {
    use std::sync::atomic::AtomicU64 as Counter;
    use std::time::Duration;

    pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(crate) use shuttle::sync::{RwLock, RwLockReadGuard};

    static LOOKS: Counter = Counter::new(0);

    /// A clock that each look advances by a millisecond, so that time does not depend on the machine.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) struct Instant(u64);

    impl Instant {
        pub(crate) fn now() -> Self {
            Self(LOOKS.fetch_add(1, Ordering::SeqCst))
        }

        pub(crate) fn checked_add(self, more: Duration) -> Option<Self> {
            self.0.checked_add(more.as_millis() as u64).map(Self)
        }
    }

    /// Lets the others run.
    pub(crate) fn sleep(_: Duration) {
        shuttle::thread::yield_now();
    }
}

#[cfg(test)]
#[path = "../../../arch/src/mem/visibility.rs"]
#[allow(dead_code, unreachable_pub)]
mod visibility;
