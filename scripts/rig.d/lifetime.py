"""L1s that live for one command, and L1s that are kept: where they are, how they start and end."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import machine
import session
from report import RigError, say

BOOT_SECONDS = 300


def home():
    """The folder of this user's kept L1s; short, for the sockets' paths have little room."""
    folder = Path(os.environ.get("CVMM_RIG_DIR") or f"/tmp/cvmm-rig.{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RigError(f"{folder} belongs to someone else: set CVMM_RIG_DIR to a folder of yours with a short path")
    return folder


def kept(name):
    """The folder of a kept L1 that runs."""
    folder = home() / name
    if not _alive(folder):
        raise RigError(f"no L1 named {name} is up: start it with `scripts/rig up --name {name}`")
    return folder


def names():
    """The names of the L1s that run."""
    return sorted(folder.name for folder in home().iterdir() if _alive(folder))


def _clear_leftovers():
    """Removes folders of L1s whose rig was killed; their QEMU died with it."""
    for folder in home().iterdir():
        if (folder / "pid").exists() and not _alive(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(folder):
    try:
        state = Path(f"/proc/{int((folder / 'pid').read_text())}/stat").read_text()
    except (OSError, ValueError):
        return False
    # A container's first process may never wait for those that have ended.
    return state.rpartition(")")[2].split()[0] not in "ZX"


def sign(folder):
    """Makes this process the one whose end is the L1's. Who clears up must see the whole number or none."""
    fresh = folder / "pid.new"
    fresh.write_text(str(os.getpid()))
    fresh.rename(folder / "pid")


@contextlib.contextmanager
def for_now(spec):
    """An L1 for as long as the block runs; it ends with this process, even by kill -9."""
    _clear_leftovers()
    machine.command(spec, home())
    with tempfile.TemporaryDirectory(prefix="once.", dir=home()) as path:
        folder = Path(path)
        sign(folder)
        process = machine.start(spec, folder)
        try:
            _await_boot(folder)
            yield folder
        finally:
            process.kill()
            process.wait()


def keep(spec, name, lifetime):
    """Starts an L1 that stays up after this process, for at most lifetime seconds."""
    folder = home() / name
    if _alive(folder):
        raise RigError(f"an L1 named {name} is up already: `scripts/rig down --name {name}` ends it")
    _clear_leftovers()
    # Everything slow and everything that can go wrong comes before the fork, where the user sees it.
    machine.command(spec, folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        _guard(spec, folder, lifetime, ours)
    os.close(ours)
    try:
        _await_boot(folder)
        os.write(theirs, b"k")
    finally:
        os.close(theirs)


def _guard(spec, folder, lifetime, started):
    """The process beside a kept L1: QEMU dies with it, and it ends QEMU when its time is over."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(folder / "guard.log", os.O_CREAT | os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, null), (1, log), (2, log)):
        os.dup2(target, number)
    sign(folder)
    process = machine.start(spec, folder)
    select.select([started], [], [])
    wanted = os.read(started, 1) == b"k"
    if wanted:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=lifetime)
    process.kill()
    (folder / "pid").unlink(missing_ok=True)
    if not wanted:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def down(name):
    """Ends a kept L1; it has nothing to save."""
    pid = int((kept(name) / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    while _alive(home() / name):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    shutil.rmtree(home() / name, ignore_errors=True)


def _await_boot(folder):
    began = time.monotonic()
    while not (folder / "port.0").exists():
        log = folder / "qemu.log"
        if time.monotonic() - began > 20:
            raise RigError(f"QEMU did not start:\n{log.read_text().strip() if log.exists() else ''}")
        time.sleep(0.02)
    try:
        if (code := session.Session(folder, ["/bin/true"]).run(patience=BOOT_SECONDS)) != 0:
            raise RigError(f"L1 boots, but /bin/true in it ends with {code}")
    except session.L1Gone as error:
        console = (folder / "console.log").read_text(errors="replace").splitlines()[-15:]
        errors = (folder / "qemu.log").read_text(errors="replace").strip()
        raise RigError("L1 did not boot; its last words:\n" + "\n".join([*console, errors])) from error
    say(f"L1 is up ({time.monotonic() - began:.1f} s)")
