#!/usr/bin/env python3
"""The frozen shims in a CPU emulator: what they build, and what they refuse.

    tests/shim/test_shim.py        the newest one; needs the Python package `unicorn`; without it, says so and exits 77
    tests/shim/test_shim.py NAME   only the tests whose name contains NAME
    MACHINE=v1 tests/shim/test_shim.py …   the same of an older machine
"""

import pathlib
import sys
import unittest

try:
    import unicorn  # noqa: F401
except ImportError:
    print("SKIPPED: the shim in an emulator (python3 -m pip install unicorn)")
    sys.exit(77)

sys.dont_write_bytecode = True
loader = unittest.TestLoader()
loader.testNamePatterns = [f"*{name}*" for name in sys.argv[1:]] or None
folder = pathlib.Path(__file__).resolve().parent
tests = loader.discover(folder, "test_[!s]*.py")
if left_out := [path.name for path in folder.glob("test_s*.py") if path.name != "test_shim.py"]:
    sys.exit(f"the pattern leaves out {left_out}: give them other names")
if not tests.countTestCases():
    sys.exit(f"no test matches {sys.argv[1:]}")
result = unittest.TextTestRunner(verbosity=2).run(tests)
for test, reason in result.skipped:
    print(f"SKIPPED: {test}: {reason}")
sys.exit(not result.wasSuccessful())
