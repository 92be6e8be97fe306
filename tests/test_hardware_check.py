#!/usr/bin/env python3
"""scripts/hardware-check without hardware: a stand-in for cvmm answers. Usage: tests/test_hardware_check.py"""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, ROOT / "scripts/hardware-check"]
GOOD, BAD = "ab" * 48, "cd" * 48
# Says what cvmm says; with SLEEP it is a guest that hears no signal, and has a child.
CVMM = """#!/bin/sh
case "$*" in
*doctor*) echo "$DOCTOR"; exit $LACKS ;;
*measure*) echo '{"digest": "PREDICTED"}' ;;
*--version*) echo cvmm 0 ;;
*run*)
    echo "debug: $0 on $(uname -n)" >&2
    if [ -n "$SLEEP" ]; then trap '' TERM INT; sleep 77 & echo $! $$ >"$SLEEP"; wait; wait; fi
    printf '{"event":"started","time_ns":1}\\n{"event":"measured","digest":"%s","time_ns":2}\\n' "$ANNOUNCED" >events
    exit $ENDS ;;
esac
""".replace("PREDICTED", GOOD)
LACKING = {"name": "tdx.cpu", "found": "no TDX", "remedy": "take another", "needed_by": ["tdx"]}
OTHER = {"name": "net.tun", "found": "no tun", "remedy": "modprobe tun", "needed_by": ["soft"]}


class HardwareCheck(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.out, self.temporary = self.folder / "out", self.folder / "tmp"
        self.out.mkdir()
        self.temporary.mkdir()
        self.cvmm = self.folder / "cvmm"
        self.cvmm.write_text(CVMM)
        self.cvmm.chmod(0o755)
        for name in ("kernel", "initrd"):
            (self.folder / name).write_text(name)

    def tearDown(self):
        self.assertEqual(list(self.temporary.iterdir()), [], "left behind")

    def start(self, *words, out=None, **environment):
        said = {"DOCTOR": "{}", "LACKS": "0", "ENDS": "0", "ANNOUNCED": GOOD, "TMPDIR": self.temporary, **environment}
        command = [*COMMAND, *words, "--cvmm", self.cvmm, "--out", out or self.out]
        return subprocess.Popen(
            list(map(str, command)), env={**os.environ, **{name: str(value) for name, value in said.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run_check(self, *words, **more):
        running = self.start(*words, **more)
        out, err = running.communicate(timeout=60)
        self.assertNotIn("Traceback", err)
        return running.returncode, out, err

    def own(self):
        return "tdx", self.folder / "kernel", self.folder / "initrd"

    def test_each_end_has_its_exit_code(self):
        for code, environment in [
            (0, {}), (1, {"ENDS": "11"}), (40, {"ANNOUNCED": BAD}),
        ]:  # fmt: skip
            with self.subTest(environment):
                doctor = json.dumps({"checks": []})
                measure = CVMM.replace('"digest": "', '"mrtd": "", "rtmrs": [], "digest": "')
                self.cvmm.write_text(measure)
                found, out, err = self.run_check(*self.own(), "--cpus", "3", DOCTOR=doctor, **environment)
                self.assertEqual((found, err), (code, ""), out)
                self.assertIn("3 vCPU: ", out)

    def test_the_archive_names_neither_host_nor_user_nor_files(self):
        code, out, _ = self.run_check("soft", *self.own()[1:], "--cpus", "1", DOCTOR='{"checks": []}')
        self.assertEqual(code, 0, out)
        (archive,) = self.out.iterdir()
        with tarfile.open(archive) as tar:
            files = {Path(entry.name).name: tar.extractfile(entry).read().decode() for entry in tar}
        self.assertIn("debug: CVMM on HOST", files["log-1.txt"])
        named = {socket.gethostname(), str(self.folder), str(Path.home()), getpass.getuser()} - {"root", "localhost"}
        for name in named:
            self.assertNotRegex("".join(files.values()), rf"(?<![\w-]){re.escape(name)}(?![\w-])")

    def test_what_the_host_lacks_for_this_platform_is_said_and_no_more(self):
        code, _, err = self.run_check("tdx", DOCTOR=json.dumps({"checks": [OTHER, LACKING]}), LACKS=20)
        self.assertEqual((code, err), (20, "hardware-check: no tdx guest can run here:\n  tdx.cpu: no TDX\n    -> take another\n"))

    def test_what_cannot_be_used_is_said_before_anything_runs(self):
        missing = self.folder / "missing"
        for words, more, says in [
            (["tdx"], {"out": missing}, f"{missing}: no folder"),
            (["tdx"], {"out": "/proc/self"}, "no folder that can be written to"),
            (["tdx", missing, missing], {}, f"{missing}: no file"),
            (["tdx", missing], {}, "KERNEL and INITRD, or neither"),
            (["sgx"], {}, "invalid choice: 'sgx'"),
            (["tdx", "--cpus", "1,0"], {}, "1,2"),
            (["tdx", "--cpus", "two"], {}, "--cpus"),
            ([], {}, "platform"),
        ]:
            with self.subTest(words):
                code, out, err = self.run_check(*words, **more)
                self.assertEqual((code, out), (2, ""))
                self.assertIn(says, err)
        self.cvmm.chmod(0o644)
        code, _, err = self.run_check("tdx")
        self.assertIn("not a program", err)
        self.assertEqual(code, 2)

    def test_doctor_that_dies_is_told(self):
        code, _, err = self.run_check("tdx", DOCTOR="killed", LACKS=134)
        self.assertEqual((code, err), (1, "hardware-check: `cvmm doctor` ended with 134: killed\n"))

    def test_an_interrupt_ends_guest_and_children_and_leaves_no_file(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                pids = self.folder / f"pids-{number}"
                running = self.start("soft", *self.own()[1:], DOCTOR='{"checks": []}', SLEEP=pids)
                while not (pids.exists() and pids.read_text().endswith("\n")):
                    self.assertIsNone(running.poll())
                    time.sleep(0.02)
                running.send_signal(number)
                time.sleep(0.3)
                running.send_signal(number)
                _, err = running.communicate(timeout=30)
                self.assertEqual((running.returncode, err), (130, "hardware-check: interrupted\n"))
                for pid in pids.read_text().split():
                    self.assertFalse(alive(pid), pid)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_a_kill_ends_guest_and_children_and_leaves_no_file(self):
        pids = self.folder / "pids"
        running = self.start("soft", *self.own()[1:], DOCTOR='{"checks": []}', SLEEP=pids)
        while not (pids.exists() and pids.read_text().endswith("\n")):
            self.assertIsNone(running.poll())
            time.sleep(0.02)
        running.kill()
        running.communicate(timeout=30)
        until = time.monotonic() + 10
        while time.monotonic() < until and (list(self.temporary.iterdir()) or any(map(alive, pids.read_text().split()))):
            time.sleep(0.02)
        for pid in pids.read_text().split():
            self.assertFalse(alive(pid), pid)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_help_tells_every_exit_code(self):
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        for word in ("snp|tdx|soft", "0 the guests ran", "1 a guest", "2 a bad", "20 the host", "40 a digest", "130 interrupted"):
            self.assertIn(word, done.stdout)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    unittest.main()
