"""What the rig says to the person who runs it: progress on stderr, and errors that end the run."""

import os
import sys
import time


class RigError(Exception):
    """A failure that the user can act on: says what, why, and what to do."""


_start = time.monotonic()


def say(message):
    """Prints one progress line to stderr, unless CVMM_QUIET is set."""
    if not os.environ.get("CVMM_QUIET"):
        print(f"rig [{time.monotonic() - _start:5.1f}s] {message}", file=sys.stderr, flush=True)
