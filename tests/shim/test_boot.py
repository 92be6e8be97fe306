"""What a kernel finds when the shim enters it, on every platform."""

import unittest

from handover import ACPI, CC_BLOB, NVS, RAM, RESERVED, UNACCEPTED, Handover, u
from machine import IMAGE, KERNEL_ENTRY, MACHINE, PAGE, UNIT, Machine
from sev import GHCB, Snp
from td import Td

LOW = [(0, 0xA0000, RAM)]
PLATFORMS = {
    Machine: LOW + [(0x100000, 0x120000, RESERVED)],
    Snp: LOW + [(0x100000, 0x120000, RESERVED)],
    Td: LOW + [(0x100000, 0x10F000, RESERVED), (0x10F000, 0x110000, NVS), (0x110000, 0x120000, RESERVED)],
}


def booted(machine):
    machine.run()
    assert machine.terminated is None and machine.ended, machine.terminated
    return Handover(machine)


class Boots(unittest.TestCase):
    def test_the_kernel_finds_its_files_and_its_command_line(self):
        for platform in PLATFORMS:
            with self.subTest(platform=platform.__name__):
                machine = platform()
                found = booted(machine)
                body = machine.kernel[4 * 512 :]
                self.assertEqual(machine.read(0x1000000, len(body)), body)
                self.assertEqual(found.initrd, machine.initrd)
                words = machine.cmdline, b"efi=noruntime"
                self.assertEqual(found.cmdline, b" ".join(words if MACHINE == "v1" else reversed(words)))
                self.assertEqual(found.page[0x1F1:0x210], machine.kernel[0x1F1:0x210])
                self.assertEqual((found.page[0x210], found.page[0x211] & 1), (0xFF, 1))

    def test_the_memory_map(self):
        for platform, low in PLATFORMS.items():
            with self.subTest(platform=platform.__name__):
                reset = [(0xFFFFF000, 1 << 32, RESERVED)] if platform is Td else []
                rest = [(0x120000, UNIT, ACPI), (UNIT, 64 << 20, RAM), (0xE0000000, 0xE0100000, RESERVED)]
                self.assertEqual(booted(platform()).e820, low + rest + reset)

    def test_without_protection_there_are_no_tables_of_it(self):
        machine = Machine()
        found = booted(machine)
        self.assertEqual(machine.port_writes, [(0x604, 4, 1)])
        self.assertEqual((found.efi, found.setup_data), (None, []))

    def test_efi_tables_name_what_the_platform_has(self):
        for platform, more in ((Snp, {CC_BLOB}), (Td, set())):
            found = booted(platform())
            self.assertEqual(set(found.efi) - {UNACCEPTED}, {"8868e871-e4f1-11d3-bc22-0080c73c8881"} | more)

    def test_snp_with_small_and_large_pages(self):
        for large in (False, True):
            machine = Snp()
            machine.large_pages = large
            found = booted(machine)
            self.assertEqual(machine.port_writes, [], "SNP never executes OUT")
            self.assertEqual(machine.registered, GHCB)
            [request] = machine.requests
            self.assertEqual((u(request, 0x390, 8), u(request, 0x398, 8)), (0x7B, 0x604 << 16 | 1 << 6))
            self.assertEqual(u(request, 0x1F8, 8), 1)
            [(kind, data)] = found.setup_data
            self.assertEqual((kind, u(data, 0, 4)), (7, found.efi[CC_BLOB]))
            blob = machine.read(u(data, 0, 4), 40)
            self.assertEqual(blob[:4], b"AMDE")
            self.assertEqual([u(blob, at, 8) for at in (8, 16, 24, 32)], [0x110000, PAGE, 0x111000, PAGE])

    def test_each_byte_of_ram_becomes_usable_once_or_is_left_to_the_kernel(self):
        for platform in (Snp, Td):
            for lazy in (0, 1):
                with self.subTest(platform=platform.__name__, lazy=lazy):
                    machine = platform()
                    machine.flags = lazy
                    found = booted(machine)
                    usable = machine.usable
                    self.assertEqual(bool(found.unaccepted), bool(lazy))
                    for start, end, kind in found.e820:
                        for gpa in range(start, end, PAGE):
                            left = gpa // UNIT in found.unaccepted
                            if kind == RAM:
                                self.assertEqual(gpa in usable, not left, f"{gpa:#x}")
                            if kind == ACPI:
                                self.assertIn(gpa, usable)

    def test_high_ram_and_no_initrd(self):
        for platform in (Snp, Td):
            machine = platform()
            machine.low_top, machine.high_top = 0xC000_0000, 448 << 30
            machine.initrd = b""
            found = booted(machine)
            self.assertEqual((found.initrd_at, found.initrd), (0, b""))
            self.assertEqual(found.e820[-1], (4 << 30, 448 << 30, RAM))
            self.assertIn(4 * 512, found.unaccepted)
            self.assertNotIn(3 * 512, found.unaccepted)

    def test_the_longest_command_line_is_left_alone(self):
        machine = Machine()
        machine.cmdline = b"x" * 2047
        self.assertEqual(booted(machine).cmdline, machine.cmdline)


class Acpi(unittest.TestCase):
    def test_the_machine_is_hardware_reduced(self):
        for platform in PLATFORMS:
            tables = booted(platform()).acpi
            more = {b"CCEL"} if platform is Td else set()
            self.assertEqual(set(tables), {b"FACP", b"APIC", b"MCFG", b"DSDT"} | more)
            fadt = tables[b"FACP"]
            self.assertEqual((fadt[8], len(fadt)), (6, 276))
            self.assertTrue(u(fadt, 112, 4) & 1 << 20, "hardware-reduced")
            self.assertTrue(u(fadt, 112, 4) & 1 << 10, "reset register")
            self.assertEqual(u(fadt, 109, 2), 0x24, "no VGA, no RTC, no 8042, no legacy devices")
            for at, port in ((116, 0x602), (244, 0x600), (256, 0x601)):
                self.assertEqual(fadt[at : at + 12], bytes([1, 8, 0, 1]) + port.to_bytes(8, "little"))
            self.assertEqual(fadt[128], 1)
            self.assertEqual(u(fadt, 40, 4), u(fadt, 140, 8))
            mcfg = tables[b"MCFG"]
            self.assertEqual((len(mcfg), u(mcfg, 44, 8), mcfg[52:56]), (60, 0xE000_0000, bytes(4)))

    def test_processors_have_their_index_as_apic_id(self):
        for platform in (Machine, Td):
            for vcpus in (1, 4, 255, 256, 1024):
                machine = platform()
                machine.vcpus, machine.max_vcpus = vcpus, 1024
                ids, wakeups = booted(machine).madt()
                self.assertEqual(ids, list(range(vcpus)))
                self.assertEqual(wakeups, [(1, 0x10F000, 0xFFFFF000)] if platform is Td else [])


class Image(unittest.TestCase):
    def test_other_processors_are_parked(self):
        self.assertEqual(IMAGE[0x10:0x14], b"\xfa\xf4\xeb\xfd", "cli; hlt; jmp back")

    def test_the_entry_point_of_the_kernel_is_where_the_protocol_says(self):
        self.assertEqual(KERNEL_ENTRY, 0x1000000 + 0x200)


if __name__ == "__main__":
    unittest.main(verbosity=2)
