//! What cvmm gives up before the first guest instruction, so that a guest that takes it over gets little.
//!
//! In this order, with everything open that the machine needs: the cgroup, namespaces and user of `--user` and
//! `--cgroup`; all capabilities; the right to gain privileges; paths (Landlock); system calls (seccomp, for each thread
//! its own list). Nothing comes back: a reboot builds the next machine under the same rules.

mod filter;
mod jail;
mod landlock;
mod lists;

use std::io;
use std::path::Path;
use std::sync::Arc;

use arch::host::use_one_heap;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};
use seccompiler::BpfProgram;

pub use jail::{Jail, JailError};
pub use landlock::Reach;
pub use lists::{Powers, Thread};

use crate::ending::RunError;
use crate::events::Event;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Capabilities, paths and system calls are given up.
    pub on: bool,
    /// Another user, namespaces, cgroup.
    pub jail: Jail,
    /// What the machine still needs by path.
    pub reach: Reach,
    /// What its threads need that others do not.
    pub powers: Powers,
}

/// The rules that this process lives under, for the threads that it starts. Clones share it.
#[derive(Clone, Debug)]
pub struct Sandbox(Arc<Inside>);

#[derive(Debug, Default)]
struct Inside {
    threads: Option<Filters>,
    landlock: Option<i32>,
    user: Option<u32>,
}

#[derive(Debug)]
struct Filters {
    events: BpfProgram,
    vcpu: BpfProgram,
    disk: BpfProgram,
    quotes: BpfProgram,
}

impl Sandbox {
    /// Confines the calling thread, which must be the only one, and prepares what the others will be confined to.
    ///
    /// # Errors
    /// The host does not let this process give up what it should, or not change its user.
    pub fn enter(plan: &Plan) -> Result<Self, RunError> {
        if plan.on {
            // Only while this process may.
            empty_bounding_set().map_err(RunError::host("dropping capabilities"))?;
        }
        let user = plan.jail.enter(&plan.reach).map_err(RunError::from)?;
        if !plan.on {
            log::warn!(
                "--sandbox off: a guest that breaks out of cvmm can do everything that {} can",
                if user.is_some() {
                    "that user"
                } else {
                    "whoever started cvmm"
                }
            );
            return Ok(Self(Arc::new(Inside {
                user,
                ..Inside::default()
            })));
        }
        use_one_heap();
        drop_capabilities().map_err(RunError::host("dropping capabilities"))?;
        // Gives up new privileges first, as installing a filter does.
        let landlock = match landlock::restrict(&plan.reach) {
            Ok(landlock::Outcome::Restricted(abi)) => Some(abi),
            Ok(landlock::Outcome::Absent(why)) => {
                log::warn!("this kernel has no Landlock, so cvmm keeps its access to files: {why}");
                None
            }
            Err(e) => return Err(no_sandbox("Landlock", &e)),
        };
        let threads = install(plan.powers).map_err(|e| no_sandbox("seccomp", e.as_ref()))?;
        Ok(Self(Arc::new(Inside {
            threads: Some(threads),
            landlock,
            user,
        })))
    }

    /// Confines the calling thread to the list of `thread`, for good.
    ///
    /// # Errors
    /// The kernel's.
    pub fn confine(&self, thread: Thread) -> io::Result<()> {
        let Some(filters) = &self.0.threads else {
            return Ok(());
        };
        match thread {
            // Since `enter`.
            Thread::Main => Ok(()),
            Thread::Events => filter::install(&filters.events),
            Thread::Vcpu => filter::install(&filters.vcpu),
            Thread::Disk => filter::install(&filters.disk),
            Thread::Quotes => filter::install(&filters.quotes),
        }
    }

    /// What whoever supervises the machine is told.
    pub fn event(&self) -> Event {
        Event::Sandbox {
            seccomp: self.0.threads.is_some(),
            landlock: self.0.landlock,
            user: self.0.user,
        }
    }
}

fn no_sandbox(what: &str, cause: &dyn std::error::Error) -> RunError {
    RunError::HostLacks {
        what: format!("sandbox: {what} cannot be used here: {cause}"),
        remedy:
            "allow cvmm the system calls of both (containers often forbid them), or give its protection up \
                 with --sandbox off"
                .into(),
    }
}

/// Filters the main thread, and makes the programs for the other threads.
fn install(powers: Powers) -> Result<Filters, Box<dyn std::error::Error>> {
    let own = filter::Own::now();
    let compile = |thread| filter::compile(&lists::List::of(thread, powers), own);
    let filters = Filters {
        events: compile(Thread::Events)?,
        vcpu: compile(Thread::Vcpu)?,
        disk: compile(Thread::Disk)?,
        quotes: compile(Thread::Quotes)?,
    };
    let main = compile(Thread::Main)?;
    filter::install(&filter::without_clone3()?)?;
    filter::install(&main)?;
    Ok(filters)
}

/// Out of reach for a process without `CAP_SETPCAP`, which cannot gain anything from the set either.
fn empty_bounding_set() -> io::Result<()> {
    if !capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Past the last that the kernel knows.
            Err(Errno::INVAL) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    // Unknown to kernels before 4.3.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(())
}

/// The directory of `path`, in which it may be replaced or removed.
pub(crate) fn directory(path: &Path) -> std::path::PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    absolute.parent().unwrap_or(Path::new("/")).to_owned()
}
