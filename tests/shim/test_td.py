"""A trust domain: its entry, its other processors, its measurements, and a module or host that misbehaves."""

import hashlib
import struct
import unittest

from handover import Handover
from machine import PAGE, Machine
from sev import Snp
from td import EFER, MAILBOX, OPERAND_BUSY, OPERAND_INVALID, RESET_PAGE, SIZE_MISMATCH, Td
from test_refuse import Refusals
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_CS,
    UC_X86_REG_DS,
    UC_X86_REG_RFLAGS,
    UC_X86_REG_RIP,
    UC_X86_REG_RSP,
)

NOWHERE = (1 << 64) - 1
KERNEL_PAGES, WAKE_UP = 0x300000, 0x301000
WAKE, TEST = 1, 2


def sha384(data):
    return hashlib.sha384(data).digest()


class Entry(unittest.TestCase):
    def test_the_boot_processor_comes_from_the_reset_vector_to_the_kernel(self):
        machine = Td().run()
        self.assertTrue(machine.ended)
        self.assertEqual(machine.uc.reg_read(UC_X86_REG_CR3), 0x10C000)
        self.assertEqual(machine.uc.reg_read(UC_X86_REG_CR4), 0x660)
        self.assertEqual(machine.uc.reg_read(UC_X86_REG_CR0), 0x80000031)
        self.assertEqual(machine.uc.reg_read(UC_X86_REG_CS), 0x10)
        self.assertEqual(machine.uc.reg_read(UC_X86_REG_RFLAGS) & 0x200, 0, "interrupts stay off")
        self.assertEqual(machine.port_writes, [(0x604, 4, 1)], "by a call, the staging area is released")
        self.assertEqual(set(machine.cpuid_leaves), {1, 7, 0x21}, "none that traps")

    def test_small_pages(self):
        machine = Td()
        machine.large_pages, machine.flags = False, 0
        machine.run()
        self.assertTrue(machine.ended)
        launched = {gpa for gpa in machine.launched if gpa < 1 << 32}
        unused = set(range(0x100000, 0x110000, PAGE)) - launched
        self.assertEqual(machine.usable | launched - {RESET_PAGE} | unused, set(range(0, machine.low_top, PAGE)))

    def test_the_first_mib_is_accepted_and_zero(self):
        machine = Td().run()
        self.assertEqual(machine.read(0, 0x100000), bytes(0x100000))

    def test_private_and_shared_mappings_lead_to_different_memory(self):
        """The emulated machine notices page tables that forget the shared bit."""
        machine = Td()
        machine.shared = 0
        with self.assertRaises(AssertionError):
            machine.run()

    def test_a_busy_module_is_asked_again(self):
        machine = Td()
        machine.busy = 1000
        self.assertTrue(machine.run().ended)


class Processors(unittest.TestCase):
    """The others, which wait in the mailbox; index 1 of 2, the kernel's side played here."""

    def setUp(self):
        self.machine = machine = Td()
        machine.index = 1
        self.uc = machine.power_on()
        self.uc.mem_map(KERNEL_PAGES, 0x10000)
        machine.go(NOWHERE, 5000)

    def waits(self):
        """Runs on and checks that the processor does nothing but read the mailbox."""
        self.machine.go(NOWHERE, 5000)
        rip = self.uc.reg_read(UC_X86_REG_RIP)
        code = self.machine.read(rip - rip % 16 - 0x20, 0x60)
        self.assertIn(b"\xf3\x90", code, f"a loop with PAUSE, at {rip:#x}")
        self.assertTrue(0x100020 < rip < 0x100080, f"{rip:#x}")

    def command(self, command, apic_id=1, vector=WAKE_UP):
        """As Linux does: the command is written last."""
        self.uc.mem_write(MAILBOX + 4, struct.pack("<IQ", apic_id, vector))
        self.uc.mem_write(MAILBOX, struct.pack("<H", command))

    def pending(self):
        return struct.unpack("<H", self.machine.read(MAILBOX, 2))[0]

    def woken(self):
        self.machine.go(WAKE_UP, 5000)
        self.assertEqual(self.uc.reg_read(UC_X86_REG_RIP), WAKE_UP)
        self.assertEqual(self.pending(), 0, "the command is acknowledged")
        self.assertEqual(self.uc.reg_read(UC_X86_REG_CS), 0x10)
        self.assertEqual(self.uc.msr_read(EFER), 0x500)
        self.assertEqual(self.uc.reg_read(UC_X86_REG_CR3), 0x10C000)
        self.assertEqual(self.uc.reg_read(UC_X86_REG_RFLAGS) & 0x200, 0)

    def test_they_wait_and_touch_nothing(self):
        before = {gpa: self.machine.read(gpa, PAGE) for gpa in self.machine.launched}
        self.waits()
        self.assertEqual({gpa: self.machine.read(gpa, PAGE) for gpa in self.machine.launched}, before)
        self.assertEqual((self.machine.usable, self.machine.cpuid_leaves), (set(), []))
        self.assertEqual([leaf for leaf, _ in self.machine.tdcalls], [1])

    def test_they_wake_at_their_own_command_alone(self):
        for command, apic_id in ((WAKE, 0), (WAKE, 2), (WAKE, 1 << 31 | 1), (TEST, 2), (3, 1), (0xFFFF, 1)):
            self.command(command, apic_id)
            self.waits()
            self.assertEqual(self.pending(), command, "it is not for this processor")
            self.uc.mem_write(MAILBOX, bytes(2))
            self.waits()
        self.command(WAKE)
        self.woken()

    def test_they_answer_the_test_and_wait_on(self):
        self.command(TEST)
        self.waits()
        self.assertEqual(self.pending(), 0)
        self.command(WAKE)
        self.woken()

    def test_a_kernel_gives_them_back_and_the_next_one_wakes_them(self):
        """Linux, asm_acpi_mp_play_dead: global pages off, tables that map the reset page alone, a jump."""
        self.command(WAKE)
        self.woken()
        tables = bytearray(4 * PAGE)
        for number, entry in ((0, 0), (1, 3), (2, 511)):
            struct.pack_into("<Q", tables, number * PAGE + entry * 8, KERNEL_PAGES + 0x2000 + (number + 1) * PAGE | 3)
        struct.pack_into("<Q", tables, 3 * PAGE + 511 * 8, RESET_PAGE | 3)
        self.uc.mem_write(KERNEL_PAGES + 0x2000, bytes(tables))
        uc = self.uc
        uc.reg_write(UC_X86_REG_CR0, 0x80050033)
        uc.reg_write(UC_X86_REG_CR4, 0x20 | 0x40 | 0x200 | 0x400 | 1 << 17)
        uc.reg_write(UC_X86_REG_CR3, KERNEL_PAGES + 0x2000)
        uc.reg_write(UC_X86_REG_DS, 0)
        uc.reg_write(UC_X86_REG_RSP, 0xBAD)
        uc.reg_write(UC_X86_REG_RIP, Handover(Td().run()).madt()[1][0][2])
        self.machine.go(NOWHERE, 5000)
        self.command(TEST)
        self.waits()
        self.assertEqual(self.pending(), 0)
        self.assertEqual(uc.reg_read(UC_X86_REG_CR4), 0x660)
        self.command(WAKE)
        self.woken()


