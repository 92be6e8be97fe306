"""Debian's newest stock kernels: resolved at run time, never pinned to a version."""

import functools
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import cache
from archive import StaleLists, Suite
from report import RigError, say

# Newest first; a suite that cannot be reached is passed over.
SUITES = ("sid", "trixie")
OLDEST = (6, 12)


class Kernel:
    """An unpacked Debian kernel: `vmlinuz`, and the modules with their dependencies."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.vmlinuz = self.folder / "vmlinuz"
        self.release = (self.folder / "release").read_text().strip()

    def has(self, name):
        """Whether the kernel has this module, loadable or built in."""
        return _plain(name) in self._loadable() or _plain(name) in self._builtin()

    def module(self, name):
        """(file name, bytes) of one module, decompressed; None when it is built into the kernel."""
        path = self._loadable().get(_plain(name))
        if path is None:
            if self.has(name):
                return None
            raise RigError(f"Debian's kernel {self.release} has no module {name}, which the rig needs")
        return path.name.split(".ko")[0] + ".ko", _expand(path)

    @functools.cache
    def _loadable(self):
        return {_plain(path.name): path for path in (self.folder / "modules").rglob("*.ko*")}

    @functools.cache
    def _builtin(self):
        names = (self.folder / "modules" / "modules.builtin").read_text().split()
        return {_plain(Path(name).name) for name in names}

    def modules(self, names):
        """The named modules and all that they depend on as (file name, bytes), in the order to load them."""
        loaded = {}

        def visit(name):
            if _plain(name) in loaded:
                return
            found = self.module(name)
            if found is None:
                return
            for needed in _depends(found[1]):
                visit(needed)
            loaded[_plain(name)] = found

        for name in names:
            visit(name)
        return list(loaded.values())


def newest(flavour):
    """The newest kernel of Debian's package linux-image-FLAVOUR (`amd64`, `cloud-amd64`)."""
    problems = []
    for name in SUITES:
        suite = Suite(name)
        try:
            version, needs = suite.candidate(f"linux-image-{flavour}")
        except StaleLists:
            raise
        except RigError as error:
            problems.append(str(error))
            continue
        entry = f"kernel/{flavour}/{version.replace(':', '_')}"
        return Kernel(cache.made(entry, lambda folder: _fetch(suite, flavour, needs, folder)))
    raise RigError("no Debian kernel to be had:\n" + "\n".join(problems))


def _fetch(suite, flavour, needs, folder):
    images = [name for name in needs if name.startswith("linux-")]
    say(f"fetching Debian's {next((name for name in images if name.startswith('linux-image-')), flavour)}")
    tree = folder / "tree"
    pending, seen = images, set()
    while pending:
        package = pending.pop()
        if package in seen:
            continue
        seen.add(package)
        suite.unpack(package, tree)
        pending += [name for name in suite.candidate(package)[1] if re.match(r"linux-(image|base|binary|modules)-\d", name)]
    vmlinuz = next(iter(sorted(tree.glob("boot/vmlinuz-*")) or sorted(tree.rglob("vmlinuz*"))), None)
    modules = next(iter(sorted(tree.glob("usr/lib/modules/*")) or sorted(tree.glob("lib/modules/*"))), None)
    if vmlinuz is None or modules is None:
        raise RigError(f"Debian's {', '.join(sorted(seen))} has no kernel image or no modules where the rig looks")
    if tuple(int(n) for n in re.findall(r"\d+", modules.name)[:2]) < OLDEST:
        raise RigError(f"the newest linux-image-{flavour} is {modules.name}; cvmm needs 6.12 or newer")
    (folder / "release").write_text(modules.name + "\n")
    shutil.move(vmlinuz, folder / "vmlinuz")
    shutil.move(modules, folder / "modules")
    shutil.rmtree(tree)


def _plain(name):
    return name.split(".ko")[0].replace("-", "_")


def _expand(path):
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], check=True, stdout=subprocess.PIPE).stdout
    return path.read_bytes()


def _depends(module):
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found[1].decode().split(",") if name] if found else []
