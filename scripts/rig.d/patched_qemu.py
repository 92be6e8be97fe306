"""The QEMU that emulates SEV-SNP and TDX hosts: Debian's source plus the two patches beside this file.

Built once per content of the patches and version of the source; about eight minutes on two cores.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cache
from archive import Suite
from report import RigError, say

HERE = Path(__file__).parent
PATCHES = (HERE / "snp-emu.patch", HERE / "tdx-emu.patch")
SUITE = "trixie"
CONFIGURE = (
    "--target-list=x86_64-softmmu --without-default-features --enable-tcg --disable-docs --disable-tools "
    "--without-default-devices --with-devices-x86_64=snpemu --disable-werror --disable-install-blobs"
).split()
# What must be on the machine, and the Debian package that has it.
HEADERS = {
    "pkg-config --exists glib-2.0": "libglib2.0-dev",
    "gcc -E -include zlib.h -": "zlib1g-dev",
    "gcc -E -include libfdt.h -": "libfdt-dev",
}
TOOLS = {
    "gcc": "gcc", "make": "make", "patch": "patch", "xz": "xz-utils", "pkg-config": "pkg-config",
    "flex": "flex", "bison": "bison",
}


def binary():
    """The path of the patched qemu-system-x86_64, built now when the cache has none for these patches."""
    suite = Suite(SUITE, source=True)
    version = suite.source_version("qemu")
    entry = f"patched-qemu/{version.replace(':', '_')}-{cache.key(*PATCHES, ' '.join(CONFIGURE))}"
    return cache.made(entry, lambda folder: _build(suite, version, folder)) / "qemu-system-x86_64"


def _build(suite, version, folder):
    say(f"building QEMU {version} with the SNP and TDX emulation, once; about 8 minutes on two idle cores")
    _need_tools()
    tarball = suite.fetch_source("qemu", folder)
    source = folder / "source"
    source.mkdir()
    _step("unpack", ["tar", "-xJf", tarball, "-C", source, "--strip-components=1"], folder)
    for patch in PATCHES:
        _apply(patch, source, version)
    python = _python_with_meson(folder)
    env = dict(os.environ, PATH=f"{python.parent}:{os.environ['PATH']}")
    build = folder / "build"
    build.mkdir()
    _step("configure", [source / "configure", f"--python={python}", *CONFIGURE], folder, cwd=build, env=env)
    _ninja(python.parent / "ninja", build, folder)
    shutil.copy2(build / "qemu-system-x86_64", folder / "qemu-system-x86_64")
    for leftover in (source, build, python.parent.parent):
        shutil.rmtree(leftover)
    for file in folder.glob("qemu_*"):
        file.unlink()


def _need_tools():
    wanted = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    wanted += [package for probe, package in HEADERS.items() if not _works(probe)]
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL).returncode != 0:
        wanted.append("python3-venv")
    if not wanted:
        return
    if os.geteuid() != 0:
        raise RigError(f"to build the patched QEMU this machine needs packages; run as root: apt-get install {' '.join(wanted)}")
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


def _python_with_meson(folder):
    venv = folder / "venv"
    _step("venv", [sys.executable, "-m", "venv", venv], folder)
    _step("pip", [venv / "bin/pip", "install", "-q", "meson>=1.5,<2", "pycotap>=1.1,<2", "ninja", "setuptools"], folder)
    return venv / "bin" / "python3"


def _step(name, command, folder, cwd=None, env=None):
    """Runs one step of the build with its output in a log; its last lines are the error."""
    run = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        tail = "\n".join(run.stdout.splitlines()[-15:])
        raise RigError(f"building the patched QEMU stopped at `{name}` ({Path(command[0]).name}):\n{tail}")


def _apply(patch, source, version):
    run = subprocess.run(
        ["patch", "-p1", "--no-backup-if-mismatch", "-i", patch],
        cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    if run.returncode == 0:
        return
    file, failures = "?", []
    for line in run.stdout.splitlines():
        if named := re.match(r"patching file '?([^']*?)'?$", line):
            file = named[1]
        elif "FAILED" in line or "can't find file" in line:
            failures.append(f"  {file}: {line.strip()}")
    raise RigError(
        f"{patch.name} no longer applies to Debian's QEMU {version}:\n" + "\n".join(failures)
        + f"\nadapt the named hunks in {patch}"
    )


def _ninja(ninja, build, folder):
    """Builds with a progress line every tenth of the way, at low priority."""
    command = ["nice", "-n", "10", ninja, "-j", str(os.cpu_count() or 2), "qemu-system-x86_64"]
    process = subprocess.Popen(command, cwd=build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, shown = [], 0
    for line in process.stdout:
        lines.append(line.rstrip())
        if (step := re.match(r"\[(\d+)/(\d+)\]", line)) and int(step[1]) * 10 // int(step[2]) > shown:
            shown = int(step[1]) * 10 // int(step[2])
            say(f"patched QEMU: {shown * 10} % built")
    if process.wait() != 0:
        failed = [i for i, line in enumerate(lines) if line.startswith("FAILED")]
        raise RigError("the patched QEMU does not compile:\n" + "\n".join(lines[failed[0] if failed else -15:][:25]))
