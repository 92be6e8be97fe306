"""The parts of the benchmark, by name."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import local
import payload
import predict
import programs
import stock
import vmms
from report import RigError, say

TREE = Path(__file__).resolve().parents[2]


def build():
    """Builds cvmm as it is released; gives the binary's path."""
    say("building cvmm")
    done = subprocess.run([TREE / "scripts" / "build", "--quiet"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RigError("scripts/build failed: mend that first")
    return Path(done.stdout.strip())


@contextlib.contextmanager
def files(cvmm):
    """The paths of cvmm and of the tiny payload in both its forms."""
    with tempfile.TemporaryDirectory(prefix="cvmm-bench.") as folder:
        made = dict(cvmm=cvmm, bzimage=Path(folder, "payload.bz"), pvh=Path(folder, "payload.elf"))
        made["bzimage"].write_bytes(payload.bzimage())
        made["pvh"].write_bytes(payload.pvh())
        yield made


def _local(results, found, runs, quick):
    results.add("binary", "cvmm", found["cvmm"].stat().st_size / 2**20)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        results.remark("this host has no /dev/kvm that may be used: nothing measured on it directly")
        return
    qemu = programs.host_qemu()
    environment = dict(os.environ, **qemu.environment)
    paths = {name: str(path) for name, path in found.items()}
    silent = set()
    # q35's firmware alone takes most of a minute where KVM emulates it; it is in L1's rows.
    for _ in range(2 if quick else 3 * runs):
        for name in ("cvmm", "microvm"):
            words = vmms.payload(name, paths, [*qemu.words, *qemu.firmware])
            try:
                if name == "cvmm":
                    results.add("ready_cpu_local", name, 1e3 * local.ready(words))
                if name in silent:
                    continue
                cpu, wall = local.start(name, words, environment)
            except local.Silent as why:
                silent.add(name)
                results.remark(f"{name}: no output from the tiny payload on this host's KVM: {why}")
                continue
            results.add("start_cpu_local", name, 1e3 * cpu)
            results.add("start_wall_local", name, 1e3 * wall)
            if name == "microvm":
                results.add("ready_cpu_local", name, 1e3 * cpu)


def _model(results, found, _runs, _quick):
    """A TD on the modelled host (tests/interpose), up to its kernel."""
    words = ["cargo", "run", "--quiet", "--package", "interpose", "--", found["cvmm"]]
    done = subprocess.run(words, cwd=TREE, capture_output=True, text=True)
    if done.returncode:
        raise RigError(f"tests/interpose: {done.stderr.strip()}")
    counted = json.loads(done.stdout)
    for key, of in (("tdx_commands", "commands"), ("tdx_exits", "exits"), ("tdx_calls", "tdcalls")):
        results.add(key, "cvmm", counted[of])


def _plain(results, found, runs, quick):
    stock.plain(results, found, runs, quick)


def _snp(results, found, runs, _quick):
    stock.snp(results, found["cvmm"], runs)


def _measure(results, found, runs, _quick):
    predict.compare(results, found["cvmm"], runs)
    predict.td(results, found["cvmm"])


PARTS = {"local": _local, "model": _model, "plain": _plain, "snp": _snp, "measure": _measure}
