#!/usr/bin/env python3
"""cvmm killed with SIGKILL at a random moment of its start or run, again and again, on this machine's /dev/kvm.

Usage: tests/killed.py [CYCLES] [CVMM]
Every cycle takes the same disk, sockets, tap and console, so a lock, an address or a device that stayed taken stops
the next. At the end nothing of them may be left: processes, tap state, locks, memory of their cgroup.
"""
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts/bench.d"))

import payload  # noqa: E402

LONGEST_SECONDS = 0.08
TAP = "cvmmkill0"
LEFT_MEMORY_BYTES = 32 << 20


class Cgroup:
    """A cgroup of the old or the new hierarchy, to count what processes leave."""

    def __init__(self):
        for root, usage in (("/sys/fs/cgroup/memory", "memory.usage_in_bytes"), ("/sys/fs/cgroup", "memory.current")):
            self.path = Path(root) / f"cvmm-killed-{os.getpid()}"
            try:
                self.path.mkdir()
            except OSError:
                continue
            self.usage = self.path / usage
            if self.usage.exists():
                return
            self.path.rmdir()
        raise SystemExit("killed: no memory cgroup can be made here; run this as root with cgroups mounted")

    def join(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def processes(self):
        return (self.path / "cgroup.procs").read_text().split()

    def close(self):
        """Ends what is still in it, and removes it."""
        for pid in self.processes():
            os.kill(int(pid), signal.SIGKILL)
        until = time.monotonic() + 5
        while self.processes() and time.monotonic() < until:
            time.sleep(0.01)
        self.path.rmdir()

    def left(self):
        """Bytes still charged, without cached file pages."""
        force = self.path / "memory.force_empty"
        if force.exists():
            force.write_text("0")
        return int(self.usage.read_text())


def command(cvmm, folder, kernel):
    """A machine with everything that the host could be left with."""
    words = [cvmm, "run", "--platform", "soft", "--memory", "64M", "--kernel", kernel, "--disk", f"{folder}/disk"]
    words += ["--vsock", f"cid=5,uds={folder}/vsock", "--rng", "--events", f"{folder}/events"]
    return [*words, "--console", f"socket={folder}/console", "--net", f"tap={TAP}"]


def main():
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    cvmm = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("CVMM_BINARY")
    cvmm = cvmm or subprocess.run([ROOT / "scripts/build"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    seed = int(os.environ.get("SEED", time.time_ns() & 0xFFFF))
    chance = random.Random(seed)
    # So that a SIGTERM cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    group = Cgroup()
    alive = 0
    try:
        subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap"], check=True)
        with tempfile.TemporaryDirectory() as folder:
            kernel = Path(folder) / "kernel"
            # A program that loops: the machine runs until it is killed.
            kernel.write_bytes(payload.wrap_bzimage(bytes(0x200) + b"\xeb\xfe", 0x1_0000))
            (Path(folder) / "disk").write_bytes(bytes(1 << 20))
            words = command(cvmm, folder, str(kernel))
            with open(Path(folder) / "messages", "w+") as messages:
                for cycle in range(cycles):
                    machine = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, preexec_fn=group.join)
                    time.sleep(chance.uniform(0, LONGEST_SECONDS))
                    early = machine.poll()
                    alive += early is None
                    machine.kill()
                    machine.wait()
                    # Usage or a disk, socket or device that is still taken.
                    if early in (2, 20, 21):
                        messages.seek(0)
                        raise SystemExit(f"killed: cycle {cycle} (SEED={seed}) could not start: {messages.read()[-300:]}")
            check(group, folder)
        left = group.left()
    finally:
        group.close()
        subprocess.run(["ip", "tuntap", "del", TAP, "mode", "tap"], check=False)
    assert alive, f"no machine lived until it was killed (SEED={seed})"
    assert left < LEFT_MEMORY_BYTES, f"{left} bytes of memory are still charged"
    print(f"killed: {cycles} cycles, {alive} of them killed alive, nothing left; {left >> 10} KiB still charged (SEED={seed})")


def check(group, folder):
    """Nothing runs, nothing is locked or bound, nobody holds the tap."""
    assert not group.processes(), f"processes left: {group.processes()}"
    subprocess.run(["flock", "--wait", "1", f"{folder}/disk", "true"], check=True)
    listening = Path("/proc/net/unix").read_text()
    assert folder not in listening, "a socket is still bound"
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR: fails with EBUSY while a dead machine's queue is attached.
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", TAP.encode(), 0x5002))


if __name__ == "__main__":
    main()
