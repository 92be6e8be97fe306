#!/usr/bin/env python3
"""MRTD and RTMRs by another program: everything that `cvmm measure` says about TDs, computed again with hashlib.

    tests/measure/test_mrtd.py        cvmm is $CVMM, else built from this tree
    tests/measure/test_mrtd.py NAME   only the tests whose name contains NAME
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "scripts/rig.d")]
sys.dont_write_bytecode = True

import archive
import mrtd
from report import RigError

PAGE = 4096
CMDLINE = b"console=hvc0 quiet"


def cvmm():
    if os.environ.get("CVMM"):
        return os.environ["CVMM"]
    build = ["cargo", "build", "--quiet", "--package", "vmm", "--message-format", "json"]
    out = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    built = [json.loads(line) for line in out.splitlines()]
    return next(item["executable"] for item in built if item.get("executable"))


def registers(*flags):
    """What `cvmm measure` prints, by register."""
    out = subprocess.run([CVMM, "measure", *flags], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {line.split()[0]: line.split()[1] for line in out.splitlines()}


def kernel():
    """A file that passes for a bzImage."""
    image = bytearray(6 * 512)
    for at, value in (
        (0x1F1, b"\4"), (0x1FE, b"\x55\xaa"), (0x202, b"HdrS"), (0x206, b"\x0f\x02"), (0x211, b"\1"),
        (0x236, b"\x7f\0"), (0x238, b"\xff\7\0\0"), (0x260, b"\0\0\x80\2"),
    ):
        image[at : at + len(value)] = value
    return bytes(image)


def blob(data):
    """A file as the CONFIG page names it."""
    return struct.pack("<Q", len(data)) + (hashlib.sha256(data).digest() if data else bytes(32))


def config(kernel_file, initrd):
    """The CONFIG page of a machine in a TD (shim/src/config.rs)."""
    head = b"cvmmcfg1" + struct.pack("<IIIIQQ", 1, 1, 1, 1024, 0, 2**64 - 1)
    head += blob(kernel_file) + blob(initrd) + struct.pack("<I", len(CMDLINE))
    return head.ljust(0x800, b"\0") + CMDLINE.ljust(0x800, b"\0")


def tables():
    """The boot page tables: 512 GiB by 1 GiB pages, the last 64 shared (bit 47)."""
    entries = [gib << 30 | 0xE3 | (1 << 47 if gib >= 448 else 0) for gib in range(512)]
    return struct.pack("<Q", 0x10D003).ljust(PAGE, b"\0") + struct.pack("<512Q", *entries)


def launched(machine, config_page):
    """What a TD starts with, by ascending address; every machine has the reset page of v1."""
    shim = (ROOT / f"shim/{machine}.bin").read_bytes()
    text = shim.ljust(-len(shim) % PAGE + len(shim), b"\0")
    reset = (ROOT / "shim/v1-reset.bin").read_bytes()
    pages = [
        (text, 0x100000), (tables(), 0x10C000), (config_page, 0x10E000), (bytes(PAGE), 0x10F000),
        (bytes(2 * PAGE), 0x112000), (reset, 0xFFFFF000),
    ]
    return [(data, gpa, len(data), 0, mrtd.EXTEND) for data, gpa in pages]


def extended(*events):
    """A register that was extended by the digests of events."""
    value = bytes(48)
    for event in events:
        value = hashlib.sha384(value + hashlib.sha384(event).digest()).digest()
    return value.hex()


class Shim(unittest.TestCase):
    def test_registers_follow_from_the_shims_bytes(self):
        for machine, initrd in (("v1", b""), ("v2", b""), ("v2", b"an initrd")):
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--platform", "tdx", "--kernel", f"{folder}/kernel", "--cmdline", CMDLINE.decode()]
                flags += ["--machine", machine]
                Path(folder, "kernel").write_bytes(kernel())
                if initrd:
                    Path(folder, "initrd").write_bytes(initrd)
                    flags += ["--initrd", f"{folder}/initrd"]
                found, double = registers(*flags), registers(*flags, "--two-pass")
            parts = launched(machine, config(kernel(), initrd))
            self.assertEqual(found, dict(
                MRTD=mrtd.mrtd(parts), RTMR0="0" * 96, RTMR1=extended(blob(kernel()), blob(initrd)),
                RTMR2=extended(CMDLINE), RTMR3="0" * 96,
            ))
            self.assertEqual(double["MRTD"], mrtd.mrtd(parts, two_pass=True))


class Firmware(unittest.TestCase):
    def test_debians_images_in_both_orders(self):
        for package, name in (("ovmf-inteltdx", "OVMF.inteltdx.ms.fd"), ("ovmf-amdsev", "OVMF.amdsev.fd")):
            try:
                path = archive.packaged(package, name)
            except RigError as error:
                self.skipTest(f"no {package}: {error}")
            parts = list(mrtd.sections(path.read_bytes()))
            for flags, two_pass in (([], False), (["--two-pass"], True)):
                found = registers("--payload", "tdvf", "--firmware", path, *flags)
                self.assertEqual(found, dict(MRTD=mrtd.mrtd(parts, two_pass)), name)


if __name__ == "__main__":
    CVMM = cvmm()
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{name}*" for name in sys.argv[1:]] or None
    tests = loader.loadTestsFromModule(sys.modules["__main__"])
    if not tests.countTestCases():
        sys.exit(f"no test matches {sys.argv[1:]}")
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    for test, reason in result.skipped:
        print(f"SKIPPED: {test}: {reason}")
    sys.exit(not result.wasSuccessful())
