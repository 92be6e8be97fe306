#!/usr/bin/env python3
"""Tests of how verdicts are kept and read: `tests/hostile/test_run.py`."""

import os
import sys
import tempfile
import unittest
from pathlib import Path

folder = tempfile.TemporaryDirectory()
os.environ["CARGO_TARGET_DIR"] = folder.name
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

import run  # noqa: E402


class Verdicts(unittest.TestCase):
    def test_columns_are_read_back_where_cargo_keeps_files_of_its_own(self):
        column = [run.Outcome("C01", "blk", "chain of 65,536", "Reject", "")]
        run.save("QEMU", column)
        run.save("cvmm soft", column)
        (run.TARGET / ".rustc_info.json").write_text('{"rustc_fingerprint":1}')
        self.assertEqual(list(run.saved().items()), [("cvmm soft", column), ("QEMU", column)])

    def test_a_case_without_a_verdict_ended_the_machine(self):
        console = "BEGIN 3 C01 blk a loop\nCASE 3 C01 blk Reject reset\nBEGIN 4 C02 net a long chain\n"
        found = run.outcomes(console, "exit status -6")
        self.assertEqual(found[3], run.Outcome("C01", "blk", "a loop", "Reject", "reset"))
        self.assertEqual(found[4], run.Outcome("C02", "net", "a long chain", "Died", "exit status -6"))

    def test_what_was_not_played_is_no_success(self):
        played = run.Outcome("C01", "blk", "a loop", "Reject", "")
        nobody = run.Outcome("C01", "net", "a loop", "Absent", "no such device")
        other = run.Outcome("C50", "blk", "private", "Absent", "does not apply")
        self.assertEqual(run.gaps([played, other]), [])
        self.assertEqual(run.gaps([played, nobody], "C01"), ["C01 net: no such device"])
        self.assertEqual(run.gaps([played], "C01,C02"), ["C02: not played"])
        self.assertEqual(run.gaps([]), ["nothing was played"])

    def test_a_row_a_case_and_a_word_for_devices_that_agree(self):
        blk, net = (run.Outcome("C01", device, "a loop", verdict, "") for device, verdict in [("blk", "Pass"), ("net", "Died")])
        self.assertIn("C01   a loop               PASS", run.table({"one": [blk]}))
        self.assertRegex(run.table({"two": [blk, net]}), "C01.*PASS.*DIED")


if __name__ == "__main__":
    unittest.main()
