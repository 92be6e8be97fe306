#!/usr/bin/env python3
"""Whole-program tests in the nested rig: cvmm on the real KVM of an L1 host, with stock Debian guests.

Usage: tests/rig/run.py [--list] [--keep] [--hosts N] [NAME...]
Boots each kind of L1 once and runs every test in it, on two L1s at a time if there are two processors and 16 GB.
Prints a line a test, and `N passed, N failed` at the end.
"""
import argparse
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

import hostile  # noqa: E402
import snp  # noqa: E402
import soft  # noqa: E402
import tdx  # noqa: E402
from host import Host, L1Hung  # noqa: E402

# The longest first.
SUITES = [
    ("plain", [*soft.TESTS, *hostile.TESTS]), ("snp", [*snp.TESTS, *hostile.TESTS]), ("tdx", tdx.TESTS),
]
# Tests whose L1 hung, once for each time.
HUNG = []
# Too long for every run: only by name.
LONG = [("plain", hostile.LONG), ("snp", hostile.LONG)]


def run_one(name, test, host):
    """Runs one test; again, once, on a new L1 if the emulated host hangs, and says so."""
    for attempt in (1, 2):
        began = time.monotonic()
        took = lambda: f"{time.monotonic() - began:.0f} s"  # noqa: B023, E731
        try:
            note = test(host) or ""
        except L1Hung as hung:
            print(f"     {name}: {hung} after {took()}; attempt {attempt} of 2", flush=True)
            HUNG.append(name)
            host.down()
            host.__enter__()
        except Exception as error:  # a test may fail in any way; the others go on
            print(f"FAIL {name} ({took()}): {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            return False
        else:
            print(f"ok   {name} ({took()}) {note}", flush=True)
            return True
    print(f"FAIL {name}: L1 hung twice", flush=True)
    return False


def run_suite(kind, tests, keep):
    """Runs tests in one L1; gives each one's name and whether it passed."""
    host = Host(kind, keep=keep)
    try:
        host.__enter__()
    except Exception as error:  # the other hosts' tests go on
        print(f"FAIL {kind} L1: {error}", flush=True)
        return [(f"{kind}:{test.__name__}", False) for test in tests]
    try:
        return [(f"{kind}:{test.__name__}", run_one(f"{kind}:{test.__name__}", test, host)) for test in tests]
    finally:
        host.__exit__()


def hosts():
    """How many L1s at a time: each keeps a processor busy, and up to 6.5 GB."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 if os.cpu_count() >= 2 and memory_bytes >= 16 * 10**9 else 1


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the L1s up")
    parser.add_argument("--hosts", type=int, default=hosts(), metavar="N", help="L1s at a time (here %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    known = {f"{kind}:{test.__name__}" for kind, tests in [*SUITES, *LONG] for test in tests}
    if options.list:
        print("\n".join(sorted(known)))
        return 0
    unknown = set(options.names) - known
    if unknown:
        parser.error(f"no such test: {', '.join(sorted(unknown))}; --list names them all")
    chosen = []
    for kind, tests in SUITES:
        named = [*tests, *(test for other, more in LONG if other == kind for test in more)]
        wanted = [t for t in named if f"{kind}:{t.__name__}" in options.names] if options.names else tests
        if wanted:
            chosen.append((kind, wanted, options.keep))
    with ThreadPoolExecutor(options.hosts) as pool:
        results = [result for suite in pool.map(lambda suite: run_suite(*suite), chosen) for result in suite]
    failed = [name for name, passed in results if not passed]
    if failed:
        print("failed:", ", ".join(failed))
    if HUNG:
        print("an L1 hung, and was replaced, in:", ", ".join(HUNG))
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