class Measurements(unittest.TestCase):
    def test_the_registers_hold_what_was_booted_and_the_log_leads_to_them(self):
        for initrd in (b"some initrd" * 1000, b""):
            machine = Td()
            machine.initrd, machine.cmdline = initrd, b"quiet ro"
            machine.run()
            kernel = struct.pack("<Q", len(machine.kernel)) + hashlib.sha256(machine.kernel).digest()
            disk = struct.pack("<Q", len(initrd)) + (hashlib.sha256(initrd).digest() if initrd else bytes(32))
            zero = bytes(48)
            one = sha384(sha384(zero + sha384(kernel)) + sha384(disk))
            two = sha384(zero + sha384(b"quiet ro"))
            self.assertEqual(machine.rtmr, [zero, one, two, zero])
            events, registers = Handover(machine).log()
            self.assertEqual(registers, machine.rtmr)
            expected = []
            for register, tag, data in ((2, 0x63766D01, kernel), (2, 0x63766D02, disk), (3, 0x63766D03, b"quiet ro")):
                expected.append((register, 6, sha384(data), struct.pack("<II", tag, len(data)) + data))
            self.assertEqual(events, expected)

    def test_the_longest_command_line_fits_the_log(self):
        machine = Td()
        machine.cmdline = b"x" * 2047
        machine.run()
        self.assertEqual(Handover(machine).log()[1], machine.rtmr)

    def test_nothing_is_measured_before_everything_is_verified(self):
        machine = Td()
        machine.named_initrd = b"another"
        self.assertEqual(machine.run().rtmr, [bytes(48)] * 4)

    def test_other_platforms_have_no_log(self):
        for platform in (Machine, Snp):
            self.assertNotIn(b"CCEL", Handover(platform().run()).acpi)


class Refuses(Refusals):
    def test_a_td_that_is_not_made_as_it_must_be(self):
        for bits in (0, 47, 52):
            self.refused(0x15, Td, address_bits=bits)
        for attributes in (0, 1, 1 << 28 | 1, 1 << 27):
            self.refused(0x16, Td, attributes=attributes)

    def test_a_module_that_refuses(self):
        for status in (OPERAND_INVALID, OPERAND_BUSY, 1, 1 << 63):
            self.refused(0x18, Td, extend_status=status)
            self.refused(0x17, Td, accept_status={0x114000: status})
        self.refused(0x17, Td, accept_status={0x114000: SIZE_MISMATCH})

    def test_a_host_that_refuses_the_release(self):
        for status, answer in ((1, 0), (0, 1), (0, 1 << 63)):
            self.refused(0x19, Td, call_status=status, call_answer=answer)

    def test_a_host_that_returns_from_a_fatal_error_is_told_again(self):
        machine = self.refused(0x15, Td, address_bits=52, returns=3)
        self.assertEqual(machine.fatal_calls, 4)
        self.assertEqual(machine.fatal, b"cvmmshim: 0x15\0\0")

    def test_a_virtualization_exception_anywhere_ends_the_td(self):
        machine = Td().run()
        places = {rip for _, rip in machine.tdcalls[1:]}
        self.assertGreater(len(places), 3)
        for place in places:
            self.refused(0x94, Td, trap_at=place)


if __name__ == "__main__":
    unittest.main(verbosity=2)
