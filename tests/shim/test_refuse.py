"""What the shim refuses: by which reason, and that the kernel is never reached."""

import unittest

from machine import PAGE, Machine, kernel_file
from sev import Snp
from td import Td

PLATFORMS = (Machine, Snp, Td)


class Refusals(unittest.TestCase):
    def refused(self, code, platform=Snp, **changes):
        machine = platform()
        for name, value in changes.items():
            self.assertTrue(hasattr(machine, name), name)
            setattr(machine, name, value)
        machine.run()
        self.assertFalse(machine.ended)
        self.assertEqual(machine.terminated, (machine.REASON_SET, code), (platform.__name__, changes))
        return machine


class Anywhere(Refusals):
    def test_tampered_payloads(self):
        kernel, initrd = kernel_file(), bytes(range(256)) * 391
        for platform in PLATFORMS:
            for at in (0, 0x1F1, 65536, len(kernel) - 1):
                other = kernel[:at] + bytes([kernel[at] ^ 1]) + kernel[at + 1 :]
                self.refused(0x08, platform, kernel=other, named_kernel=kernel)
            self.refused(0x09, platform, initrd=initrd[:-1] + b"x", named_initrd=initrd)
            for changed in (kernel + b"\0", kernel[:-1]):
                self.refused(0x06, platform, kernel=changed, named_kernel=kernel)
            self.refused(0x06, platform, initrd=b"", named_initrd=initrd)

    def test_tampered_parameters(self):
        """The launch digest shows a changed page; the shim still boots nothing that the page does not name."""
        changes = {0x00: 0x02, 0x08: 0x02, 0x10: 0x02, 0x28: 0x06, 0x30: 0x08, 0x50: 0x06, 0x58: 0x09}
        changes |= {0x7C: 0x02, 0x7FF: 0x02, 0xFFF: 0x02}
        for platform in PLATFORMS:
            for at, code in changes.items():
                self.refused(code, platform, config_change=at)

    def test_a_kernel_that_is_named_but_cannot_be_entered(self):
        old = bytearray(kernel_file())
        old[0x206] = 0x0B
        wide = kernel_file(init_size=48 << 20)
        for platform in PLATFORMS:
            self.refused(0x0A, platform, kernel=bytes(old))
            self.refused(0x07, platform, kernel=wide)

    def test_bad_machines(self):
        tops = ((0, 0), (64 << 20 | PAGE, 0), (0xC020_0000, 0), (64 << 20, 1 << 32), (64 << 20, 449 << 30))
        for platform in (Snp, Td):
            for low, high in tops:
                self.refused(0x04, platform, low_top=low, high_top=high)
            self.refused(0x05, platform, vcpus=0)
            self.refused(0x05, platform, vcpus=9)

    def test_another_mode(self):
        """Also where there is no TDX module, which is asked for only behind the reset page."""
        for mode in (2, 3, 1 << 32):
            self.refused(0x01, Machine, mode=mode)

    def test_memory_that_the_host_replays_or_withholds(self):
        for platform, refusal in ((Snp, 0x12), (Td, 0x17)):
            for page in (0, 0x114000, 0x1000000, 0x3E00000):
                self.refused(0x13, platform, replayed_page=page)
                self.refused(refusal, platform, refuse_page=page)
            self.refused(0x13, platform, replayed_page=0x1001000, large_pages=False)
            self.refused(refusal, platform, refuse_page=0x1001000, large_pages=False)

    def test_the_emulated_machine_notices_memory_that_is_used_too_early(self):
        for platform in (Snp, Td):
            for page in (0x114000, 0x1000000):
                machine = platform()
                machine.forgotten_page = page
                with self.assertRaises(AssertionError):
                    machine.run()


class OnSnp(Refusals):
    def test_a_processor_that_is_not_what_the_mode_says(self):
        for status in (0, 3, 0xF):
            self.refused(0x0D, sev_status=status)
        self.refused(0x0E, c_bit=47)
        self.refused(0x0E, cpuid_count=65)
        self.refused(0x0E, cpuid_count=2)

    def test_a_hypervisor_that_misanswers(self):
        self.refused(0x0F, sev_info=0x0001_0001_3300_0001)
        self.refused(0x0F, sev_info=0)
        self.refused(0x10, features=0x2081)
        self.refused(0x11, register_answer=0xFFFF_FFFF_FFFF_F013)


if __name__ == "__main__":
    unittest.main(verbosity=2)
