"""What the shim hands to the kernel, read as the kernel and its user space read it; written from the
specifications and sharing nothing with the shim. Whatever is malformed is an AssertionError.
"""

import hashlib
import struct

from machine import PAGE, UNIT

ACPI_20 = "8868e871-e4f1-11d3-bc22-0080c73c8881"
UNACCEPTED = "d5d1de3c-105c-44f9-9ea9-bcef98120031"
CC_BLOB = "067b1f5f-cf26-44c5-8554-93d777912d42"
RAM, RESERVED, ACPI, NVS = 1, 2, 3, 4


def u(data, at, size):
    return int.from_bytes(data[at : at + size], "little")


class Handover:
    def __init__(self, machine):
        self.machine = machine
        self.page = machine.read(machine.rsi(), PAGE)
        self.e820 = self.read_e820()
        self.cmdline = self.string(u(self.page, 0x228, 4) | u(self.page, 0xC8, 4) << 32)
        at, length = (u(self.page, low, 4) | u(self.page, high, 4) << 32 for low, high in ((0x218, 0xC0), (0x21C, 0xC4)))
        self.initrd = machine.read(at, length) if length else b""
        self.initrd_at = at
        self.setup_data = self.read_setup_data()
        self.efi = self.read_efi() if self.page[0x1C0:0x1C4] == b"EL64" else None
        self.unaccepted = self.read_unaccepted() if self.efi else set()
        self.acpi = self.read_acpi()

    def string(self, gpa):
        return self.machine.read(gpa, PAGE).split(b"\0")[0]

    def read_e820(self):
        entries = [struct.unpack_from("<QQI", self.page, 0x2D0 + 20 * n) for n in range(self.page[0x1E8])]
        ranges = [(start, start + length, kind) for start, length, kind in entries]
        assert all(length for _, length, _ in entries)
        assert all(one[1] <= two[0] for one, two in zip(ranges, ranges[1:])), "ascending and disjoint"
        return ranges

    def kind(self, gpa):
        kinds = [kind for start, end, kind in self.e820 if start <= gpa < end]
        return kinds[0] if kinds else None

    def read_setup_data(self):
        """Type and data of each node."""
        nodes, at = [], u(self.page, 0x250, 8)
        while at:
            following, kind, length = struct.unpack("<QII", self.machine.read(at, 16))
            nodes.append((kind, self.machine.read(at + 16, length)))
            at = following
        return nodes

    def read_efi(self):
        """The configuration tables; the memory map must agree with e820."""
        assert u(self.page, 0x1D8, 8) == 0, "all below 4 GiB"
        system = self.machine.read(u(self.page, 0x1C4, 4), 120)
        assert (system[:8], u(system, 12, 4)) == (b"IBI SYST", 120)
        assert u(system, 88, 8) | u(system, 96, 8) == 0, "no services"
        assert self.machine.read(u(system, 24, 8), 10) == "cvmm\0".encode("utf-16-le")
        size, version, at, length = struct.unpack_from("<IIII", self.page, 0x1C8)
        assert (size, version) == (40, 1)
        assert self.efi_map(self.machine.read(at, length)) == self.e820
        found = {}
        for number in range(u(system, 104, 8)):
            entry = self.machine.read(u(system, 112, 8) + 24 * number, 24)
            a, b, c = struct.unpack("<IHH", entry[:8])
            name = f"{a:08x}-{b:04x}-{c:04x}-{entry[8:10].hex()}-{entry[10:16].hex()}"
            assert name not in found
            found[name] = u(entry, 16, 8)
        assert found[ACPI_20] == u(self.page, 0x70, 8)
        return found

    @staticmethod
    def efi_map(data):
        kinds = {7: RAM, 0: RESERVED, 9: ACPI, 10: NVS}
        ranges = []
        for at in range(0, len(data), 40):
            kind, start, virtual, pages, attribute = struct.unpack_from("<QQQQQ", data, at)
            assert (virtual, attribute) == (0, 8)
            ranges.append((start, start + pages * PAGE, kinds[kind]))
        return ranges

    def read_unaccepted(self):
        """Numbers of the 2 MiB units that the kernel has to make usable."""
        at = self.efi[UNACCEPTED]
        version, unit, base, length = struct.unpack("<IIQQ", self.machine.read(at, 24))
        assert (version, unit, base) == (1, UNIT, 0)
        bitmap = self.machine.read(at + 24, length)
        return {bit for bit in range(length * 8) if bitmap[bit // 8] >> bit % 8 & 1}

    def read_acpi(self):
        rsdp = self.machine.read(u(self.page, 0x70, 8), 36)
        assert (rsdp[:8], rsdp[15], u(rsdp, 20, 4)) == (b"RSD PTR ", 2, 36)
        assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
        xsdt = self.table(u(rsdp, 24, 8))
        assert xsdt[:4] == b"XSDT"
        found = [self.table(u(xsdt, at, 8)) for at in range(36, len(xsdt), 8)]
        names = {bytes(table[:4]): table for table in found}
        assert len(names) == len(found)
        names[b"DSDT"] = self.table(u(names[b"FACP"], 140, 8))
        return names

    def table(self, gpa):
        table = self.machine.read(gpa, u(self.machine.read(gpa, 8), 4, 4))
        assert sum(table) & 0xFF == 0, f"checksum of {table[:4]}"
        assert self.kind(gpa) == ACPI
        return table

    def madt(self):
        """APIC ids of the processors, and the wake-up structures."""
        madt = self.acpi[b"APIC"]
        assert (u(madt, 36, 4), u(madt, 40, 4)) == (0xFEE0_0000, 0)
        at, ids, wakeups = 44, [], []
        while at < len(madt):
            kind, length = madt[at], madt[at + 1]
            if kind == 0:
                assert (length, u(madt, at + 4, 4), madt[at + 2]) == (8, 1, madt[at + 3])
                ids.append(madt[at + 3])
            elif kind == 9:
                assert (length, u(madt, at + 2, 2), u(madt, at + 8, 4)) == (16, 0, 1)
                assert u(madt, at + 4, 4) == u(madt, at + 12, 4)
                ids.append(u(madt, at + 4, 4))
            else:
                assert (kind, length, u(madt, at + 4, 4)) == (0x10, 24, 0)
                wakeups.append((u(madt, at + 2, 2), u(madt, at + 8, 8), u(madt, at + 16, 8)))
            at += length
        assert at == len(madt)
        return ids, wakeups

    def log(self):
        """The measurements in the CC event log, as (register, type, digest, event), and the registers that
        result from them."""
        ccel = self.acpi[b"CCEL"]
        assert (len(ccel), ccel[36:40]) == (56, bytes([2, 0, 0, 0])), "TDX"
        length, at = struct.unpack_from("<QQ", ccel, 40)
        assert self.kind(at) == self.kind(at + length - 1) == ACPI
        area = self.machine.read(at, length)
        register, kind, digest, size = struct.unpack_from("<II20sI", area)
        assert (register, kind, digest) == (0, 3, bytes(20))
        head = area[32 : 32 + size]
        signature, platform, minor, major, errata, integers, count = struct.unpack_from("<16sIBBBBI", head)
        assert (signature, platform, major, integers, count) == (b"Spec ID Event03\0", 0, 2, 2, 1)
        assert struct.unpack_from("<HHB", head, 28) == (0xC, 48, 0) and size == 33
        events, at, registers = [], 32 + size, [bytes(48)] * 5
        while u(area, at, 4) != 0xFFFFFFFF:
            register, kind, digests, algorithm, digest, size = struct.unpack_from("<IIIH48sI", area, at)
            assert (digests, algorithm) == (1, 0xC) and register in range(1, 5)
            event = area[at + 66 : at + 66 + size]
            assert len(event) == size
            registers[register] = hashlib.sha384(registers[register] + digest).digest()
            events.append((register, kind, digest, event))
            at += 66 + size
        assert set(area[at:]) == {0xFF}
        return events, registers[1:]
