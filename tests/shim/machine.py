"""A machine around a frozen shim (shim/v2.bin, or that of $MACHINE) in a CPU emulator; this one without protection.

Memory does not exist until the launch places it or the shim makes it usable, so a premature access ends the
run as it would on hardware. Instructions that the emulator does not know come to `undefined`; RDMSR and
WRMSR are caught by their addresses.
"""

import hashlib
import os
import pathlib
import struct

from unicorn import UC_ARCH_X86, UC_HOOK_CODE, UC_HOOK_INSN, UC_HOOK_INSN_INVALID, UC_MODE_64, Uc, UcError
from unicorn.x86_const import (
    UC_CPU_X86_EPYC,
    UC_X86_INS_CPUID,
    UC_X86_INS_OUT,
    UC_X86_REG_CR0,
    UC_X86_REG_CR4,
    UC_X86_REG_CS,
    UC_X86_REG_IDTR,
    UC_X86_REG_RAX,
    UC_X86_REG_RBX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDI,
    UC_X86_REG_RDX,
    UC_X86_REG_RFLAGS,
    UC_X86_REG_RIP,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
    UC_X86_REG_SS,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
MACHINE = os.environ.get("MACHINE", "v2")
IMAGE = (ROOT / f"shim/{MACHINE}.bin").read_bytes()
PAGE, UNIT = 0x1000, 0x200000
STAGING = 0x70_0000_0000
KERNEL_ENTRY = 0x1000200


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

    MODE = 0
    # Where the emulator finds the staging area; what a mapping's shared bit adds is the platform's matter.
    STAGED_AT = STAGING
    # What `terminated` holds for a reason that the shim gives.
    REASON_SET = None

    def __init__(self):
        self.mode = self.MODE
        self.flags, self.max_vcpus, self.cmdline = 1, 8, b"console=ttyS0"
        self.vcpus, self.low_top, self.high_top = 2, 64 << 20, 0
        self.kernel, self.initrd = kernel_file(), bytes(range(256)) * 391
        self.named_kernel, self.named_initrd = None, None
        self.config_change = None
        self.port_writes, self.cpuid_leaves = [], []
        self.terminated, self.ended, self.fault = None, False, None
        self.launched = set()

    def config_page(self):
        page = bytearray(PAGE)
        page[:8] = b"cvmmcfg1"
        struct.pack_into("<IIIIQQ", page, 8, 1, self.flags, 1, self.max_vcpus, 0, 448 << 30)
        page[0x28:0x50] = self.record(self.kernel, self.named_kernel)
        page[0x50:0x78] = self.record(self.initrd, self.named_initrd)
        struct.pack_into("<I", page, 0x78, len(self.cmdline))
        page[0x800 : 0x800 + len(self.cmdline)] = self.cmdline
        if self.config_change is not None:
            page[self.config_change] ^= 1
        return bytes(page)

    @staticmethod
    def record(staged, named):
        blob = staged if named is None else named
        return struct.pack("<Q32s", len(blob), hashlib.sha256(blob).digest() if blob else b"")

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

    def launch_all(self):
        self.launch(0x100000, IMAGE)
        self.launch(0x10E000, self.config_page())
        self.launch(0x112000, bytes(2 * PAGE))

    def ready(self):
        """Memory that is usable from the start, and the registers."""
        for start, end in ((0, 0x100000), (0x114000, self.low_top)):
            self.uc.mem_map(start, end - start)
        self.enter_long_mode()

    def enter_long_mode(self):
        uc = self.uc
        uc.reg_write(UC_X86_REG_CR0, uc.reg_read(UC_X86_REG_CR0) & ~4)
        uc.reg_write(UC_X86_REG_CR4, uc.reg_read(UC_X86_REG_CR4) | 0x600)
        uc.reg_write(UC_X86_REG_RSP, 0x114000)
        uc.reg_write(UC_X86_REG_RDI, self.mode)
        uc.reg_write(UC_X86_REG_RIP, 0x100000)

    def power_on(self):
        uc = self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)
        self.launch_all()
        self.staged = self.staging()
        uc.mem_map(self.STAGED_AT, len(self.staged))
        uc.mem_write(self.STAGED_AT, self.staged)
        uc.hook_add(UC_HOOK_INSN_INVALID, lambda uc, _: self.known())
        uc.hook_add(UC_HOOK_INSN, self.port_write, None, 1, 0, UC_X86_INS_OUT)
        uc.hook_add(UC_HOOK_INSN, lambda uc, _: self.cpuid(), None, 1, 0, UC_X86_INS_CPUID)
        for opcode, handler in ((b"\x0f\x32", self.rdmsr), (b"\x0f\x30", self.wrmsr)):
            at = IMAGE.find(opcode)
            while at >= 0:
                uc.hook_add(UC_HOOK_CODE, handler, None, 0x100000 + at, 0x100000 + at)
                at = IMAGE.find(opcode, at + 1)
        self.ready()
        return uc

    def run(self):
        uc = self.power_on()
        self.go(KERNEL_ENTRY)
        self.ended = uc.reg_read(UC_X86_REG_RIP) == KERNEL_ENTRY
        return self

    def go(self, until, count=0):
        uc = self.uc
        try:
            uc.emu_start(uc.reg_read(UC_X86_REG_RIP), until, count=count)
        except UcError as error:
            if self.fault is not None:
                raise self.fault
            if self.terminated is None:
                raise AssertionError(f"{error} at {uc.reg_read(UC_X86_REG_RIP):#x}") from error

    def known(self):
        """Plays an instruction that the emulator does not know; what the platform objects to ends the run."""
        try:
            return self.undefined()
        except AssertionError as fault:
            self.fault = fault
            return False

    def undefined(self):
        return False

    def cpuid(self):
        """Answers the instruction as a processor without SHA instructions does."""
        leaf = self.uc.reg_read(UC_X86_REG_RAX) & 0xFFFFFFFF
        self.cpuid_leaves.append(leaf)
        answer = self.cpuid_answer(leaf)
        for register, value in zip((UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDX), answer):
            self.uc.reg_write(register, value)
        return 1

    def cpuid_answer(self, leaf):
        return {1: (0x800F12, 0, 1 << 9 | 1 << 19, 0)}.get(leaf, (0, 0, 0, 0))

    def release_staging(self):
        self.uc.mem_unmap(self.STAGED_AT, len(self.staged))

    def port_write(self, uc, port, size, value, _):
        self.port_writes.append((port, size, value))
        if value & 0x8000_0000:
            self.terminated = (None, value & 0xFF)
            uc.emu_stop()
        elif (port, size, value) == (0x604, 4, 1):
            self.release_staging()

    def rdmsr(self, uc, rip, size, _):
        raise AssertionError(f"RDMSR at {rip:#x}")

    def wrmsr(self, uc, rip, size, _):
        raise AssertionError(f"WRMSR at {rip:#x}")

    def take_exception_at(self, address, vector):
        """Raises exception `vector` before the instruction at `address`, as the processor or a host does."""
        self.uc.hook_add(UC_HOOK_CODE, lambda *_: self.enter_handler(address, vector), None, address, address)

    def enter_handler(self, rip, vector):
        uc = self.uc
        low, high = struct.unpack("<QQ", uc.mem_read(uc.reg_read(UC_X86_REG_IDTR)[1] + vector * 16, 16))
        handler = low & 0xFFFF | low >> 32 & 0xFFFF0000 | high << 32
        assert low >> 40 & 0xFF == 0x8E and low >> 16 & 0xFFFF == uc.reg_read(UC_X86_REG_CS)
        old = uc.reg_read(UC_X86_REG_RSP)
        stack = (old & ~15) - 40
        cs, flags, ss = (uc.reg_read(name) for name in (UC_X86_REG_CS, UC_X86_REG_RFLAGS, UC_X86_REG_SS))
        uc.mem_write(stack, struct.pack("<QQQQQ", rip, cs, flags, old, ss))
        uc.reg_write(UC_X86_REG_RSP, stack)
        uc.reg_write(UC_X86_REG_RIP, handler)

    def read(self, gpa, length):
        return bytes(self.uc.mem_read(gpa, length))

    def rsi(self):
        return self.uc.reg_read(UC_X86_REG_RSI)


class Protected(Machine):
    """A machine whose guest has to make memory usable, page by page; `usable` are those it did."""

    def __init__(self):
        super().__init__()
        self.large_pages, self.refuse_page, self.replayed_page, self.forgotten_page = True, None, None, None
        self.usable = set()

    def make_usable(self, gpa, size):
        """Maps whole units at their first page: one mapping per page would take the emulator minutes."""
        assert gpa % size == 0, f"{gpa:#x} is not aligned"
        assert gpa not in self.launched, f"{gpa:#x} is part of the launch"
        assert gpa < max(self.low_top, UNIT) or gpa >= 1 << 32, f"{gpa:#x} is no RAM"
        pages = set(range(gpa, gpa + size, PAGE))
        assert not pages & self.usable, f"{gpa:#x} became usable before"
        length = UNIT if gpa % UNIT == 0 and gpa else size
        if gpa != self.forgotten_page and (gpa < UNIT or gpa % UNIT == 0):
            self.uc.mem_map(gpa, length)
            self.uc.mem_write(gpa, b"\xdb" * length)
        self.usable |= pages
