//! x86 state that the launch fixes: registers and CPUID, as plain data.
pub mod cpuid;
pub mod regs;
