"""The QEMU that emulates SEV-SNP and TDX hosts: Debian's source plus the two patches beside this file.

Built once per content of the patches and version of the source; about eight minutes on two cores.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import building
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
WHAT = "the patched QEMU"
# What must be on the machine, and the Debian package that has it.
PROBES = {
    f"{sys.executable} -m ensurepip --version": "python3-venv",
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
    building.need(WHAT, TOOLS, PROBES)
    tarball = suite.fetch_source("qemu", folder)
    source = folder / "source"
    source.mkdir()
    building.step(WHAT, "unpack", ["tar", "-xJf", tarball, "-C", source, "--strip-components=1"])
    for patch in PATCHES:
        _apply(patch, source, version)
    python = building.python_with_meson_and_ninja(folder)
    env = dict(os.environ, PATH=f"{python.parent}:{os.environ['PATH']}")
    build = folder / "build"
    build.mkdir()
    building.step(WHAT, "configure", [source / "configure", f"--python={python}", *CONFIGURE], cwd=build, env=env)
    ninja = [python.parent / "ninja", "-j", str(os.cpu_count() or 2), "qemu-system-x86_64"]
    building.with_progress(WHAT, ninja, _share, build)
    shutil.copy2(build / "qemu-system-x86_64", folder / "qemu-system-x86_64")
    for leftover in (source, build, python.parent.parent):
        shutil.rmtree(leftover)
    for file in folder.glob("qemu_*"):
        file.unlink()


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


def _share(line):
    found = re.match(r"\[(\d+)/(\d+)\]", line)
    return int(found[1]) / int(found[2]) if found else None
