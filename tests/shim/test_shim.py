#!/usr/bin/env python3
"""The frozen shim in a CPU emulator: what it builds, and what it refuses.

    tests/shim/test_shim.py        needs the Python package `unicorn`; without it, says so and exits 77
"""

import struct
import sys
import unittest

try:
    import unicorn  # noqa: F401
except ImportError:
    print("SKIPPED: the shim in an emulator (python3 -m pip install unicorn)")
    sys.exit(77)

from machine import GHCB, KERNEL_ENTRY, PAGE, UNIT, Machine, kernel_file


def u(data, at, size):
    return int.from_bytes(data[at : at + size], "little")


def e820(page):
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    return [(start, start + length, kind) for start, length, kind in entries]


class Boots(unittest.TestCase):
    def check_kernel(self, machine):
        self.assertIsNone(machine.terminated)
        self.assertTrue(machine.ended)
        self.assertEqual(machine.rsi(), 0x120000)
        body = machine.kernel[4 * 512 :]
        self.assertEqual(machine.read(0x1000000, len(body)), body)
        page = machine.read(0x120000, PAGE)
        initrd = machine.read(u(page, 0x218, 4), u(page, 0x21C, 4))
        self.assertEqual(initrd, machine.initrd)
        self.assertEqual(machine.read(u(page, 0x228, 4), len(machine.cmdline) + 15), machine.cmdline + b" efi=noruntime\0")
        self.assertEqual(page[0x1F1:0x210], machine.kernel[0x1F1:0x210])
        self.assertEqual(page[0x210], 0xFF)
        return page

    def test_soft(self):
        machine = Machine(mode=0).run()
        page = self.check_kernel(machine)
        self.assertEqual(machine.port_writes, [(0x604, 4, 1)])
        self.assertEqual(page[0x1C0:0x1E0], bytes(32), "no EFI tables without protection")
        self.assertEqual(u(page, 0x250, 8), 0, "no setup data without protection")

    def test_snp_with_small_and_large_pages(self):
        for large in (False, True):
            machine = Machine()
            machine.large_pages = large
            page = self.check_kernel(machine.run())
            self.assertEqual(machine.port_writes, [], "SNP never executes OUT")
            self.assertEqual(machine.registered, GHCB)
            [request] = machine.requests
            self.assertEqual((u(request, 0x390, 8), u(request, 0x398, 8)), (0x7B, 0x604 << 16 | 1 << 6))
            self.assertEqual(u(request, 0x1F8, 8), 1)
            self.check_cc_blob(machine, page)

    def check_cc_blob(self, machine, page):
        node = machine.read(u(page, 0x250, 8), 20)
        self.assertEqual((u(node, 0, 8), u(node, 8, 4), u(node, 12, 4)), (0, 7, 4))
        blob = machine.read(u(node, 16, 4), 40)
        self.assertEqual(blob[:4], b"AMDE")
        self.assertEqual([u(blob, at, 8) for at in (8, 16, 24, 32)], [0x110000, PAGE, 0x111000, PAGE])

    def test_each_byte_of_ram_is_validated_once_or_left_to_the_kernel(self):
        for flags in (0, 1):
            machine = Machine()
            machine.flags, machine.large_pages = flags, True
            page = self.check_kernel(machine.run())
            self.assertEqual(len(machine.validated), len(set(machine.validated)))
            validated = set(machine.validated)
            unaccepted = self.unaccepted(machine, page)
            self.assertEqual(bool(unaccepted), bool(flags))
            for start, end, kind in e820(page):
                for gpa in range(start, end, PAGE):
                    left = gpa // UNIT in unaccepted
                    if kind == 1:
                        self.assertEqual(gpa in validated, not left, f"{gpa:#x}")
                    if kind == 3:
                        self.assertIn(gpa, validated)

    def unaccepted(self, machine, page):
        tables = self.efi_tables(machine, page)
        table = machine.read(tables["d5d1de3c-105c-44f9-9ea9-bcef98120031"], 24)
        self.assertEqual((u(table, 0, 4), u(table, 4, 4), u(table, 8, 8)), (1, UNIT, 0))
        bitmap = machine.read(tables["d5d1de3c-105c-44f9-9ea9-bcef98120031"] + 24, u(table, 16, 8))
        return {bit for bit in range(len(bitmap) * 8) if bitmap[bit // 8] >> bit % 8 & 1}

    def efi_tables(self, machine, page):
        self.assertEqual(page[0x1C0:0x1C4], b"EL64")
        system = machine.read(u(page, 0x1C4, 4), 120)
        self.assertEqual((system[:8], u(system, 12, 4)), (b"IBI SYST", 120))
        self.assertEqual(u(system, 88, 8) | u(system, 96, 8), 0, "no services")
        self.assertEqual(machine.read(u(system, 24, 8), 10), "cvmm\0".encode("utf-16-le"))
        found = {}
        for number in range(u(system, 104, 8)):
            entry = machine.read(u(system, 112, 8) + 24 * number, 24)
            a, b, c = struct.unpack("<IHH", entry[:8])
            name = f"{a:08x}-{b:04x}-{c:04x}-{entry[8:10].hex()}-{entry[10:16].hex()}"
            found[name] = u(entry, 16, 8)
        self.assertEqual(found["8868e871-e4f1-11d3-bc22-0080c73c8881"], u(page, 0x70, 8))
        self.assertIn("067b1f5f-cf26-44c5-8554-93d777912d42", found)
        return found

    def test_the_efi_memory_map_agrees_with_e820(self):
        machine = Machine().run()
        page = machine.read(0x120000, PAGE)
        length, size = u(page, 0x1D4, 4), u(page, 0x1C8, 4)
        data = machine.read(u(page, 0x1D0, 4), length)
        kinds = {7: 1, 0: 2, 9: 3}
        efi = []
        for at in range(0, length, size):
            kind, start, virtual, pages, attribute = struct.unpack_from("<QQQQQ", data, at)
            self.assertEqual((virtual, attribute), (0, 8))
            efi.append((start, start + pages * PAGE, kinds[kind]))
        self.assertEqual(efi, e820(page))

    def test_high_ram_and_no_initrd(self):
        machine = Machine()
        machine.low_top, machine.high_top = 0xC000_0000, 448 << 30
        machine.initrd = machine.named_initrd = b""
        machine.run()
        page = machine.read(0x120000, PAGE)
        self.assertTrue(machine.ended)
        self.assertEqual((u(page, 0x218, 4), u(page, 0x21C, 4)), (0, 0))
        self.assertEqual(e820(page)[-1], (4 << 30, 448 << 30, 1))
        units = self.unaccepted(machine, page)
        self.assertEqual(max(units), (448 << 30) // UNIT - 1)
        self.assertNotIn(0xC000_0000 // UNIT, units)


class Acpi(unittest.TestCase):
    def tables(self, vcpus):
        machine = Machine(mode=0)
        machine.vcpus, machine.max_vcpus = vcpus, 1024
        machine.run()
        self.assertTrue(machine.ended)
        rsdp = machine.read(u(machine.read(0x120000, PAGE), 0x70, 8), 36)
        self.assertEqual((rsdp[:8], rsdp[15], u(rsdp, 20, 4)), (b"RSD PTR ", 2, 36))
        self.assertEqual((sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF), (0, 0))
        xsdt = self.table(machine, u(rsdp, 24, 8))
        found = [self.table(machine, u(xsdt, at, 8)) for at in range(36, len(xsdt), 8)]
        names = {bytes(table[:4]): table for table in found}
        names[b"DSDT"] = self.table(machine, u(names[b"FACP"], 140, 8))
        return names

    def table(self, machine, gpa):
        table = machine.read(gpa, u(machine.read(gpa, 8), 4, 4))
        self.assertEqual(sum(table) & 0xFF, 0, f"checksum of {table[:4]}")
        return table

    def test_the_machine_is_hardware_reduced(self):
        tables = self.tables(1)
        self.assertEqual(set(tables), {b"FACP", b"APIC", b"MCFG", b"DSDT"})
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
        for vcpus in (1, 4, 255, 256, 1024):
            madt = self.tables(vcpus)[b"APIC"]
            self.assertEqual((u(madt, 36, 4), u(madt, 40, 4)), (0xFEE0_0000, 0))
            at, ids = 44, []
            while at < len(madt):
                kind, length = madt[at], madt[at + 1]
                if kind == 0:
                    self.assertEqual((length, u(madt, at + 4, 4), madt[at + 2]), (8, 1, madt[at + 3]))
                    ids.append(madt[at + 3])
                else:
                    self.assertEqual((kind, length, u(madt, at + 8, 4)), (9, 16, 1))
                    self.assertEqual(u(madt, at + 4, 4), u(madt, at + 12, 4))
                    ids.append(u(madt, at + 4, 4))
                at += length
            self.assertEqual(ids, list(range(vcpus)))


class Refuses(unittest.TestCase):
    def refused(self, code, mode=1, **changes):
        machine = Machine(mode)
        for name, value in changes.items():
            self.assertTrue(hasattr(machine, name), name)
            setattr(machine, name, value)
        machine.run()
        self.assertFalse(machine.ended)
        self.assertEqual(machine.terminated, (2 if mode == 1 else None, code), changes)
        return machine

    def test_tampered_payloads(self):
        kernel, initrd = kernel_file(), bytes(range(256)) * 391
        for mode in (0, 1):
            for at in (0, 0x1F1, 65536, len(kernel) - 1):
                other = kernel[:at] + bytes([kernel[at] ^ 1]) + kernel[at + 1 :]
                self.refused(0x08, mode, kernel=other)
            self.refused(0x09, mode, initrd=initrd[:-1] + b"x")
            for changed in (kernel + b"\0", kernel[:-1]):
                self.refused(0x06, mode, kernel=changed)
            self.refused(0x06, mode, initrd=b"")

    def test_a_kernel_that_is_named_but_cannot_be_entered(self):
        old = bytearray(kernel_file())
        old[0x206] = 0x0B
        self.refused(0x0A, kernel=bytes(old), named_kernel=bytes(old))
        wide = kernel_file(init_size=48 << 20)
        self.refused(0x07, kernel=wide, named_kernel=wide)

    def test_bad_machines(self):
        for low, high in ((0, 0), (64 << 20 | PAGE, 0), (0xC020_0000, 0), (64 << 20, 1 << 32), (64 << 20, 449 << 30)):
            self.refused(0x04, low_top=low, high_top=high)
        self.refused(0x05, vcpus=0)
        self.refused(0x05, vcpus=9)

    def test_another_mode(self):
        machine = Machine(mode=2).run()
        self.assertEqual(machine.terminated, (None, 0x01))

    def test_a_processor_that_is_not_what_the_mode_says(self):
        for status in (0, 3, 0xF):
            self.refused(0x0d, sev_status=status)
        self.refused(0x0e, c_bit=47)
        self.refused(0x0e, cpuid_count=65)
        self.refused(0x0e, cpuid_count=2)

    def test_a_hypervisor_that_misanswers(self):
        self.refused(0x0f, sev_info=0x0001_0001_3300_0001)
        self.refused(0x0f, sev_info=0)
        self.refused(0x10, features=0x2081)
        self.refused(0x11, register_answer=0xFFFF_FFFF_FFFF_F013)

    def test_memory_that_the_host_replays_or_withholds(self):
        for page in (0, 0x114000, 0x1000000, 0x3E00000):
            self.refused(0x13, replayed_page=page)
            self.refused(0x12, refuse_page=page)
        self.refused(0x13, replayed_page=0x1001000, large_pages=False)
        self.refused(0x12, refuse_page=0x1001000, large_pages=False)

    def test_the_emulated_machine_notices_memory_that_is_used_unvalidated(self):
        machine = Machine()
        machine.forgotten_page = 0x1000000
        with self.assertRaises(AssertionError):
            machine.run()


class Image(unittest.TestCase):
    def test_other_processors_are_parked(self):
        from machine import IMAGE

        self.assertEqual(IMAGE[0x10:0x14], b"\xfa\xf4\xeb\xfd", "cli; hlt; jmp back")

    def test_the_entry_point_of_the_kernel_is_where_the_protocol_says(self):
        self.assertEqual(KERNEL_ENTRY, 0x1000000 + 0x200)


if __name__ == "__main__":
    unittest.main(verbosity=2)
