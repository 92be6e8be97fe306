"""What scripts/hardware-check collects, judged: right, whole, and nothing that is nobody's business."""

import json
import re
import socket
import tarfile
import tempfile
from pathlib import Path

from host import output

# What the report must not name; the host kernel's log of L1 gets it, too.
OWNER = "the-owners-machine"
DIGESTS = {"soft": [], "snp": ["digest"], "tdx": ["mrtd", *(f"rtmr{index}" for index in range(4))]}
# Those that are not zero.
TELLING = {"digest", "mrtd", "rtmr1", "rtmr2"}


def collected(host, *options):
    """Runs the check in an L1; gives the archive's files by name, and which platform it was."""
    kind = "soft" if host.kind == "plain" else host.kind
    module = {"soft": "kvm_amd", "snp": "ccp", "tdx": "virt/tdx"}[kind]
    host.shell(f"hostname {OWNER} && echo '{module}: {OWNER} has a name' >/dev/kmsg")
    with tempfile.TemporaryDirectory() as folder:
        output("scripts/hardware-check", kind, "--l1", host.name, "--cvmm", host.binary, "--out", folder, *options)
        (archive,) = Path(folder).iterdir()
        with tarfile.open(archive) as tar:
            assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in tar} == {(0, 0, "", "")}
            files = {Path(entry.name).name: tar.extractfile(entry).read().decode() for entry in tar}
    _, left = host.shell("ls -d /root/hardware-check*; true")
    assert "No such file" in left, left
    return files, kind


def judged(host, cpus=(1, 2), early=False):
    """Asserts that a report is right; gives the launches' seconds. Early: with the guest's first words, before any
    driver, of which every byte costs a port access."""
    files, kind = collected(host, "--cpus", ",".join(map(str, cpus)), *([] if early else ["--no-early-console"]))
    parts = [f"{name}-{number}.{end}" for number in cpus for name, end in (("console", "txt"), ("events", "jsonl"), ("log", "txt"))]
    assert sorted(files) == sorted(["README.txt", "doctor.json", "host-kernel.txt", "summary.json", *parts]), sorted(files)
    assert json.loads(files["doctor.json"])["usable"][kind] is True, files["doctor.json"]
    summary = json.loads(files["summary.json"])
    assert set(summary["versions"]) == {"cvmm", "commit", "kernel", "processor", "microcode"}, summary
    launches = summary["launches"]
    assert [launch["cpus"] for launch in launches] == list(cpus) and all(launch["ok"] for launch in launches), launches
    for launch in launches:
        agree(launch, kind)
        assert early == ("Linux version" in files[f"console-{launch['cpus']}.txt"]), files
        log = files[f"log-{launch['cpus']}.txt"]
        assert re.search(r'launch: "\S.*" at 0x\w+, \d+ bytes, Measured', log), log
        assert f"launch: {launch['cpus']} vCPUs" in log, log
    named(files, launches)
    return ", ".join(f"{launch['cpus']} vCPU {launch['seconds']} s" for launch in launches)


def agree(launch, kind):
    """Digests and times of one launch."""
    predicted, reported = launch["predicted"], launch["reported"]
    assert sorted(reported) == DIGESTS[kind], launch
    assert all(reported[name] == predicted[name] for name in reported), launch
    assert all(set(reported[name]) != {"0"} for name in TELLING & set(reported)), launch
    assert launch["announced"] == [predicted.get("digest") or predicted["mrtd"]], launch
    times = launch["seconds_by_event"]
    assert 0 < times["measured"] < times["running"] < times["guest_off"] <= times["stopped"] < launch["seconds"], launch


def named(files, launches):
    """Nobody is named, and every long number is a digest that the report is about."""
    told = "".join(files.values())
    assert "HOST has a name" in files["host-kernel.txt"], files["host-kernel.txt"]
    # What a machine may be called, and stock kernels say of themselves or of a loop-back interface.
    here = {socket.gethostname()} - {"debian", "localhost", "linux"}
    for word in (OWNER, *here, "/root", "cvmm.role=l1", "CVMM-REPORT", "PRIVATE KEY", "BEGIN CERTIFICATE"):
        assert not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", told), word
    digests = {value for launch in launches for value in [*launch["predicted"].values(), *launch["announced"]]}
    # The register that the test guest extends, after that.
    extended = set(re.findall(r"extended=([0-9a-f]{96})", told))
    unknown = set(re.findall(r"[0-9a-fA-F]{64,}", told)) - digests - extended - {"0" * 96}
    assert not unknown, unknown
    # A report or a certificate as text would be a line of that.
    assert not (long := [word for word in re.findall(r"[A-Za-z0-9+/=]{100,}", told) if not re.fullmatch(r"[\w:.]*=?[0-9a-f]+", word)]), long
