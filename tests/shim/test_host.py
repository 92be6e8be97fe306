"""An SNP guest whose host is not stock KVM: injected exceptions, cache lines left behind, a CPUID page that lies."""

import unittest

from machine import MACHINE, PAGE, UNIT, Machine
from sev import Snp
from td import Td
from test_refuse import Refusals
from unicorn import UC_HOOK_MEM_READ

NMI, GENERAL_PROTECTION, PAGE_FAULT, VMM_COMMUNICATION = 2, 13, 14, 29
VULNERABLE, COHERENT = 51 | 1 << 6, 51 | 1 << 31
# The shim's variables, and above them its stack.
STACK, STACK_END = 0x112400, 0x114000


class Touched(Snp):
    """Notes for each piece of memory that becomes usable what is read of it before the next one does."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def power_on(self):
        uc = super().power_on()
        uc.hook_add(UC_HOOK_MEM_READ, self.read_byte, None, 0, self.low_top - 1)
        return uc

    def read_byte(self, uc, access, address, size, value, _):
        if size == 1 and self.pieces:
            self.pieces[-1][2].add(address)

    def make_usable(self, gpa, size):
        super().make_usable(gpa, size)
        self.pieces.append((gpa, size, set()))


def ends(gpa, size):
    """First and last byte of each 4 KiB page."""
    return {at for page in range(gpa, gpa + size, PAGE) for at in (page, page + PAGE - 1)}


class StaleCacheLines(unittest.TestCase):
    """CVE-2025-38560: the host's lines of a page must be gone before the page is used."""

    def booted(self, **changes):
        machine = Touched()
        for name, value in changes.items():
            setattr(machine, name, value)
        self.assertTrue(machine.run().ended)
        return machine

    def touched(self, **changes):
        for gpa, size, read in self.booted(**changes).pieces:
            self.assertEqual(len(ends(gpa, size) - read), 0, f"{size:#x} bytes at {gpa:#x}")

    def test_each_small_page_is_touched_at_both_ends_before_the_next(self):
        self.touched(c_bit=VULNERABLE, large_pages=False)

    @unittest.skipIf(MACHINE == "v1", "the finding for which there is v2")
    def test_each_page_of_a_large_one_is_touched_at_both_ends(self):
        """As Linux does after PVALIDATE of 2 MiB (arch/x86/coco/sev/core.c, pvalidate_pages)."""
        self.touched(c_bit=VULNERABLE)

    @unittest.skipIf(MACHINE == "v1", "believes the host")
    def test_the_host_cannot_say_that_it_is_not_needed(self):
        """The bit is in the CPUID page, which the host composes."""
        for large in (False, True):
            self.touched(c_bit=COHERENT, large_pages=large)


class Injected(Refusals):
    def test_an_exception_or_interrupt_anywhere_ends_the_guest(self):
        places = Snp().run().places
        self.assertGreater(len(places), 4)
        for place in places:
            for vector in (NMI, GENERAL_PROTECTION, PAGE_FAULT, VMM_COMMUNICATION):
                self.refused(0x80 | vector, inject=(place, vector))


class Stack(unittest.TestCase):
    def test_a_kib_of_it_is_never_used(self):
        """Below it lie the shim's variables, and below them the CPUID page."""
        for platform in (Machine, Snp, Td):
            machine = platform()
            machine.vcpus, machine.max_vcpus, machine.cmdline = 1024, 1024, b"x" * 2047
            machine.run()
            self.assertTrue(machine.ended)
            free = machine.read(STACK, STACK_END - STACK)
            depth = len(free.lstrip(b"\0"))
            self.assertLess(depth, STACK_END - STACK - 1024, platform.__name__)
            self.assertGreater(depth, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
