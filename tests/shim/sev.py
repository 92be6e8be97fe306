"""An SNP guest: the emulator's hypervisor, GHCB MSR and page validation."""

import struct

from machine import PAGE, STAGING, UNIT, Protected
from unicorn.x86_const import (
    UC_X86_REG_EFLAGS,
    UC_X86_REG_RAX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDX,
    UC_X86_REG_RIP,
)

GHCB = STAGING + PAGE
PVALIDATE, VMGEXIT = b"\xf2\x0f\x01\xff", b"\xf3\x0f\x01\xd9"


class Snp(Protected):
    MODE = 1
    REASON_SET = 2

    def __init__(self):
        super().__init__()
        self.sev_status, self.c_bit, self.cpuid_count = 0x7, 51, None
        self.sev_info, self.features = 0x0002_0001_3300_0001, 0x3081
        self.register_answer = None
        self.requests, self.ghcb_msr, self.registered = [], 0, None
        # An address and a vector: the host injects that exception there. Where PVALIDATE and VMGEXIT were executed.
        self.inject, self.places = None, set()

    def launch_all(self):
        super().launch_all()
        self.launch(0x110000, b"\x5e" * PAGE)
        self.launch(0x111000, self.cpuid_page())

    def ready(self):
        self.enter_long_mode()
        if self.inject is not None:
            self.take_exception_at(*self.inject)

    def cpuid_page(self):
        leaves = [(0, 0, 0xD, 0), (1, 0, 0x800F12, 0), (0x8000001F, 0, 0x1A, self.c_bit | 1 << 6)]
        page = bytearray(PAGE)
        struct.pack_into("<I", page, 0, len(leaves) if self.cpuid_count is None else self.cpuid_count)
        for number, (leaf, index, eax, ebx) in enumerate(leaves):
            struct.pack_into("<IIQQII", page, 16 + 48 * number, leaf, index, 0, 0, eax, ebx)
        return bytes(page)

    def cpuid(self):
        raise AssertionError("CPUID traps on SNP")

    def undefined(self):
        rip = self.uc.reg_read(UC_X86_REG_RIP)
        code = bytes(self.uc.mem_read(rip, 4))
        if code == PVALIDATE:
            self.pvalidate()
        elif code == VMGEXIT:
            self.vmgexit()
        else:
            return False
        self.places.add(rip)
        self.uc.reg_write(UC_X86_REG_RIP, rip + 4)
        return True

    def pvalidate(self):
        gpa, large = self.uc.reg_read(UC_X86_REG_RAX), self.uc.reg_read(UC_X86_REG_RCX)
        assert self.uc.reg_read(UC_X86_REG_RDX) == 1, "the shim never rescinds a page"
        size = UNIT if large else PAGE
        code, carry = 0, 0
        if large and not self.large_pages:
            code = 6
        elif self.refuse_page == gpa:
            code = 1
        elif self.replayed_page is not None and gpa <= self.replayed_page < gpa + size:
            carry = 1
        else:
            self.make_usable(gpa, size)
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
            self.requests.append(self.read(value, PAGE))
            staged = self.staged[:PAGE] + self.requests[-1] + self.staged[2 * PAGE :]
            assert self.read(STAGING, len(staged)) == staged, "the host can read the request and nothing else"
            self.release_staging()
        else:
            raise AssertionError(f"unknown GHCB MSR value {value:#x}")

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
