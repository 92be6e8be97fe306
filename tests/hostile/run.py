#!/usr/bin/env python3
"""The hostile guest: built, run under a VMM, and its verdicts as a table.

Usage: tests/hostile/run.py [--only C01,C02] [--mode plain] [--ecam HEX] [--image bzimage|pvh] [--name NAME] -- COMMAND...
       tests/hostile/run.py --show
COMMAND starts any VMM; in it {kernel} stands for the guest's file, {cmdline} for its command line and {console} for
the file that must get the guest's serial port. A machine that dies is started again behind the case that ended it.
Without a command, Debian's QEMU is put through the cases. Every whole run leaves a column in the target folder; --show
prints all columns side by side. Exit code 3 says that a machine failed a case, 2 that the cases could not be run.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts/bench.d"))
sys.path.insert(0, str(ROOT / "scripts/rig.d"))

import payload  # noqa: E402

LOAD, ENTRY_32 = 0x100_0000, 0x100_0300
# The program, its tables, its arena and the memory that it converts.
INIT_BYTES = 0x100_0000
STALLED_SECONDS = 60
GOOD = {"Pass", "Reject", "Absent"}


TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "hostile"
# Cargo keeps JSON of its own in TARGET.
VERDICTS = TARGET / "verdicts"
FAILED = 3


def build(folder):
    """Builds the guest; gives its two files, `bzimage` and `pvh`."""
    target = TARGET
    flags = "-Crelocation-model=static -Cno-redzone=yes -Ctarget-cpu=x86-64"
    triple = "x86_64-unknown-linux-gnu"
    environment = {**os.environ, "RUSTFLAGS": flags, "CARGO_TARGET_DIR": str(target)}
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--target", triple]
    subprocess.run(command, cwd=ROOT / "tests/hostile", env=environment, check=True)
    flat = Path(folder) / "flat"
    subprocess.run(["objcopy", "-O", "binary", target / triple / "release/hostile", flat], check=True)
    code = flat.read_bytes()
    files = {"bzimage": payload.wrap_bzimage(code, INIT_BYTES), "pvh": payload.wrap_pvh(code, LOAD, ENTRY_32, 1 << 20)}
    for name, data in files.items():
        (Path(folder) / name).write_bytes(data)
    return {name: str(Path(folder) / name) for name in files}


@dataclass(frozen=True)
class Outcome:
    """How one case ended on one device."""

    case: str
    device: str
    name: str
    verdict: str
    why: str


def outcomes(console, ended):
    """What a console says; a case that began and has no verdict ended the machine, for the reason `ended`."""
    begun = {}
    if last := re.search(r"HOSTILE (died|panics).*", console):
        ended = f"{last[0]}; {ended}"
    for line in console.replace("\0", "").splitlines():
        if began := re.match(r"BEGIN (\d+) (\S+) (\S+) (.*)", line):
            begun[int(began[1])] = Outcome(began[2], began[3], began[4], "Died", ended)
        elif case := re.match(r"CASE (\d+) (\S+) (\S+) (\w+) ?(.*)", line):
            name = begun[int(case[1])].name
            begun[int(case[1])] = Outcome(case[2], case[3], name, case[4], case[5])
    return begun


def play(start, words, lives=40):
    """Plays all cases: `start(cmdline)` runs a machine to its end and gives its console and a word on how it ended."""
    results, begin = {}, 0
    for _ in range(lives):
        console, ended = start(f"{words} from={begin}")
        found = outcomes(console, ended)
        results |= found
        if "HOSTILE ends" in console:
            return list(results.values())
        assert found, f"the machine ended before the first case: {ended}\n{console[-500:]}"
        begin = max(found) + 1
    raise AssertionError(f"more than {lives} machines died")


def gaps(results, only=""):
    """What a machine with all devices has not played of the cases that `only` names, or of all."""
    missing = set(filter(None, only.split(","))) - {outcome.case for outcome in results}
    found = [f"{case}: not played" for case in sorted(missing)]
    found += [f"{o.case} {o.device}: {o.why}" for o in results if o.why == "no such device"]
    return found if results else ["nothing was played"]


def save(name, results):
    """Keeps a machine's column for --show."""
    VERDICTS.mkdir(parents=True, exist_ok=True)
    (VERDICTS / f"{name}.json").write_text(json.dumps([asdict(outcome) for outcome in results]))


