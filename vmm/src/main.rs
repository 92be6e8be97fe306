//! The `cvmm` program.

use std::process::ExitCode;

use shim::config::Blob;
use vmm::ending::{Ending, RunError};
use vmm::machine::run::Outcome;
use vmm::machine::{self, MachineError};
use vmm::plan::{self, Payload};
use vmm::platform::Kind;
use vmm::spec::MachineSpec;

fn launch(spec: MachineSpec) -> Result<Ending, RunError> {
    let parts = spec.into_parts();
    let mut kernel = parts.payload.kernel.file;
    let mut initrd = parts.payload.initrd.map(|input| input.file);
    let read = || RunError::host("reading kernel and initrd");
    let payload = Payload {
        kernel: plan::blob(&mut kernel).map_err(read())?,
        initrd: match &mut initrd {
            Some(file) => plan::blob(file).map_err(read())?,
            None => Blob {
                len: 0,
                sha256: [0; 32],
            },
        },
        cmdline: parts.payload.cmdline,
    };
    let machine = machine::Parts {
        kind: Kind::Soft,
        kernel,
        initrd,
        payload,
        memory_bytes: parts.memory_bytes,
        cpus: parts.cpus,
    };
    let outcome = machine::run(&machine, Box::new(parts.devices.console)).map_err(|e| match e {
        MachineError::Platform(e) => RunError::Refused(e),
        MachineError::Host { what, source } => RunError::Host {
            doing: what.into(),
            source,
        },
        e @ (MachineError::Plan(_) | MachineError::Vcpu(_)) => RunError::Internal(e.to_string()),
    })?;
    Ok(match outcome {
        Outcome::Off => Ending::PowerOff,
        Outcome::Reboot => Ending::Reboot,
        Outcome::Crashed => Ending::Crashed("triple fault".into()),
        Outcome::Terminated(reason) => Ending::Terminated(reason),
    })
}

fn main() -> ExitCode {
    ExitCode::from(vmm::cli::main(|spec, _, _| launch(spec)))
}
