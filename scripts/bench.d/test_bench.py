"""Tests of what the benchmark reads and reckons: `python3 scripts/bench.d/test_bench.py`."""

import sys
import unittest
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "rig.d")]
sys.dont_write_bytecode = True

import local
import nested
import payload
from rows import ROWS, Results


class Reading(unittest.TestCase):
    def test_calls_are_counted_up_to_the_payloads_byte_and_resumed_ones_once(self):
        log = "\n".join([
            '7 execve("cvmm", ["cvmm"], 0x7ffd /* 3 vars */) = 0',
            "7 ioctl(4, KVM_CREATE_VM, 0) = 5",
            "7 ioctl(0, TIOCGWINSZ, 0x7ffd) = -1 ENOTTY (Inappropriate ioctl for device)",
            "8 ioctl(5, KVM_RUN <unfinished ...>",
            "7 read(3,  <unfinished ...>",
            "8 <... ioctl resumed>, 0) = 0",
            '8 write(1, "\\245", 1) = 1',
            "8 exit_group(0) = ?",
        ])
        self.assertEqual(local.count(log), (6, 2, True))
        self.assertEqual(local.count(log.replace("245", "101")), (7, 2, False))

    def test_a_journal_gives_marks_their_exits_even_when_output_comes_in_pieces(self):
        times = iter([1.0, 2.0, 3.0])
        journal = nested.Journal(lambda: next(times))
        for piece in (b"CVMM-GO\n[ 0.1] noise\nCVMM-IN", b"IT up 3 s\r\nCVMM-EXITS 70 8 9\n", payload.BYTE):
            journal.extend(piece)
        init = journal.find("CVMM-INIT")
        self.assertEqual((init.cpu, init.exits), (2.0, [70, 8, 9]))
        self.assertEqual(journal.find("BYTE").cpu, 3.0)
        self.assertIsNone(journal.find("CVMM-BENCH"))

    def test_guest_ram_is_told_apart_even_when_the_kernel_has_split_its_mapping(self):
        journal = nested.Journal(lambda: 0.0)
        journal.smaps = [
            "1000-3000 rw-p 0 0 0", "Rss: 8 kB", "200000-300000 rw-p 0 0 0", "Rss: 512 kB",
            "300000-400000 rw-p 0 0 0", "Rss: 1024 kB",
        ]
        self.assertEqual(journal.beside_ram(2 << 20), (8 / 1024, 1.5))
        with self.assertRaises(ValueError):
            journal.beside_ram(4 << 20)

    def test_what_the_kernel_has_joined_with_guest_ram_counts_as_beside_it(self):
        journal = nested.Journal(lambda: 0.0)
        journal.smaps = ["1000-3000 rw-p 0 0 0", "Rss: 8 kB", "200000-310000 rw-p 0 0 0", "Rss: 512 kB"]
        self.assertEqual(journal.beside_ram(1 << 20), (72 / 1024, 448 / 1024))


class Reckoning(unittest.TestCase):
    def test_a_target_is_met_missed_or_not_measured(self):
        row = next(row for row in ROWS if row.key == "read-4k_cpu")
        for own, base, met in ((3.0, 10.0, True), (3.1, 10.0, False), (None, 10.0, None), (3.0, None, None)):
            results = Results()
            for who, value in (("cvmm", own), ("q35", base)):
                if value is not None:
                    results.add(row.key, who, value)
            self.assertEqual(results.verdict(row)[1], met, (own, base))

    def test_every_row_has_a_name_of_its_own(self):
        self.assertEqual(len({row.key for row in ROWS}), len(ROWS))


class Payload(unittest.TestCase):
    def test_the_payload_is_a_small_kernel_as_file_1_and_the_loaders_know_it(self):
        image = payload.bzimage()
        self.assertLess(len(image), 2048)
        self.assertEqual((image[0x1FE:0x200], image[0x202:0x206]), (b"\x55\xaa", b"HdrS"))
        self.assertEqual(payload.pvh()[:5], b"\x7fELF\x01")

    def test_its_three_programs_write_the_byte_to_the_serial_port_first(self):
        for code, wide in ((payload.bzimage()[0x268:], b""), (payload.bzimage()[0x600:], b"\x66"), (payload.pvh()[0x1000:], b"\x66")):
            self.assertTrue(code.startswith(wide + b"\xba\xf8\x03\xb0" + payload.BYTE + b"\xee"))


if __name__ == "__main__":
    unittest.main()
