//! The host's view of guest RAM. Private pages have no host mapping and no type here.

pub mod map;
mod visibility;

/// What the visibility map is made of.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(super) use std::sync::{RwLock, RwLockReadGuard};
    pub(super) use std::thread::sleep;
    pub(super) use std::time::Instant;
}

use std::sync::{Arc, RwLockReadGuard};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryResult,
    Permissions,
};

use crate::addr::Gpa;
pub use visibility::{Hidden, Pin, Visibility, VisibilityMap};

/// Guest memory as a device may see it: shared pages, nothing else.
///
/// Implements [`GuestMemory`], so `virtio-queue` works on it unchanged, and a descriptor that points at a
/// private page fails like one that points at a hole.
#[derive(Clone, Debug)]
pub struct SharedMem {
    map: Arc<GuestMemoryMmap>,
    visible: Arc<VisibilityMap>,
    watch: Option<Arc<dyn Watch>>,
}

/// Is told of each access to shared memory before it is checked. Tests put one between a device and its memory, so
/// that memory changes exactly there; a machine has none.
pub trait Watch: Send + Sync + std::fmt::Debug {
    /// `bytes` at `at` are about to be accessed.
    fn before(&self, at: Gpa, bytes: u64, access: Permissions);
}

impl SharedMem {
    /// `map` must hold only the shared backing of each slot, never `guest_memfd`.
    pub fn new(map: Arc<GuestMemoryMmap>, visible: Arc<VisibilityMap>) -> Self {
        Self {
            map,
            visible,
            watch: None,
        }
    }

    /// The same memory, every access to which `watch` sees first.
    #[must_use]
    pub fn watched(self, watch: Arc<dyn Watch>) -> Self {
        Self {
            watch: Some(watch),
            ..self
        }
    }

    fn tell(&self, at: Gpa, bytes: u64, access: Permissions) {
        if let Some(watch) = &self.watch {
            watch.before(at, bytes, access);
        }
    }

    /// Marks a batch of synchronous accesses. A conversion to private waits for the guard to go before it
    /// discards anything, so keep the work under it bounded. Do not nest.
    pub fn batch(&self) -> RwLockReadGuard<'_, ()> {
        self.visible.batch()
    }

    /// True if every byte of `[addr, addr + len)` is shared RAM now.
    pub fn all_shared(&self, addr: Gpa, len: u64) -> bool {
        self.visible.all_shared(addr, len)
    }

    /// Pins `[addr, addr + len)` for I/O that outlives a batch; `None` if a byte of it is not shared RAM.
    pub fn pin(&self, addr: Gpa, len: u64) -> Option<Pin> {
        self.tell(addr, len, Permissions::ReadWrite);
        self.visible.pin(addr, len)
    }

    /// The mapping behind the view, to be kept alive while a pinned range is used by the kernel.
    pub fn mapping(&self) -> &Arc<GuestMemoryMmap> {
        &self.map
    }
}

impl GuestMemory for SharedMem {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.visible.all_shared(Gpa(addr.0), count as u64)
            && GuestMemoryBackend::check_range(&*self.map, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        self.tell(Gpa(addr.0), count as u64, access);
        if !self.check_range(addr, count, access) {
            return Err(GuestMemoryError::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(&*self.map, addr, count))
    }
}

#[cfg(test)]
mod tests;
