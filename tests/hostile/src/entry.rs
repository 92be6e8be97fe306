//! The two ways in: the 64-bit entry of Linux' boot protocol (cvmm's shim) and the 32-bit entry of PVH (QEMU and
//! others). Both end in `enter` with the address of the command line.

use core::arch::global_asm;

// Offsets in the image: 0x200 is fixed by the boot protocol, 0x300 is what the PVH note names.
global_asm!(
    ".section .text.start, \"ax\"",
    ".global image",
    "image:",
    ".org 0x200",
    ".code64",
    "    cli",
    "    cld",
    "    mov ebx, [rsi + 0x228]",
    "    lea rdi, [bss_start]",
    "    lea rcx, [bss_end]",
    "    sub rcx, rdi",
    "    xor eax, eax",
    "    rep stosb",
    "1:  lea rsp, [{stack} + {stack_len}]",
    "    lgdt [{gdt_pointer}]",
    "    push 0x10",
    "    lea rax, [2f]",
    "    push rax",
    "    retfq",
    "2:  mov eax, 0x18",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov ss, eax",
    "    mov edi, ebx",
    "    call {enter}",
    "    ud2",
    ".org 0x300",
    ".code32",
    "    cli",
    "    cld",
    "    mov edx, [ebx + 24]",
    "    lea edi, [bss_start]",
    "    lea ecx, [bss_end]",
    "    sub ecx, edi",
    "    xor eax, eax",
    "    rep stosb",
    "    mov ebx, edx",
    // One table each: the first GiB by 2 MiB pages would not reach the devices, so four GiB by 1 GiB pages.
    "    lea eax, [{boot_tables} + 0x1000 + 3]",
    "    mov [{boot_tables}], eax",
    "    mov dword ptr [{boot_tables} + 0x1000], 0x83",
    "    mov dword ptr [{boot_tables} + 0x1008], 0x40000083",
    "    mov dword ptr [{boot_tables} + 0x1010], 0x80000083",
    "    mov dword ptr [{boot_tables} + 0x1018], 0xc0000083",
    "    mov eax, 0x620",
    "    mov cr4, eax",
    "    lea eax, [{boot_tables}]",
    "    mov cr3, eax",
    "    mov ecx, 0xc0000080",
    "    rdmsr",
    "    or eax, 0x100",
    "    wrmsr",
    "    mov eax, 0x80000031",
    "    mov cr0, eax",
    "    lgdt [{gdt_pointer}]",
    "    lea esp, [{stack} + {stack_len}]",
    "    push 0x10",
    "    lea eax, [3f]",
    "    push eax",
    "    retf",
    ".code64",
    "3:  jmp 1b",
    // Exception stubs, 16 bytes each: the vector, then on to the one handler with the faulting address.
    "    .balign 16",
    ".global exception_stubs",
    "exception_stubs:",
    ".set vector, 0",
    ".rept 32",
    "    mov edi, vector",
    "    jmp 4f",
    "    .balign 16, 0xcc",
    "    .set vector, vector + 1",
    ".endr",
    "4:  mov rsi, [rsp]",
    "    mov rdx, [rsp + 8]",
    "    lea rsp, [{stack} + {stack_len}]",
    "    call {exception}",
    "    ud2",
    gdt_pointer = sym GDT_POINTER,
    stack = sym STACK,
    stack_len = const STACK_LEN,
    boot_tables = sym BOOT_TABLES,
    enter = sym enter,
    exception = sym exception,
);

const STACK_LEN: usize = 0x10000;

#[repr(C, align(4096))]
struct Aligned<const N: usize>([u8; N]);

static mut STACK: Aligned<STACK_LEN> = Aligned([0; STACK_LEN]);
static mut BOOT_TABLES: Aligned<0x2000> = Aligned([0; 0x2000]);

/// Null, null, 64-bit code, data.
static GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[repr(C, packed)]
struct GdtPointer {
    limit: u16,
    base: &'static [u64; 4],
    high: u32,
}

static GDT_POINTER: GdtPointer = GdtPointer {
    limit: 31,
    base: &GDT,
    high: 0,
};

extern "C" fn enter(cmdline: u64) -> ! {
    crate::run(cmdline)
}

extern "C" fn exception(vector: u64, first: u64, second: u64) -> ! {
    crate::died(vector, first, second)
}

/// C `strlen`.
///
/// # Safety
/// As in C: a zero byte follows.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller promises every byte up to the zero.
    while unsafe { text.wrapping_add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
