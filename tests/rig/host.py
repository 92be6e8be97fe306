"""An L1 host and the guests that run in it."""

import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RIG = str(ROOT / "scripts/rig")
CONSOLE_TAIL = 25
# An L1 that does not answer this often in a row, each time for so many seconds, hangs.
HUNG_AFTER, PING_SECONDS = 3, 25


class L1Hung(Exception):
    """The emulated host itself stopped; that says nothing about cvmm."""


def output(*command, **options):
    """What a command on this machine prints; its failure is ours."""
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, **options).stdout


def guest_files():
    """The stock kernels, test initrds, disk and tool that scripts/guest makes."""
    return dict(line.split("=", 1) for line in output("scripts/guest").splitlines())


@dataclass
class Ended:
    """One run of cvmm in L1."""

    code: int
    console: str
    stderr: str
    events: list = field(default_factory=list)
    extra: str = ""
    words: str = ""
    late: str = ""

    def results(self):
        """The guest's own verdicts, by test name."""
        found = re.findall(r"CVMM-TEST (\S+) (PASS|FAIL) ?(.*)", self.console)
        return {name: (verdict, note.strip()) for name, verdict, note in found}

    def passed(self, *names):
        """Asserts that the guest passed these tests and that cvmm says it powered off."""
        results = self.results()
        for name in names:
            verdict = results.get(name, ("missing", ""))
            assert verdict[0] == "PASS", f"guest test {name}: {verdict}\n{self.tail()}"
        assert self.code == 0, f"cvmm ended with {self.code}: {self.stderr.strip()}\n{self.tail()}"
        return results

    def event_names(self):
        """Names of the events, in order."""
        return [event["event"] for event in self.events]

    def tail(self):
        """The last lines of console and messages, and where threads were when time was up, for people."""
        lines = [*(self.console + self.stderr).splitlines()[-CONSOLE_TAIL:], *self.late.splitlines()]
        return "\n".join("    " + line for line in lines)


class Host:
    """An L1 that stays up for many tests."""

    def __init__(self, kind, keep=False):
        self.kind, self.keep = kind, keep
        self.name = f"test-{kind}-{os.getpid()}"
        self.lives = 0

    def __enter__(self):
        self.lives += 1
        self.name = f"test-{self.kind}-{os.getpid()}-{self.lives}"
        self.files = guest_files()
        binary = os.environ.get("CVMM_BINARY") or output("scripts/build").strip()
        self.binary = binary
        places = {
            binary: "/root/cvmm",
            self.files["guest_tool"]: "/root/tool",
            str(ROOT / "tests/rig/guest.sh"): "/root/guest.sh",
            self.files["disk"]: "/root/disk",
        }
        for flavour in ("amd64", "cloud"):
            places[self.files[f"{flavour}_kernel"]] = f"/root/{flavour}-kernel"
            places[self.files[f"{flavour}_initrd"]] = f"/root/{flavour}-initrd"
        options = ["--patched" if self.kind == "plain" else f"--{self.kind}"]
        for source, place in places.items():
            options += ["--file", f"{source}:{place}"]
        began = time.monotonic()
        subprocess.run([RIG, "up", "--name", self.name, "--memory", "6500", "--append", "tsc=reliable", *options], check=True)
        print(f"     {self.kind} L1 is up ({time.monotonic() - began:.0f} s)", flush=True)
        return self

    def __exit__(self, *_):
        if not self.keep:
            self.down()

    def down(self):
        """Ends the L1, also one to be kept."""
        subprocess.run([RIG, "down", "--name", self.name], check=False)

    def shell(self, script, timeout=120, check=True):
        """Runs a shell script in L1; gives exit code and output."""
        command = [RIG, "exec", "--name", self.name, "--timeout", str(timeout), "--", "sh", "-c", script]
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            self._watch(running)
            log.seek(0)
            text = log.read()
        if check:
            assert running.returncode == 0, f"`{script}` in L1 ended with {running.returncode}: {text}"
        return running.returncode, text

    def _watch(self, running):
        """Waits for a command in L1, and notices when L1 stops answering."""
        silent = 0
        while True:
            try:
                running.wait(PING_SECONDS)
                return
            except subprocess.TimeoutExpired:
                pass
            ping = [RIG, "exec", "--name", self.name, "--timeout", str(PING_SECONDS), "--", "true"]
            try:
                alive = subprocess.run(ping, capture_output=True, timeout=2 * PING_SECONDS).returncode == 0
            except subprocess.TimeoutExpired:
                alive = False
            silent = 0 if alive else silent + 1
            if silent == HUNG_AFTER:
                running.kill()
                running.wait()
                raise L1Hung(f"the {self.kind} L1 stopped answering")

    def run_tests(self, package, name):
        """Builds a test program of the workspace statically and runs it in L1; nothing in it may be skipped."""
        flags = {"CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS": "-C target-feature=+crt-static"}
        built = output(
            "cargo", "test", "--no-run", "--quiet", "--target", "x86_64-unknown-linux-gnu", "-p", package,
            "--test", name, "--message-format=json", env={**os.environ, **flags},
        )  # fmt: skip
        programs = [message.get("executable") for message in map(json.loads, built.splitlines())]
        program = next(path for path in programs if path and Path(path).name.startswith(f"{name}-"))
        subprocess.run([RIG, "push", "--name", self.name, f"{program}:/root/{name}"], check=True)
        code, text = self.shell(f"cd /root && ./{name} --nocapture --test-threads=1", 300, check=False)
        assert code == 0 and "SKIP" not in text, text[-2000:]
        return re.search(r"test result: .*?;", text).group(0)

    def guest(self, *arguments, run="", cmdline="", flavour="cloud", timeout=240, extra="", net=False, kernel=None, initrd=None, **env):
        """Runs one guest to its end, by guest.sh, with whatever the tests in `run` need on the host's side."""
        words = f"console=hvc0 quiet cvmm.run={run} {cmdline}".strip()
        command = [
            "--kernel", kernel or f"/root/{flavour}-kernel", "--initrd", initrd or f"/root/{flavour}-initrd", "--cmdline", words,
            "--platform", "soft" if self.kind == "plain" else self.kind, "--console", "file=/root/console",
            *arguments,
        ]  # fmt: skip
        settings = {"TIMEOUT": timeout, "EXTRA": extra, "NET": "1" if net else "", **env}
        exports = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in settings.items())
        quoted = " ".join(shlex.quote(str(word)) for word in command)
        code, text = self.shell(f"{exports} /root/guest.sh {quoted}", timeout + 60, check=False)
        parts = dict(re.findall(r"^=== (\w+)\n(.*?)(?=^=== |\Z)", text, flags=re.M | re.S))
        assert "code" in parts, f"guest.sh ended with {code}:\n{text[-2000:]}"
        events = [json.loads(line) for line in parts["events"].splitlines()]
        console = parts["console"].replace("\r", "")
        return Ended(int(parts["code"].split()[0]), console, parts["stderr"], events, parts.get("extra", ""), words, parts["late"])
