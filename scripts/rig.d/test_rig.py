"""Tests of how the rig keeps its L1s apart: `python3 scripts/rig.d/test_rig.py`."""

import contextlib
import fcntl
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

import lifetime
import session
from report import RigError


class Rig(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch.dict(os.environ, CVMM_RIG_DIR=str(self.folder)))

    def l1(self, pid):
        """A folder as one of an L1 whose guard has this process number."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        (place / "pid").write_text(f"{pid}")
        return place

    def test_an_l1_is_up_as_long_as_its_guard_runs(self):
        ours = self.l1(os.getpid())
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        self.l1(child)
        self.assertEqual(lifetime.names(), [ours.name], "a guard that nobody has waited for has ended")
        os.waitpid(child, 0)
        self.l1("")
        self.assertEqual(lifetime.names(), [ours.name])

    def test_a_starting_l1_is_no_leftover(self):
        """Another rig that clears up at that moment takes a folder without a whole number for a dead L1's."""
        for broken in ("write_text", "rename"):
            place = Path(tempfile.mkdtemp(dir=self.folder))
            with mock.patch.object(Path, broken, side_effect=InterruptedError), contextlib.suppress(InterruptedError):
                lifetime.sign(place)
            lifetime._clear_leftovers()
            self.assertTrue(place.exists(), broken)
            lifetime.sign(place)
            self.assertIn(place.name, lifetime.names())

    def test_a_link_in_place_of_the_folder_is_refused(self):
        """Anybody can put one into /tmp, to a folder of this user's where something would then be cleared away."""
        (self.folder / "link").symlink_to(self.folder)
        with mock.patch.dict(os.environ, CVMM_RIG_DIR=f"{self.folder}/link"), self.assertRaises(RigError):
            lifetime.home()

    def test_waiting_for_a_port_costs_nothing(self):
        with contextlib.ExitStack() as stack:
            for number in range(session.PORTS):
                fcntl.flock(stack.enter_context(open(self.folder / f"lock.{number}", "w")), fcntl.LOCK_EX)
            held = []

            def look(_):
                held.append(len(os.listdir("/proc/self/fd")))
                if len(held) == 20:
                    raise TimeoutError

            with mock.patch.object(session.time, "sleep", look), self.assertRaises(TimeoutError), session._port(self.folder):
                pass
            self.assertEqual(held[0], held[-1], held)


if __name__ == "__main__":
    unittest.main()
