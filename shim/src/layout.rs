//! The memory map, ports and entry state of machines v1 and v2, as one list of constants.
//!
//! Guest-physical addresses and lengths in bytes. None of them depends on the size of RAM, so neither does
//! the launch digest.

/// Size of a page.
pub const PAGE: u64 = 0x1000;
/// Alignment of RAM tops and of payloads, and the unit of lazy acceptance.
pub const UNIT: u64 = 0x20_0000;

/// RAM below this address is free for the kernel (real-mode trampolines).
pub const LOW_HOLE: u64 = 0xa_0000;
/// Start of the shim's text, read-only data and tables.
pub const TEXT: u64 = 0x10_0000;
/// Most bytes that the shim's image may have.
pub const TEXT_MAX_LEN: u64 = 0xc000;
/// Boot page tables: one PML4 page, then one PDPT page.
pub const TABLES: u64 = 0x10_c000;
/// Length of the boot page tables.
pub const TABLES_LEN: u64 = 0x2000;
/// The measured parameter page ([`crate::config::Config`]).
pub const CONFIG: u64 = 0x10_e000;
/// The wake-up mailbox of TDX application processors; not launched on other platforms.
pub const MAILBOX: u64 = 0x10_f000;
/// The SNP secrets page.
pub const SECRETS: u64 = 0x11_0000;
/// The SNP CPUID page.
pub const CPUID: u64 = 0x11_1000;
/// Zero pages for the shim's variables and stack.
pub const STACK: u64 = 0x11_2000;
/// Length of the zero pages.
pub const STACK_LEN: u64 = 0x2000;
/// The first byte above everything that a launch may place; the shim validates from here to [`LOW_END`].
pub const FREE: u64 = 0x11_4000;
/// Start of what the shim hands to the kernel: boot parameters, ACPI, EFI tables.
pub const HANDOVER: u64 = 0x12_0000;
/// End of the area that belongs to the shim and its hand-over.
pub const LOW_END: u64 = 0x20_0000;
/// Where the kernel's protected-mode part is placed.
pub const KERNEL: u64 = 0x100_0000;

/// Lowest possible end of low RAM: room for the kernel's place and one unit.
pub const LOW_RAM_MIN: u64 = 0x200_0000;
/// Highest possible end of low RAM.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// Start of high RAM.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// Window for 32-bit memory BARs of PCI devices.
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// Length of the PCI window.
pub const PCI_WINDOW_LEN: u64 = 0x2000_0000;
/// PCI configuration space of bus 0 (ECAM).
pub const ECAM: u64 = 0xe000_0000;
/// Length of the ECAM: one bus.
pub const ECAM_LEN: u64 = 0x10_0000;
/// Local APIC page.
pub const LAPIC: u64 = 0xfee0_0000;

/// Shared memory that carries what the shim has to verify; its first page is the descriptor.
pub const STAGING: u64 = 0x70_0000_0000;
/// The page of the staging area that serves as the SNP GHCB.
pub const STAGING_GHCB: u64 = STAGING + PAGE;
/// Bytes at the start of the staging area that the VMM must back with zeroed memory of its own.
pub const STAGING_HEAD_LEN: u64 = 2 * PAGE;
/// The kernel file as staged; the initrd follows at the next multiple of [`UNIT`].
pub const STAGING_KERNEL: u64 = STAGING + UNIT;
/// End of the staging window, which is also what the boot page tables map.
pub const STAGING_END: u64 = 0x80_0000_0000;
/// The page of the reset vector, which every processor of a TD executes first (`shim/v1-reset.bin`); launched
/// on TDX only.
pub const RESET_PAGE: u64 = 0xffff_f000;
/// Highest possible end of high RAM.
pub const HIGH_RAM_MAX: u64 = STAGING;

/// Most vCPUs of a machine; the APIC id is the vCPU's index.
pub const VCPUS_MAX: u32 = 1024;

/// First port of the 16550 UART, polled and without interrupt.
pub const PORT_UART: u16 = 0x3f8;
/// ACPI sleep control register (one byte).
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register (one byte).
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register: writing [`RESET_VALUE`] resets the machine.
pub const PORT_RESET: u16 = 0x602;
/// Value that resets.
pub const RESET_VALUE: u8 = 1;
/// The SLP_TYP that the DSDT's `_S5` names; the sleep control register receives `SLP_TYP << 2 | 0x20`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What the kernel writes to the sleep control register to power off.
pub const S5_SLEEP_CONTROL: u8 = (S5_SLEEP_TYPE << 2) | 0x20;
/// The shim's own port (32-bit writes only).
pub const PORT_SHIM: u16 = 0x604;
/// Written to [`PORT_SHIM`] when kernel and initrd are verified and the staging area may go.
pub const SHIM_RELEASE_STAGING: u32 = 1;
/// Written to [`PORT_SHIM`] together with a reason code ([`crate::reason::Reason::code`]) to terminate.
pub const SHIM_TERMINATE: u32 = 0x8000_0000;
/// Reason-code set of the shim in GHCB MSR terminations.
pub const GHCB_REASON_SET: u8 = 2;

/// First instruction of the boot processor.
pub const ENTRY_RIP: u64 = TEXT;
/// First instruction of every other processor on SNP: a loop that never leaves.
pub const AP_PARK_RIP: u64 = TEXT + 0x10;
/// Initial stack pointer.
pub const ENTRY_RSP: u64 = STACK + STACK_LEN;
/// Initial CR0: paging, protection, numeric errors, extension type.
pub const ENTRY_CR0: u64 = 0x8000_0031;
/// Initial CR3; SNP adds [`C_BIT`].
pub const ENTRY_CR3: u64 = TABLES;
/// Initial CR4: PAE, OSFXSR, OSXMMEXCPT.
pub const ENTRY_CR4: u64 = 0x620;
/// Initial EFER: long mode enabled and active.
pub const ENTRY_EFER: u64 = 0x500;
/// Code selector: flat 64-bit, execute and read, accessed.
pub const ENTRY_CS: u16 = 0x10;
/// Data selectors (DS, ES, SS): flat, read and write, accessed. FS and GS are the same with selector 0.
pub const ENTRY_DS: u16 = 0x18;
/// The bit that makes a mapping private on SNP.
pub const C_BIT: u64 = 1 << 51;
/// The bit that makes a mapping shared on TDX: the guest-physical address width of a machine is 48.
pub const SHARED_BIT: u64 = 1 << 47;
/// First instruction of every processor of a TD, in 32-bit mode without paging.
pub const RESET_VECTOR: u64 = RESET_PAGE + 0xff0;
/// Where a kernel of a TD sends a processor that it gives back, in 64-bit mode (the reset vector of the MADT's
/// wake-up structure).
pub const AP_RESET_VECTOR: u64 = RESET_PAGE;
/// Where the reset page continues, in 64-bit mode on the boot page tables.
pub const TD_ENTRY_RIP: u64 = TEXT + 0x20;
/// CR4 on TDX: machine checks must stay enabled.
pub const TD_CR4: u64 = ENTRY_CR4 | 0x40;
/// Upper bits of the error code of a TD's fatal error; the lowest byte is [`crate::reason::Reason::code`].
pub const TD_FATAL_MARK: u32 = 0x6376_6d00;
/// RDI at entry: machine without protection.
pub const MODE_SOFT: u64 = 0;
/// RDI at entry: SEV-SNP guest.
pub const MODE_SNP: u64 = 1;
/// RDI at entry: TDX guest.
pub const MODE_TDX: u64 = 2;
