"""A machine around the frozen shim (shim/v1.bin) in a CPU emulator.

Memory does not exist until the launch places it or the shim validates it, so a premature access ends the
run as it would on hardware. PVALIDATE and VMGEXIT are undefined to the emulator and come here; RDMSR and
WRMSR are caught by their addresses.
"""

import hashlib
import pathlib
import struct

from unicorn import UC_ARCH_X86, UC_HOOK_CODE, UC_HOOK_INSN, UC_HOOK_INSN_INVALID, UC_MODE_64, Uc, UcError
from unicorn.x86_const import (
    UC_X86_INS_OUT,
    UC_X86_REG_CR4,
    UC_X86_REG_CR0,
    UC_X86_REG_EFLAGS,
    UC_X86_REG_RAX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDI,
    UC_X86_REG_RDX,
    UC_X86_REG_RIP,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGE = (ROOT / "shim/v1.bin").read_bytes()
PAGE, UNIT = 0x1000, 0x200000
STAGING, GHCB = 0x70_0000_0000, 0x70_0000_1000
KERNEL_ENTRY = 0x1000200
PVALIDATE, VMGEXIT = b"\xf2\x0f\x01\xff", b"\xf3\x0f\x01\xd9"


def kernel_file(length=300_000, init_size=5 << 20):
    """A file with the header of a bzImage of protocol 2.15, filled with a pattern."""
    file = bytearray(bytes(range(251)) * (length // 251 + 1))[:length]
    file[0x1F1:0x290] = bytes(0x290 - 0x1F1)
    file[0x1F1] = 3
    file[0x1FE:0x208] = b"\x55\xaa\xeb\x6aHdrS\x0f\x02"
    struct.pack_into("<I", file, 0x230, UNIT)
    file[0x234] = 1
    struct.pack_into("<H", file, 0x236, 0x7F)
    struct.pack_into("<I", file, 0x238, 2047)
    struct.pack_into("<I", file, 0x260, init_size)
    return bytes(file)


class Machine:
    """Fields are what a test may change before `run`; results are read afterwards."""

    def __init__(self, mode=1):
        self.mode = mode
        self.flags, self.max_vcpus, self.cmdline = 1, 8, b"console=ttyS0"
        self.vcpus, self.low_top, self.high_top = 2, 64 << 20, 0
        self.kernel, self.initrd = kernel_file(), bytes(range(256)) * 391
        self.named_kernel, self.named_initrd = self.kernel, self.initrd
        self.sev_status, self.c_bit, self.cpuid_count = 0x7, 51, None
        self.sev_info, self.features = 0x0002_0001_3300_0001, 0x3081
        self.register_answer = None
        self.large_pages, self.refuse_page, self.replayed_page, self.forgotten_page = True, None, None, None
        self.validated, self.requests, self.port_writes = [], [], []
        self.terminated, self.ended, self.ghcb_msr, self.registered = None, False, 0, None
        self.launched = set()

    def config_page(self):
        page = bytearray(PAGE)
        page[:8] = b"cvmmcfg1"
        struct.pack_into("<IIIIQQ", page, 8, 1, self.flags, 1, self.max_vcpus, 0, 448 << 30)
        for at, blob in ((0x28, self.named_kernel), (0x50, self.named_initrd)):
            struct.pack_into("<Q32s", page, at, len(blob), hashlib.sha256(blob).digest())
        struct.pack_into("<I", page, 0x78, len(self.cmdline))
        page[0x800 : 0x800 + len(self.cmdline)] = self.cmdline
        return bytes(page)

    def cpuid_page(self):
        leaves = [(0, 0, 0xD, 0), (1, 0, 0x800F12, 0), (0x8000001F, 0, 0x1A, self.c_bit | 1 << 6)]
        page = bytearray(PAGE)
        struct.pack_into("<I", page, 0, len(leaves) if self.cpuid_count is None else self.cpuid_count)
        for number, (leaf, index, eax, ebx) in enumerate(leaves):
            struct.pack_into("<IIQQII", page, 16 + 48 * number, leaf, index, 0, 0, eax, ebx)
        return bytes(page)

    def staging(self):
        initrd_at = -(-(UNIT + len(self.kernel)) // UNIT) * UNIT
        area = bytearray(initrd_at + len(self.initrd))
        place = (STAGING + UNIT, len(self.kernel), STAGING + initrd_at, len(self.initrd), 0)
        head = (1, self.vcpus, self.low_top, self.high_top, *place)
        area[:0x48] = b"cvmmdsc1" + struct.pack("<IIQQQQQQQ", *head)
        area[UNIT : UNIT + len(self.kernel)] = self.kernel
        area[initrd_at:] = self.initrd
        return bytes(area) + bytes(-len(area) % PAGE)

    def launch(self, gpa, content):
        content += bytes(-len(content) % PAGE)
        self.uc.mem_map(gpa, len(content))
        self.uc.mem_write(gpa, content)
        self.launched |= set(range(gpa, gpa + len(content), PAGE))

    def run(self):
        uc = self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.launch(0x100000, IMAGE)
        self.launch(0x10E000, self.config_page())
        if self.mode == 1:
            self.launch(0x110000, b"\x5e" * PAGE)
            self.launch(0x111000, self.cpuid_page())
        self.launch(0x112000, bytes(2 * PAGE))
        if self.mode == 0:
            for start, end in ((0, 0x100000), (0x114000, self.low_top)):
                uc.mem_map(start, end - start)
        staging = self.staging()
        uc.mem_map(STAGING, len(staging))
        uc.mem_write(STAGING, staging)
        uc.hook_add(UC_HOOK_INSN_INVALID, lambda uc, _: self.undefined())
        uc.hook_add(UC_HOOK_INSN, self.port_write, None, 1, 0, UC_X86_INS_OUT)
        for opcode, handler in ((b"\x0f\x32", self.rdmsr), (b"\x0f\x30", self.wrmsr)):
            at = IMAGE.find(opcode)
            while at >= 0:
                uc.hook_add(UC_HOOK_CODE, handler, None, 0x100000 + at, 0x100000 + at)
                at = IMAGE.find(opcode, at + 1)
        uc.reg_write(UC_X86_REG_CR0, uc.reg_read(UC_X86_REG_CR0) & ~4)
        uc.reg_write(UC_X86_REG_CR4, uc.reg_read(UC_X86_REG_CR4) | 0x600)
        uc.reg_write(UC_X86_REG_RSP, 0x114000)
        uc.reg_write(UC_X86_REG_RDI, self.mode)
        try:
            uc.emu_start(0x100000, KERNEL_ENTRY)
        except UcError as error:
            if self.terminated is None:
                raise AssertionError(f"{error} at {uc.reg_read(UC_X86_REG_RIP):#x}") from error
        self.ended = uc.reg_read(UC_X86_REG_RIP) == KERNEL_ENTRY
        return self

    def undefined(self):
        rip = self.uc.reg_read(UC_X86_REG_RIP)
        code = bytes(self.uc.mem_read(rip, 4))
        if code == PVALIDATE:
            self.pvalidate()
        elif code == VMGEXIT:
            self.vmgexit()
        else:
            return False
        self.uc.reg_write(UC_X86_REG_RIP, rip + 4)
        return True

    def pvalidate(self):
        gpa, large = self.uc.reg_read(UC_X86_REG_RAX), self.uc.reg_read(UC_X86_REG_RCX)
        assert self.uc.reg_read(UC_X86_REG_RDX) == 1, "the shim never rescinds a page"
        size = UNIT if large else PAGE
        assert gpa % size == 0, f"{gpa:#x} is not aligned"
        code, carry = 0, 0
        if large and not self.large_pages:
            code = 6
        elif self.refuse_page == gpa:
            code = 1
        elif self.replayed_page is not None and gpa <= self.replayed_page < gpa + size:
            carry = 1
        else:
            assert gpa not in self.launched, f"{gpa:#x} was validated by the launch"
            if gpa != self.forgotten_page:
                self.uc.mem_map(gpa, size)
                self.uc.mem_write(gpa, b"\xdb" * size)
            self.validated += range(gpa, gpa + size, PAGE)
        self.uc.reg_write(UC_X86_REG_RAX, code)
        flags = self.uc.reg_read(UC_X86_REG_EFLAGS) & ~1
        self.uc.reg_write(UC_X86_REG_EFLAGS, flags | carry)

    def vmgexit(self):
        value = self.ghcb_msr
        kind = value & 0xFFF
        if kind == 0x002:
            self.ghcb_msr = self.sev_info
        elif kind == 0x080:
            self.ghcb_msr = self.features
        elif kind == 0x012:
            self.registered = value & ~0xFFF
            self.ghcb_msr = value | 1 if self.register_answer is None else self.register_answer
        elif kind == 0x100:
            self.terminated = (value >> 12 & 0xF, value >> 16 & 0xFF)
            self.uc.emu_stop()
        elif kind == 0:
            assert value == self.registered, "an unregistered GHCB"
            self.requests.append(bytes(self.uc.mem_read(value, PAGE)))
            self.uc.mem_unmap(STAGING, len(self.staging()))
        else:
            raise AssertionError(f"unknown GHCB MSR value {value:#x}")

    def port_write(self, uc, port, size, value, _):
        self.port_writes.append((port, size, value))
        if value & 0x8000_0000:
            self.terminated = (None, value & 0xFF)
            uc.emu_stop()
        elif (port, size, value) == (0x604, 4, 1):
            uc.mem_unmap(STAGING, len(self.staging()))

    def rdmsr(self, uc, rip, size, _):
        msr = uc.reg_read(UC_X86_REG_RCX)
        value = {0xC0010131: self.sev_status, 0xC0010130: self.ghcb_msr}[msr]
        uc.reg_write(UC_X86_REG_RAX, value & 0xFFFFFFFF)
        uc.reg_write(UC_X86_REG_RDX, value >> 32)
        uc.reg_write(UC_X86_REG_RIP, rip + 2)

    def wrmsr(self, uc, rip, size, _):
        assert uc.reg_read(UC_X86_REG_RCX) == 0xC0010130
        self.ghcb_msr = uc.reg_read(UC_X86_REG_RDX) << 32 | uc.reg_read(UC_X86_REG_RAX) & 0xFFFFFFFF
        uc.reg_write(UC_X86_REG_RIP, rip + 2)

    def read(self, gpa, length):
        return bytes(self.uc.mem_read(gpa, length))

    def rsi(self):
        return self.uc.reg_read(UC_X86_REG_RSI)
