"""L1's kernel for a TDX host: Debian's newest kernel source, built with `tdx-host-kernel.config`.

Debian's own kernels leave INTEL_TDX_HOST off. Built once per content of the configuration and version of the source.
"""

import os
import re
import shutil
from pathlib import Path

import building
import cache
from archive import Suite
from report import RigError, say

HERE = Path(__file__).parent
CONFIG = HERE / "tdx-host-kernel.config"
# Only sid has a kernel that is new enough; KVM's TDX code came with 6.16.
SUITE = "sid"
OLDEST = (6, 16)
WHAT = "L1's TDX kernel"
TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"}
PROBES = {"gcc -E -include libelf.h -": "libelf-dev"}
# Objects that the configuration compiles, about: for the progress lines only.
OBJECTS = 1270


def image():
    """The path of L1's kernel image, built now when the cache has none for this configuration and source."""
    suite = Suite(SUITE)
    source = next((name for name in suite.candidate("linux-source")[1] if name.startswith("linux-source-")), "")
    if tuple(int(n) for n in re.findall(r"\d+", source)) < OLDEST:
        raise RigError(f"Debian {SUITE} has {source or 'no linux-source'}; a TDX host needs Linux {'.'.join(map(str, OLDEST))} or newer")
    version, _ = suite.candidate(source)
    entry = f"tdx-kernel/{version.replace(':', '_')}-{cache.key(CONFIG)}"
    return cache.made(entry, lambda folder: _build(suite, source, version, folder)) / "bzImage"


def _build(suite, package, version, folder):
    say(f"building L1's kernel {version} for a TDX host, once; about 4 minutes on two idle cores")
    building.need(WHAT, TOOLS, PROBES)
    suite.unpack(package, folder / "package")
    tarball = next((folder / "package").rglob("linux-source-*.tar.xz"))
    source = folder / "source"
    source.mkdir()
    building.step(WHAT, "unpack", ["tar", "-xJf", tarball, "-C", source, "--strip-components=1"])
    building.step(WHAT, "configure", ["make", "-s", f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"], cwd=source)
    _check((source / ".config").read_text(), version)
    compiled = iter(range(OBJECTS))
    share = lambda line: next(compiled, OBJECTS) / OBJECTS if line.startswith("  CC ") else None  # noqa: E731
    building.with_progress(WHAT, ["make", f"-j{os.cpu_count() or 2}", "bzImage"], share, source)
    shutil.copy2(source / "arch/x86/boot/bzImage", folder / "bzImage")
    for leftover in (source, folder / "package"):
        shutil.rmtree(leftover)


def _check(made, version):
    """A kernel that has renamed or dropped an option would fail much later, in L1."""
    wanted = re.findall(r"(?m)^CONFIG_\w+=.+$", CONFIG.read_text())
    lost = [line for line in wanted if not line.endswith("=n") and line not in made.splitlines()]
    if lost:
        raise RigError(f"Linux {version} does not take what {CONFIG.name} asks for: {', '.join(lost)}")
