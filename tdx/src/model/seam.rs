//! The model behind the seam. A vCPU is named by its index.

use arch::x86::cpuid::CpuidTable;

use super::{Model, RawCmd, RawInit, RawRegion};
use crate::commands::{Capabilities, Command, InitVm, MemRegion, TdxCommands};
use crate::error::Refusal;

const FRESH: RawCmd = RawCmd {
    flags: 0,
    hw_error: 0,
};

fn with_status(command: Command) -> impl FnOnce((i32, u64)) -> Refusal {
    move |(errno, status)| Refusal::new(command, errno, status)
}

fn without_status(command: Command) -> impl FnOnce(i32) -> Refusal {
    move |errno| Refusal::new(command, errno, 0)
}

impl TdxCommands for Model {
    type Vcpu = usize;

    fn capabilities(&mut self, room: usize) -> Result<Capabilities, Refusal> {
        self.raw_capabilities(FRESH, room)
            .map_err(with_status(Command::Capabilities))
    }

    fn init_vm(&mut self, init: &InitVm) -> Result<(), Refusal> {
        let raw = RawInit {
            init: init.clone(),
            reserved: false,
            padding: 0,
        };
        self.raw_init_vm(FRESH, &raw)
            .map_err(with_status(Command::InitVm))
    }

    fn get_cpuid(&mut self, vcpu: &mut usize, room: usize) -> Result<CpuidTable, Refusal> {
        self.raw_get_cpuid(*vcpu, FRESH, room)
            .map_err(|(errno, _)| Refusal::new(Command::GetCpuid, errno, 0))
    }

    fn set_cpuid(&mut self, vcpu: &mut usize, table: &CpuidTable) -> Result<(), Refusal> {
        self.vcpu_set_cpuid(*vcpu, table)
            .map_err(without_status(Command::SetCpuid))
    }

    fn init_vcpu(&mut self, vcpu: &mut usize, rcx: u64) -> Result<(), Refusal> {
        self.raw_init_vcpu(*vcpu, FRESH, rcx)
            .map_err(without_status(Command::InitVcpu))
    }

    fn init_mem_region(&mut self, vcpu: &mut usize, region: &mut MemRegion<'_>) -> Result<(), Refusal> {
        let pages = region.source.len() as u64;
        let source: Vec<u8> = region.source.iter().flat_map(|page| page.0).collect();
        let cmd = RawCmd {
            flags: region.measured.into(),
            hw_error: 0,
        };
        let mut raw = RawRegion {
            source_addr: region.source.as_ptr() as u64,
            gpa: region.gpa,
            nr_pages: pages,
            source: &source,
        };
        let answer = self.raw_init_mem_region(*vcpu, cmd, &mut raw);
        region.advance(pages.saturating_sub(raw.nr_pages));
        answer.map_err(without_status(Command::InitMemRegion))
    }

    fn finalize_vm(&mut self) -> Result<(), Refusal> {
        self.raw_finalize(FRESH).map_err(with_status(Command::FinalizeVm))
    }
}
