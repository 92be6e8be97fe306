"""The cache outside the tree: each entry is built once, under a lock, and appears complete or not at all."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def root():
    """The cache folder: $CVMM_CACHE, else ~/.cache/cvmm."""
    path = Path(os.environ.get("CVMM_CACHE") or Path.home() / ".cache" / "cvmm")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def lock(name):
    """Holds the cache-wide lock called name; waits for whoever else is making the same thing."""
    folder = root() / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / name.replace("/", "_"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def key(*parts):
    """A short name for the content of all parts (bytes, str or paths of files)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def made(name, make):
    """The cache entry name (a folder); make(folder) fills a fresh one when there is none yet."""
    final = root() / name
    if final.exists():
        return final
    with lock(name):
        if final.exists():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".new-{key(name)}-"
        for abandoned in final.parent.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        try:
            make(fresh)
            fresh.chmod(0o755)
            fresh.rename(final)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return final
