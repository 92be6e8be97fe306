//! First instructions and exception entry points.
// UNSAFETY: assembly that the processor enters.
#![expect(unsafe_code, reason = "entry code")]

use core::arch::global_asm;

// The image starts with `entry`; `park`, where other processors stay (layout::AP_PARK_RIP), and `td`, where
// the reset page continues (layout::TD_ENTRY_RIP), are at fixed distances. Exception stubs are 8 bytes each
// and push their vector.
//
// Every processor of a TD comes to `td` and learns its index from the TDX module, never from the host. The
// first one is the boot processor. The others wait in `mailbox` for the kernel (ACPI 6.6, "Multiprocessor Wakeup
// Structure"): the page was launched as zeros and is private, so no command in it is the host's. They read
// only the text, the boot page tables and the reset page's descriptors, which are the kernel's never.
global_asm!(
    ".section .text.start, \"ax\"",
    ".global entry",
    "entry:",
    "    cli",
    "    jmp 1f",
    "    .balign 16",
    "park:",
    "    cli",
    "0:  hlt",
    "    jmp 0b",
    "    .balign 16",
    "td:",
    "    mov eax, {vp_info}",
    "    .byte 0x66, 0x0f, 0x01, 0xcc", // tdcall
    "    test rax, rax",
    "    jnz 4f",
    "    mov esp, {stack}",
    "    mov edi, {td}",
    "    test r9d, r9d",
    "    jz 1f",
    "    mov ebx, {mailbox}",
    "mailbox:",
    "    pause",
    "    movzx eax, word ptr [rbx]",
    "    test eax, eax",
    "    jz mailbox",
    "    cmp dword ptr [rbx + 4], r9d",
    "    jne mailbox",
    "    cmp eax, {wake}",
    "    je 0f",
    "    cmp eax, {test}",
    "    jne mailbox",
    "    mov word ptr [rbx], 0",
    "    jmp mailbox",
    "0:  mov rax, [rbx + 8]",
    "    mov word ptr [rbx], 0",
    "    jmp rax",
    "1:  cld",
    "    mov rbx, rdi",
    "    lea rdi, [bss_start]",
    "    lea rcx, [bss_end]",
    "    sub rcx, rdi",
    "    xor eax, eax",
    "    rep stosb",
    "    lgdt [{gdt_pointer}]",
    "    push {code}",
    "    lea rax, [2f]",
    "    push rax",
    "    retfq",
    "2:  mov eax, {data}",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov ss, eax",
    "    mov rdi, rbx",
    "    call {run}",
    "4:  ud2",
    "    .balign 8",
    ".global exception_stubs",
    "exception_stubs:",
    ".set vector, 0",
    ".rept 32",
    "    .byte 0x6a, vector",
    "    jmp 3f",
    "    .balign 8, 0xcc",
    "    .set vector, vector + 1",
    ".endr",
    // The stack may be what failed; nothing on it is needed again.
    "3:  pop rdi",
    "    mov rsp, {stack}",
    "    call {exception}",
    "    ud2",
    gdt_pointer = sym GDT_POINTER,
    code = const shim::layout::ENTRY_CS,
    data = const shim::layout::ENTRY_DS,
    stack = const shim::layout::ENTRY_RSP,
    vp_info = const shim::tdx::VP_INFO,
    td = const shim::layout::MODE_TDX,
    mailbox = const shim::layout::MAILBOX,
    wake = const shim::tdx::MAILBOX_WAKE,
    test = const shim::tdx::MAILBOX_TEST,
    run = sym enter,
    exception = sym crate::hw::exception,
);

/// Two null descriptors, then 64-bit code and data at the selectors of Linux' boot protocol; with accessed bits, so that the processor never writes here.
static GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[repr(C, packed)]
struct GdtPointer {
    limit: u16,
    base: &'static [u64; 4],
}

static GDT_POINTER: GdtPointer = GdtPointer {
    limit: 31,
    base: &GDT,
};

extern "C" fn enter(mode: u64) -> ! {
    crate::run(mode)
}
