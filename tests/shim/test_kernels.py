"""Debian's stock kernels, unmodified, up to their 64-bit entry point."""

import pathlib
import struct
import subprocess
import unittest

from handover import RAM, Handover, u
from machine import ROOT, UNIT
from sev import Snp
from td import Td

RAM_TOP = 512 << 20


def file(name):
    """A file of the test guests, made and cached by scripts/guest."""
    made = subprocess.run([ROOT / "scripts/guest", name], capture_output=True, text=True)
    if made.returncode:
        raise unittest.SkipTest(f"scripts/guest {name}: {(made.stderr or made.stdout).strip()}")
    return pathlib.Path(made.stdout.strip()).read_bytes()


class StockKernels(unittest.TestCase):
    def test_they_are_entered_with_everything_in_place(self):
        # The emulator has no SHA instructions and hashes some 5 MB/s: the start of an initrd will do.
        for flavour, platforms in (("amd64", (Td, Snp)), ("cloud", (Td,))):
            kernel, initrd = file(f"{flavour}_kernel"), file(f"{flavour}_initrd")[: 1 << 20]
            for platform in platforms:
                with self.subTest(flavour=flavour, platform=platform.__name__):
                    machine = platform()
                    machine.kernel, machine.initrd, machine.low_top = kernel, initrd, RAM_TOP
                    machine.run()
                    self.assertTrue(machine.ended, machine.terminated)
                    self.check(machine, Handover(machine))

    def check(self, machine, found):
        kernel, page = machine.kernel, found.page
        setup = (kernel[0x1F1] + 1) * 512
        self.assertEqual(machine.read(0x1000000, len(kernel) - setup), kernel[setup:])
        self.assertEqual(found.initrd, machine.initrd)
        # The setup header reaches as far as its jump says; the loader's fields are checked by the parser.
        end = 0x202 + kernel[0x201]
        same = set(range(0x1F1, end)) - set(range(0x210, 0x212)) - set(range(0x218, 0x220))
        same -= set(range(0x228, 0x22C)) | set(range(0x250, 0x258))
        self.assertEqual([at for at in same if page[at] != kernel[at]], [])
        self.assertEqual(page[end:0x2D0], bytes(0x2D0 - end))
        # The kernel unpacks itself in place, over init_size bytes, and reads the initrd: all of it is usable.
        init_size = struct.unpack_from("<I", kernel, 0x260)[0]
        self.assertEqual(u(page, 0x260, 4), init_size)
        for start, length in ((0x1000000, init_size), (found.initrd_at, len(found.initrd))):
            units = range(start // UNIT, -(-(start + length) // UNIT))
            self.assertFalse(found.unaccepted & set(units))
            self.assertTrue(all(found.kind(unit * UNIT) == RAM for unit in units))

    def test_one_changed_bit_in_them_is_found(self):
        kernel = file("cloud_kernel")
        machine = Td()
        machine.low_top, machine.named_kernel = RAM_TOP, kernel
        machine.kernel = kernel[:-4096] + bytes([kernel[-4096] ^ 1]) + kernel[-4095:]
        machine.run()
        self.assertFalse(machine.ended)
        self.assertEqual(machine.terminated, ("cvmm", 0x08))


if __name__ == "__main__":
    unittest.main(verbosity=2)
