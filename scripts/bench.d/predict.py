"""`cvmm measure` beside sev-snp-measure, each predicting the digest of the same 64-vCPU guest; what a TDX launch costs."""

import json
import resource
import subprocess
import sys

import archive
import cache
import guest
from stock import ovmf

VCPUS = 64
PACKAGE = "sev-snp-measure"


def compare(results, cvmm, runs):
    """Adds the CPU time of each; both read the same kernel and initrd once, alternating."""
    found = dict(guest.files())
    payload = ["--kernel", found["amd64_kernel"], "--initrd", found["amd64_initrd"]]
    own = [cvmm, "measure", "--platform", "snp", "--cpus", str(VCPUS), *payload, "--cmdline", "console=ttyS0"]
    peer = [
        _peer(), "--mode", "snp", "--vcpus", str(VCPUS), "--vcpu-type", "EPYC-v4", "--ovmf", ovmf(), *payload,
        "--append", "console=ttyS0",
    ]
    for _ in range(runs):
        for who, words in (("cvmm", own), (PACKAGE, peer)):
            cpu, code, last = _run(words)
            if code == 0:
                results.add("measure_cpu", who, cpu)
            else:
                results.remark(f"{who} did not predict a digest (exit code {code}): {last}")


def td(results, cvmm):
    """Adds the commands that launch a TD, from the plan itself: cvmm's shim beside Debian's OVMF (any VMM's launch)."""
    found = dict(guest.files())
    shim = ["--kernel", found["cloud_kernel"], "--initrd", found["cloud_initrd"]]
    image = ["--payload", "tdvf", "--firmware", archive.packaged("ovmf-inteltdx", "OVMF.inteltdx.ms.fd")]
    for who, payload in (("cvmm", shim), ("tdvf", image)):
        words = [cvmm, "measure", "--platform", "tdx", "--json", *payload]
        launch = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
        results.add("tdx_pages", who, launch["pages"])
        results.add("tdx_extends", who, launch["extends"])
        results.add("tdx_bytes", who, launch["measured_bytes"] / 1024)


def _run(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def _peer():
    """sev-snp-measure from PyPI, in a virtual environment in the cache."""
    final = cache.root() / PACKAGE
    tool = final / "bin" / PACKAGE
    with cache.lock(PACKAGE):
        if not tool.exists():
            subprocess.run([sys.executable, "-m", "venv", final], check=True)
            subprocess.run([final / "bin" / "pip", "install", "-q", PACKAGE], check=True)
    return tool
