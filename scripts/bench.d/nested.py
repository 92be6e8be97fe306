"""Runs in an L1 host, with what the host pays for them: the CPU time of L1's whole QEMU process."""

import contextlib
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import lifetime
import payload
import session
from machine import Spec

COUNTERS = "exits io_exits mmio_exits"
TIMEOUT = 420
VCPUS = 1
SETUP = """
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
ip link show tap0 >/dev/null 2>&1 || { tunctl -t tap0 && ip addr add 10.9.0.1/24 dev tap0; } >/dev/null
ip link set tap0 up
"""
PEER_ADDRESS = "10.9.0.1:7000"
PEER = f"cvmm-guest bench-serve tcp:{PEER_ADDRESS} >/dev/null 2>&1 &"
# The counters are read by the shell itself, without a process, at each line that the guest prints for us.
WATCH = """
cd /sys/kernel/debug/kvm
while IFS= read -r line; do
    echo "$line"
    case "$line" in
    *CVMM-INIT*|*CVMM-BENCH*) for c in $counters; do read -r n <$c; set -- "$@" $n; done; echo "CVMM-EXITS $*"; set -- ;;
    esac
    case "$line" in
    *"CVMM-BENCH idle"*) sleep 1; grep -E '^[0-9a-f]+-[0-9a-f]+ |^Rss:' /proc/$(cat /run/vmm)/smaps | sed 's/^/CVMM-SMAPS /' ;;
    esac
done
"""
# KVM calls this function for each page that the security processor is to measure.
PROBE = """
cd /sys/kernel/tracing
[ ! -e events/kprobes/enable ] || echo 0 >events/kprobes/enable
echo >kprobe_events
echo p:cvmm_page sev_gmem_post_populate >kprobe_events && echo 1 >events/kprobes/cvmm_page/enable
"""
PROBE_READ = "read -r name hits rest </sys/kernel/tracing/kprobe_profile && echo CVMM-PAGES $hits"
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass
class Mark:
    """A line of interest: its words, and the host's time and CPU time when it came."""

    words: list
    wall: float
    cpu: float
    exits: list = field(default_factory=list)


class Journal:
    """Takes a session's output as it comes, and keeps the marks in it."""

    def __init__(self, clock):
        self._clock = clock
        self._rest = bytearray()
        self.marks = []
        self.smaps = []
        self.pages = None
        self.lines = []

    def extend(self, data):
        """Takes more output."""
        if payload.BYTE in data:
            self._mark(["BYTE"])
        self._rest += data
        while (end := self._rest.find(b"\n")) >= 0:
            self._line(self._rest[:end].decode(errors="replace").strip())
            del self._rest[: end + 1]

    def _line(self, line):
        self.lines.append(line)
        at = line.find("CVMM-")
        words = line[max(at, 0) :].split()
        if at < 0 or not words:
            return
        if words[0] == "CVMM-EXITS" and self.marks:
            self.marks[-1].exits = [int(word) for word in words[1:]]
        elif words[0] == "CVMM-SMAPS":
            self.smaps.append(line[at + len("CVMM-SMAPS ") :])
        elif words[0] == "CVMM-PAGES":
            # Beside these pages each vCPU's register page is measured.
            self.pages = int(words[1]) + VCPUS
        elif words[0] in ("CVMM-GO", "CVMM-INIT", "CVMM-BENCH"):
            self._mark(words)

    def _mark(self, words):
        self.marks.append(Mark(words, time.monotonic(), self._clock()))

    def find(self, *words):
        """The first mark that starts with these words; None when there is none."""
        return next((mark for mark in self.marks if mark.words[: len(words)] == list(words)), None)

    def beside_ram(self, ram_bytes):
        """(MiB resident beside guest RAM, MiB of guest RAM resident): RAM is the mappings that add up to its size.

        The kernel may have joined RAM with a neighbour; all that the joint mapping has beyond RAM's size then counts
        as resident beside RAM, which is the most that it can be.
        """
        sizes = {}
        for line in self.smaps:
            if found := MAPPING.match(line):
                key = (int(found[1], 16), int(found[2], 16))
            elif line.startswith("Rss:"):
                sizes[key] = int(line.split()[1]) << 10
        ram = [key for key in sizes if key[1] - key[0] == ram_bytes] or _split_ram(sizes, ram_bytes)
        beyond = sum(key[1] - key[0] for key in ram) - ram_bytes
        resident = max(sum(sizes[key] for key in ram) - beyond, 0)
        return (sum(sizes.values()) - resident) / 2**20, resident / 2**20


def _split_ram(sizes, ram_bytes):
    """Neighbouring mappings that together are as large as RAM: the kernel splits one whose pages have had different uses."""
    keys = sorted(sizes)
    for first in range(len(keys)):
        total, last = 0, first
        while last < len(keys) and total < ram_bytes and (last == first or keys[last][0] == keys[last - 1][1]):
            total += keys[last][1] - keys[last][0]
            last += 1
        if total == ram_bytes:
            return keys[first:last]
    joint = [key for key in keys if key[1] - key[0] > ram_bytes]
    if joint:
        return [min(joint, key=lambda key: key[1] - key[0])]
    raise ValueError(f"no mappings of {ram_bytes >> 20} MiB in the VMM's memory map")


class L1:
    """A running L1, and its CPU clock."""

    def __init__(self, folder, pid):
        self.folder = folder
        # The kernel's clock id of another process's CPU time (clock_getcpuclockid(3)).
        self._clock_id = (~pid << 3) | 2

    def cpu(self):
        """CPU seconds that L1's QEMU has used."""
        return time.clock_gettime(self._clock_id)

    def push(self, pairs):
        """Puts files into L1."""
        session.push(self.folder, [(Path(source), target) for source, target in pairs])

    def output(self, script, limit=60):
        """What a shell script in L1 prints."""
        return session.output(self.folder, ["/bin/sh", "-c", script], limit).decode(errors="replace")

    def boot(self, words, pages=False):
        """Runs a VMM that boots a guest for scripts/bench; gives the journal. A peer for its network runs beside it.

        With pages, the security processor's launch updates are counted, which L1's kernel traces.
        """
        probe, read = (PROBE, PROBE_READ) if pages else ("", "")
        vmm = f"echo $$ >/run/vmm; exec {shlex.join(words)} 2>/root/vmm.err </dev/null"
        script = f"counters='{COUNTERS}'\n{SETUP}\n{probe}\n{PEER}\necho CVMM-GO\nsh -c {shlex.quote(vmm)} | {{\n{WATCH}\n}}\nkill $! 2>/dev/null\n{read}"
        return self._run(script)

    def start(self, words):
        """Runs a VMM with the tiny payload; gives the journal."""
        return self._run(f"echo CVMM-GO\nexec {shlex.join(words)} 2>/root/vmm.err </dev/null", 60)

    def _run(self, script, limit=TIMEOUT):
        journal = Journal(self.cpu)
        errors = bytearray()
        run = session.Session(self.folder, ["/bin/sh", "-c", script], limit, out=journal, err=errors)
        with contextlib.suppress(session.L1Gone):
            run.run()
        journal.lines += errors.decode(errors="replace").splitlines()
        return journal


@contextlib.contextmanager
def l1(kind="plain", memory=2500):
    """An L1 for as long as the block runs."""
    with lifetime.for_now(Spec(kind, cpus=1, memory=memory, with_qemu=True)) as folder:
        yield L1(folder, _child(folder))


def _child(folder):
    """The process id of the QEMU that this process started in folder."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], stdout=subprocess.PIPE, text=True)
    return next(int(line.split()[0]) for line in listed.stdout.splitlines() if str(folder) in line)
