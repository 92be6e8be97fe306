"""Building others' programs from source: the tools that it takes, steps whose failure explains itself, progress."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from report import RigError, say


def need(what, tools, probes):
    """Installs the Debian packages of the tools (name: package) and probes (command: package) that are missing."""
    wanted = [package for tool, package in tools.items() if not shutil.which(tool)]
    wanted += [package for probe, package in probes.items() if not _works(probe)]
    if not wanted:
        return
    if os.geteuid() != 0:
        raise RigError(f"to build {what} this machine needs packages; run as root: apt-get install {' '.join(wanted)}")
    say(f"installing build tools: {' '.join(wanted)}")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted]
    if subprocess.run(install, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return
    subprocess.run(["apt-get", "update", "-qq"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = subprocess.run(install, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RigError(f"`{' '.join(install)}` failed:\n{done.stderr.strip()}")


def _works(probe):
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = probe.split()
    return shutil.which(words[0]) is not None and subprocess.run(words, **quiet).returncode == 0


def step(what, name, command, cwd=None, env=None):
    """Runs one step; the last lines of its output are the error."""
    run = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        tail = "\n".join(run.stdout.splitlines()[-15:])
        raise RigError(f"building {what} stopped at `{name}` ({Path(command[0]).name}):\n{tail}")


def with_progress(what, command, done, cwd):
    """Runs the long step at low priority, with a line every tenth of the way; done(line) gives how far that is, or None."""
    process = subprocess.Popen(
        ["nice", "-n", "10", *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, shown = [], 0
    for line in process.stdout:
        lines.append(line.rstrip())
        if (share := done(line)) is not None and int(share * 10) > shown:
            shown = int(share * 10)
            say(f"{what}: {shown * 10} % built")
    if process.wait() != 0:
        failed = [i for i, line in enumerate(lines) if re.search(r"^FAILED|error:", line)]
        raise RigError(f"{what} does not compile:\n" + "\n".join(lines[failed[0] if failed else -15 :][:25]))


def python_with_meson_and_ninja(folder):
    """A Python environment in folder that has what QEMU's build asks for; gives its interpreter."""
    venv = folder / "venv"
    step("QEMU", "venv", [sys.executable, "-m", "venv", venv])
    step("QEMU", "pip", [venv / "bin/pip", "install", "-q", "meson>=1.5,<2", "pycotap>=1.1,<2", "ninja", "setuptools"])
    return venv / "bin" / "python3"
