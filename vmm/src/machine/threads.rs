//! The vCPU threads.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use arch::kvm::vcpu::{Vcpu, kick_signal};
use vmm_sys_util::signal::Killable;

use super::inbox::{Address, Note};
use crate::sandbox::{Sandbox, Thread};
use crate::vcpu::{self, Services, VcpuEnd};

/// Time between two kicks of a thread that has not come out of the guest yet.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// All vCPU threads of one machine. Dropping it stops them.
#[derive(Debug)]
pub(super) struct VcpuThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    ids: Vec<i32>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU.
    pub(super) fn start(
        vcpus: Vec<Vcpu>,
        services: &Arc<Services>,
        addresses: Vec<Address>,
        sandbox: &Sandbox,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (to_ids, ids) = channel();
        let mut all = Self {
            stop: Arc::clone(&stop),
            threads: vec![],
            ids: vec![],
        };
        for (mut vcpu, to_main) in vcpus.into_iter().zip(addresses) {
            let (services, stop, to_ids) = (Arc::clone(services), Arc::clone(&stop), to_ids.clone());
            let sandbox = sandbox.clone();
            let name = format!("vcpu{}", vcpu.index());
            let thread = Builder::new().name(name).spawn(move || {
                let id = rustix::thread::gettid().as_raw_nonzero().get();
                // `start` waits for exactly this message.
                let _ = to_ids.send((vcpu.index(), id));
                drop(to_ids);
                let end = vcpu::run(&mut vcpu, &services, &stop, || sandbox.confine(Thread::Vcpu));
                if !matches!(end, VcpuEnd::Stopped) {
                    to_main.send(Note::VcpuEnded(end));
                }
            })?;
            all.threads.push(thread);
        }
        drop(to_ids);
        let by_index: BTreeMap<_, _> = ids.iter().collect();
        all.ids = by_index.into_values().collect();
        Ok(all)
    }

    /// Kernel thread ids, by vCPU; an orchestrator pins them.
    pub(super) fn ids(&self) -> Vec<i32> {
        self.ids.clone()
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                // ESRCH: it has just ended.
                let _ = thread.kill(kick_signal());
                std::thread::sleep(KICK_AGAIN);
            }
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked; this is a bug of cvmm");
            }
        }
    }
}
