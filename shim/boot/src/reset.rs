//! The reset page (`shim/v1-reset.bin`): from the reset vector of a TD, 32-bit and without paging, to the
//! shim's 64-bit code on its boot page tables; and the same way for a processor that a kernel gives back.
//!
//! EFER is never written: the TDX module has enabled long mode, and it is active once paging is. The page
//! needs no other: a kernel that jumps here (Linux, arch/x86/kernel/acpi/madt_playdead.S) maps this one alone.
// UNSAFETY: assembly that the processor enters.
#![expect(unsafe_code, reason = "entry code")]

use core::arch::global_asm;
use shim::layout::{AP_RESET_VECTOR, ENTRY_CR0, ENTRY_CR3, RESET_PAGE, RESET_VECTOR, TD_CR4, TD_ENTRY_RIP};

/// Offset of the reset vector in the page.
const VECTOR: u64 = RESET_VECTOR - RESET_PAGE;
const _: () = assert!(AP_RESET_VECTOR == RESET_PAGE, "`again` starts the page");

// 64-bit code may clear neither paging nor LA57, and paging cannot be cleared while CR4 has PCIDE or CET.
global_asm!(
    ".section .reset, \"ax\"",
    "reset_page:",
    "again:",
    "    cli",
    "    mov rax, cr4",
    "    and eax, {kept}",
    "    mov cr4, rax",
    "    lgdt [rip + reset_gdt_pointer]",
    "    .byte 0xff, 0x2d", // jmp far [rip + compatible]
    "    .long compatible - . - 4",
    ".code32",
    "without_paging:",
    "    mov eax, 0x18",
    "    mov ds, eax",
    "    mov eax, cr0",
    "    btr eax, 31",
    "    mov cr0, eax",
    "start:",
    "    lgdt [reset_gdt_pointer]",
    "    lidt [no_idt]",
    "    mov eax, {cr4}",
    "    mov cr4, eax",
    "    mov eax, {cr3}",
    "    mov cr3, eax",
    "    mov eax, {cr0}",
    "    mov cr0, eax",
    "    .byte 0xea", // jmp far 0x10:long
    "    .long long",
    "    .word 0x10",
    ".code64",
    "long:",
    "    mov eax, 0x18",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov ss, eax",
    "    mov eax, {entry}",
    "    jmp rax",
    "    .balign 8",
    // Null, 32-bit code, 64-bit code, data; with accessed bits, so that the processor never writes here.
    "reset_gdt:",
    "    .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "reset_gdt_pointer:",
    "    .word 31",
    "    .quad reset_gdt",
    "no_idt:",
    "    .word 0",
    "    .quad 0",
    "compatible:",
    "    .long without_paging",
    "    .word 0x08",
    "    .org {vector}",
    ".code32",
    "    jmp start",
    "    .org 4096",
    ".code64",
    ".text",
    // PAE, machine checks, LA57.
    kept = const 0x1060,
    cr0 = const ENTRY_CR0,
    cr3 = const ENTRY_CR3,
    cr4 = const TD_CR4,
    entry = const TD_ENTRY_RIP,
    vector = const VECTOR,
);
