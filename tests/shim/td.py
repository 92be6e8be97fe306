"""A trust domain: the emulator plays the TDX module and the hypervisor behind it.

The emulator has 40 address bits, so the shared bit of the page tables is moved from 47 to 39 when they are
launched; with it a mapping leads to other memory, as on hardware. Sources: TDX module ABI 1.5 (TDCALL leaves,
initial state of a vCPU), GHCI 1.5.
"""

import hashlib
import struct

from machine import IMAGE, PAGE, ROOT, STAGING, UNIT, Protected
from unicorn import UC_HOOK_CODE
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_R8,
    UC_X86_REG_R9,
    UC_X86_REG_R10,
    UC_X86_REG_R11,
    UC_X86_REG_R12,
    UC_X86_REG_R13,
    UC_X86_REG_R14,
    UC_X86_REG_R15,
    UC_X86_REG_RAX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDX,
    UC_X86_REG_RIP,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
)

RESET = (ROOT / "shim/v1-reset.bin").read_bytes()
RESET_PAGE, MAILBOX = 0xFFFFF000, 0x10F000
# The first MOV to CR0 in the page.
CLEARS_PAGING = RESET_PAGE + RESET.index(b"\x0f\x22\xc0")
TDCALL = b"\x66\x0f\x01\xcc"
SHARED = 1 << 39
EFER = 0xC0000080

OPERAND_BUSY, OPERAND_INVALID = 0x8000_0200_0000_0001, 0xC000_0100_0000_0001
ALREADY_ACCEPTED, SIZE_MISMATCH = 0x0000_0B0A_0000_0001, 0xC000_0B0B_0000_0001

# Code that takes a processor from the emulator's long mode to the state in which TDs start, and page tables for
# it; both lie where a TD has nothing. It loads 32-bit segments, clears paging, and jumps to the reset vector.
STARTER, STARTER_TABLES = 0xFFFFE000, 0x9_0000_0000
STARTER_CODE = bytes.fromhex(
    "0f0115590000 00 ff2d6d000000"  # lgdt [rip+0x59]; jmp far [rip+0x6d]
    "b818000000 8ed8 8ec0 8ed0"  # 32-bit: data segments
    "b831000000 0f22c0 b840000000 0f22e0"  # mov cr0, 0x31; mov cr4, 0x40
    "e9"  # jmp to the reset vector
)


def starter_page():
    page = bytearray(PAGE)
    code = STARTER_CODE + struct.pack("<i", 0xFFFFFFF0 - (STARTER + len(STARTER_CODE) + 4))
    page[: len(code)] = code
    struct.pack_into("<HQ", page, 0x60, 23 + 8, STARTER + 0x80)
    struct.pack_into("<IH", page, 0x7A, STARTER + 13, 0x8)
    struct.pack_into("<QQQQ", page, 0x80, 0, 0xCF9B000000FFFF, 0xAF9B000000FFFF, 0xCF93000000FFFF)
    return bytes(page)


def identity_tables(pml4_at, shared=0):
    pml4 = struct.pack("<Q", pml4_at + PAGE | 3) + bytes(PAGE - 8)
    gibs = ((gib << 30) | 0xE3 | (shared if gib >= 448 else 0) for gib in range(512))
    return pml4 + b"".join(struct.pack("<Q", entry) for entry in gibs)


