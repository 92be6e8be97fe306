"""Starts of the tiny payload on this host's own /dev/kvm: CPU, wall time, system calls."""

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import payload

PATIENCE = {"cvmm": 10, "microvm": 30, "q35": 90}
# Which system call wrote the payload's byte, in strace's notation.
WROTE = re.compile(r'\bp?writev?6?4?\(\d+, .*\\245')
CALL = re.compile(r"^\d+ +(?:[0-9.]+ )?(\w+)\(")


class Silent(Exception):
    """The VMM ended, or its time ran out, before the payload's byte came; holds its last words."""


def start(name, words, environment):
    """(CPU seconds, wall seconds) from exec to the first byte of output."""
    with tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=dict(os.environ, **environment)
        )
        seen = _await_byte(process.stdout, began + PATIENCE[name])
        wall = time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        process.stdout.close()
        if not seen:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise Silent(f"{last[0]} ({wall:.1f} s)")
        return usage.ru_utime + usage.ru_stime, wall


def _await_byte(stream, deadline):
    while (left := deadline - time.monotonic()) > 0 and select.select([stream], [], [], left)[0]:
        data = os.read(stream.fileno(), 4096)
        if payload.BYTE in data:
            return True
        if not data:
            return False
    return False


def ready(words):
    """CPU seconds of cvmm from exec to where its first vCPU enters the guest."""
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [*words, "--ready-fd", str(theirs)], pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    said = os.read(ours, 64) if select.select([ours], [], [], PATIENCE["cvmm"])[0] else b""
    os.close(ours)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if b"READY=1" not in said:
        raise Silent("cvmm did not say READY=1")
    return usage.ru_utime + usage.ru_stime


def count(log):
    """Counts what strace wrote, up to the write of the payload's byte."""
    total = ioctls = 0
    for line in log.splitlines():
        if not (call := CALL.match(line)):
            continue
        total += 1
        ioctls += call[1] == "ioctl" and "KVM_" in line
        if WROTE.search(line):
            return total, ioctls, True
    return total, ioctls, False
