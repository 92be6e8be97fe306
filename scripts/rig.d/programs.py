"""The programs that go into the rig's machines or run them: static busybox, our guest program, Debian's QEMU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import cache
from archive import Suite
from report import RigError, say

TREE = Path(__file__).resolve().parents[2]
GUEST_SOURCE = TREE / "tests" / "guest"
TARGET = "x86_64-unknown-linux-gnu"
SUITE = "trixie"
OLDEST_QEMU = 9


def busybox():
    """The bytes of Debian's statically linked busybox."""
    return _busybox().read_bytes()


def applets():
    """The names under which busybox can be called."""
    return subprocess.run([_busybox(), "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def _busybox():
    def fetch(folder):
        suite.unpack("busybox-static", folder / "tree")
        binary = next(path for path in (folder / "tree").rglob("busybox") if path.is_file() and path.parent.name == "bin")
        shutil.move(binary, folder / "busybox")
        shutil.rmtree(folder / "tree")

    suite = Suite(SUITE)
    version, _ = suite.candidate("busybox-static")
    return cache.made(f"busybox/{version.replace(':', '_')}", fetch) / "busybox"


def guest_program():
    """The bytes of our program for L1 and L2 (tests/guest)."""
    return guest_program_path().read_bytes()


def guest_program_path():
    """The path of our program, built static once per content of its source."""
    sources = sorted([*GUEST_SOURCE.glob("src/*.rs"), GUEST_SOURCE / "Cargo.toml", GUEST_SOURCE / "Cargo.lock"])
    return cache.made(f"guest-program/{cache.key(*sources)}", _build_guest_program) / "cvmm-guest"


def _build_guest_program(folder):
    cargo = shutil.which("cargo")
    if cargo is None:
        raise RigError("cargo is missing: install Rust, which cvmm itself needs too")
    say("building the guests' program (tests/guest)")
    env = dict(os.environ, CARGO_TARGET_DIR=str(folder / "target"))
    env[f"CARGO_TARGET_{TARGET.upper().replace('-', '_')}_RUSTFLAGS"] = "-C target-feature=+crt-static"
    command = [cargo, "build", "-q", "--release", "--locked", "--target", TARGET, "--manifest-path", GUEST_SOURCE / "Cargo.toml"]
    run = subprocess.run(command, env=env, cwd=GUEST_SOURCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        raise RigError(f"the guests' program does not build:\n{run.stdout.strip()}")
    shutil.move(folder / "target" / TARGET / "release" / "cvmm-guest", folder / "cvmm-guest")
    shutil.rmtree(folder / "target")


class Qemu:
    """A QEMU ready to run: the command's first words, its environment, and where firmware lies."""

    def __init__(self, words, environment, firmware):
        self.words = [str(word) for word in words]
        self.environment = environment
        self.firmware = [str(word) for word in firmware]


def host_qemu():
    """Debian's QEMU: the installed one when it is recent, else the archive's, unpacked in the cache."""
    installed = shutil.which("qemu-system-x86_64")
    if installed:
        shown = subprocess.run([installed, "--version"], stdout=subprocess.PIPE, text=True).stdout
        version = re.search(r"version (\d+)\.", shown)
        if version and int(version[1]) >= OLDEST_QEMU:
            return Qemu([installed], {}, ["-L", "/usr/share/seabios", "-L", "/usr/share/qemu"])
    tree = qemu_tree()
    environment = {"QEMU_MODULE_DIR": str(tree / "usr/lib/x86_64-linux-gnu/qemu")}
    return Qemu(private_words(tree), environment, firmware(tree))


def qemu_tree():
    """Debian's qemu-system-x86 with all libraries it needs, as a tree that can run from anywhere."""

    def fetch(folder):
        say(f"fetching Debian's QEMU {version} (about 70 MB)")
        suite.unpack("qemu-system-x86", folder, closure=True)
        for unneeded in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/lib/locale", "usr/share/zoneinfo"):
            shutil.rmtree(folder / unneeded, ignore_errors=True)

    suite = Suite(SUITE)
    version, _ = suite.candidate("qemu-system-x86")
    return cache.made(f"qemu/{version.replace(':', '_')}", fetch)


def private_words(tree, binary="usr/bin/qemu-system-x86_64", at=None):
    """Words that run a binary of an unpacked tree with the tree's own loader, libraries and firmware."""
    at = Path(at or tree)
    loader = _loader(Path(tree))
    libraries = ":".join(str(at / part) for part in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
    return [at / loader, "--library-path", libraries, at / binary, *firmware(at)]


def firmware(root):
    """Words that name the firmware folders of an unpacked tree."""
    return [word for part in ("usr/share/seabios", "usr/share/qemu") for word in ("-L", root / part)]


def _loader(tree):
    for place in ("usr/lib64", "lib64", "usr/lib/x86_64-linux-gnu"):
        if (tree / place / "ld-linux-x86-64.so.2").exists():
            return f"{place}/ld-linux-x86-64.so.2"
    raise RigError(f"no loader in {tree}: Debian's libc6 lies elsewhere than the rig looks")