def saved():
    """All columns, cvmm's first."""
    files = sorted(VERDICTS.glob("*.json"), key=lambda path: (not path.stem.startswith("cvmm"), path.stem))
    return {path.stem: [Outcome(**fields) for fields in json.loads(path.read_text())] for path in files}


def table(columns):
    """A row a case, a column a machine; devices with the same verdict share a word."""
    cases = {}
    for outcome in (outcome for results in columns.values() for outcome in results):
        cases.setdefault(outcome.case, outcome.name)
    lines = [["case", "what the guest does", *columns]]
    for case, name in cases.items():
        lines.append([case, name, *(_cell([o for o in results if o.case == case]) for results in columns.values())])
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(results):
    groups = {}
    for outcome in results:
        if outcome.verdict != "Absent":
            groups.setdefault(outcome.verdict.upper(), []).append(outcome.device)
    if len(groups) == 1:
        return next(iter(groups))
    return ", ".join(f"{verdict} {' '.join(devices)}" for verdict, devices in groups.items()) or "-"


def local(command, image):
    """A way to start machines here, by a command with placeholders."""

    def start(words):
        with tempfile.TemporaryDirectory() as folder:
            console = Path(folder) / "console"
            console.touch()
            places = {"kernel": image, "cmdline": words, "console": str(console)}
            filled = [re.sub(r"\{(kernel|cmdline|console)\}", lambda m: places[m[1]], word) for word in command]
            with open(Path(folder) / "log", "w+") as log:
                machine = subprocess.Popen(filled, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                ended = _watch(machine, console)
                log.seek(0)
                last = (log.read().strip().splitlines() or [""])[-1]
            return console.read_text(errors="replace"), f"{ended}: {last}"[:160]

    return start


def _watch(machine, console):
    """Waits for the end, which the guest may have to leave to us, or for a guest that says nothing more."""
    size, since = 0, time.monotonic()
    while machine.poll() is None:
        time.sleep(0.2)
        now = console.stat().st_size
        if now != size:
            size, since = now, time.monotonic()
        done = "HOSTILE ends" in console.read_text(errors="replace")[-400:]
        if done or time.monotonic() - since > STALLED_SECONDS:
            machine.kill()
            machine.wait()
            return "ended" if done else "hung"
    return f"exit status {machine.returncode}"


def qemu(folder):
    """Words that start Debian's QEMU with the devices that cvmm also has, emulating the processor: it needs no KVM."""
    import programs

    program = programs.host_qemu()
    os.environ.update(program.environment)
    words = [*program.words, *program.firmware, "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128", "-nodefaults"]
    words += ["-display", "none", "-no-reboot", "-serial", "file:{console}", "-kernel", "{kernel}", "-append", "{cmdline}"]
    for name, more in (("d", ""), ("r", ",readonly=on")):
        image = Path(folder) / name
        image.touch()
        os.truncate(image, 16 << 20)
        words += ["-drive", f"file={image},format=raw,if=none,id={name}{more}", "-device", _modern("blk", f"drive={name}")]
    words += ["-device", _modern("rng"), "-netdev", "user,id=n", "-device", _modern("net", "netdev=n,romfile=")]
    return words + ["-device", _modern("serial"), "-chardev", "null,id=c", "-device", "virtconsole,chardev=c"]


def _modern(kind, more=""):
    return ",".join(filter(None, [f"virtio-{kind}-pci", "disable-legacy=on", more]))


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--mode", default="plain", choices=["plain", "soft", "snp"])
    parser.add_argument("--ecam", default="b0000000")
    parser.add_argument("--image", default="pvh", choices=["pvh", "bzimage"])
    parser.add_argument("--name", default="QEMU")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if options.show:
        print(table(saved()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = build(folder)
        words = f"mode={options.mode} ecam={options.ecam} ram=8000000" + (f" only={options.only}" if options.only else "")
        command = options.command or qemu(folder)
        results = play(local(command, files[options.image]), words)
    if not options.only:
        save(options.name, results)
    print(table({options.name: results}))
    bad = [outcome for outcome in results if outcome.verdict not in GOOD]
    for outcome in bad:
        print(f"{outcome.case} {outcome.device}: {outcome.verdict}: {outcome.why}")
    return FAILED if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        print(f"hostile: {error}", file=sys.stderr)
        sys.exit(2)