class Td(Protected):
    MODE = 2
    STAGED_AT = STAGING | SHARED
    REASON_SET = "cvmm"

    def __init__(self):
        super().__init__()
        self.index, self.address_bits, self.attributes = 0, 48, 1 << 28
        # The bit that the launched page tables set for the staging area.
        self.shared = SHARED
        # How often the module is busy before it serves an acceptance or an extension.
        self.busy = 0
        self.accept_status, self.extend_status = {}, 0
        # RAX and R10 of a port write, and how often the host returns from a fatal error.
        self.call_status, self.call_answer, self.returns = 0, 0, 0
        # An address at which the module raises #VE.
        self.trap_at = None
        self.rtmr = [bytes(48)] * 4
        self.fatal, self.fatal_calls, self.tdcalls = None, 0, []

    def launch_all(self):
        self.launch(0x100000, IMAGE)
        self.launch(0x10C000, identity_tables(0x10C000, self.shared))
        self.launch(0x10E000, self.config_page())
        self.launch(MAILBOX, bytes(PAGE))
        self.launch(0x112000, bytes(2 * PAGE))
        self.launch(RESET_PAGE, RESET)

    def ready(self):
        """The first instruction is the starter's; the shim's first one is at the reset vector."""
        uc = self.uc
        for gpa, content in ((STARTER, starter_page()), (STARTER_TABLES, identity_tables(STARTER_TABLES))):
            uc.mem_map(gpa, len(content))
            uc.mem_write(gpa, content)
        uc.reg_write(UC_X86_REG_CR4, 0x20)
        uc.reg_write(UC_X86_REG_CR3, STARTER_TABLES)
        uc.reg_write(UC_X86_REG_CR0, 0x80000031)
        uc.reg_write(UC_X86_REG_RSI, 0xBAD)
        uc.reg_write(UC_X86_REG_RSP, 0xBAD)
        uc.reg_write(UC_X86_REG_RIP, STARTER)
        uc.hook_add(UC_HOOK_CODE, self.reset, None, 0xFFFFFFF0, 0xFFFFFFF0)
        uc.hook_add(UC_HOOK_CODE, self.clear_paging, None, CLEARS_PAGING, CLEARS_PAGING)
        if self.trap_at is not None:
            self.take_exception_at(self.trap_at, 20)

    def reset(self, uc, rip, size, _):
        assert uc.reg_read(UC_X86_REG_CR0) == 0x31 and uc.reg_read(UC_X86_REG_CR4) == 0x40
        assert uc.msr_read(EFER) == 0x100, "long mode is enabled and not active"
        for register in (UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX):
            uc.reg_write(register, 0xBAD)

    def clear_paging(self, uc, rip, size, _):
        assert not uc.reg_read(UC_X86_REG_CR4) & (1 << 17 | 1 << 23), "a processor would refuse: PCIDE or CET"

    def cpuid_answer(self, leaf):
        assert leaf in (1, 7, 0x21), f"CPUID leaf {leaf:#x} may trap in a TD"
        name = struct.unpack("<III", b"IntelTDX    ")
        return (0, name[0], name[2], name[1]) if leaf == 0x21 else super().cpuid_answer(leaf)

    def port_write(self, uc, port, size, value, _):
        raise AssertionError("OUT traps in a TD")

    def undefined(self):
        rip = self.uc.reg_read(UC_X86_REG_RIP)
        if bytes(self.uc.mem_read(rip, 4)) != TDCALL:
            return False
        cr0, cr4 = self.uc.reg_read(UC_X86_REG_CR0), self.uc.reg_read(UC_X86_REG_CR4)
        assert cr0 & 0x80000021 == 0x80000021 and cr4 & 0x60 == 0x60, "bits that the module fixes"
        assert self.uc.msr_read(EFER) == 0x500
        leaf = self.uc.reg_read(UC_X86_REG_RAX)
        self.tdcalls.append((leaf, rip))
        leaves = {0: self.vmcall, 1: self.info, 2: self.extend, 6: self.accept}
        self.uc.reg_write(UC_X86_REG_RAX, leaves[leaf]())
        self.uc.reg_write(UC_X86_REG_RIP, rip + 4)
        return True

    def info(self):
        answer = {
            UC_X86_REG_RCX: self.address_bits,
            UC_X86_REG_RDX: self.attributes,
            UC_X86_REG_R8: self.vcpus | self.vcpus << 32,
            UC_X86_REG_R9: self.index,
            UC_X86_REG_R10: 1,
            UC_X86_REG_R11: 0,
        }
        for register, value in answer.items():
            self.uc.reg_write(register, value)
        return 0

    def is_busy(self):
        self.busy -= 1
        return self.busy >= 0

    def accept(self):
        operand = self.uc.reg_read(UC_X86_REG_RCX)
        gpa, size = operand & ~0xFFF, {0: PAGE, 1: UNIT}[operand & 0xFFF]
        for register in (UC_X86_REG_RCX, UC_X86_REG_RDX):
            self.uc.reg_write(register, 0xBAD)
        if self.is_busy():
            return OPERAND_BUSY
        if gpa in self.accept_status:
            return self.accept_status[gpa]
        if size == UNIT and not self.large_pages:
            return SIZE_MISMATCH
        if self.refuse_page == gpa:
            return OPERAND_INVALID
        if self.replayed_page is not None and gpa <= self.replayed_page < gpa + size:
            return ALREADY_ACCEPTED
        self.make_usable(gpa, size)
        return 0

    def extend(self):
        buffer, register = self.uc.reg_read(UC_X86_REG_RCX), self.uc.reg_read(UC_X86_REG_RDX)
        assert buffer % 64 == 0 and register in range(4)
        if self.is_busy():
            return OPERAND_BUSY
        if self.extend_status:
            return self.extend_status
        self.rtmr[register] = hashlib.sha384(self.rtmr[register] + self.read(buffer, 48)).digest()
        return 0

    def vmcall(self):
        names = (UC_X86_REG_R10, UC_X86_REG_R11, UC_X86_REG_R12, UC_X86_REG_R13, UC_X86_REG_R14, UC_X86_REG_R15)
        r10, r11, *rest = (self.uc.reg_read(name) for name in names)
        mask = self.uc.reg_read(UC_X86_REG_RCX)
        assert r10 == 0 and mask & 0xFC00 == 0xFC00, "a call of the standard"
        if r11 == 0x10003:
            return self.report_fatal(mask, rest)
        assert (mask, r11, rest) == (0xFC00, 30, [4, 1, 0x604, 1]), "one port write, which tells nothing else"
        assert self.read(self.STAGED_AT, len(self.staged)) == self.staged, "nothing is written where the host can read"
        self.release_staging()
        self.port_writes.append((0x604, 4, 1))
        for name in names[1:]:
            self.uc.reg_write(name, 0xBAD)
        self.uc.reg_write(UC_X86_REG_R10, self.call_answer)
        return self.call_status

    def report_fatal(self, mask, registers):
        code, address, *text = registers
        self.fatal = struct.pack("<QQ", *text)
        assert (code & ~0xFF, address) == (0x6376_6D00, 0)
        self.terminated = ("cvmm", code & 0xFF)
        self.fatal_calls += 1
        if self.fatal_calls > self.returns:
            self.uc.emu_stop()
        return 0
