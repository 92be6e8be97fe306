"""Debian's archive through a private apt: own sources, state and cache, so the host's apt is never altered.

Works for any user: packages are downloaded and unpacked with `dpkg -x`, never installed.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import cache
from report import RigError, say

FRESH_SECONDS = 3 * 24 * 3600


def mirror():
    """The Debian mirror: $CVMM_DEBIAN_MIRROR, else the one the host's own apt uses."""
    if os.environ.get("CVMM_DEBIAN_MIRROR"):
        return os.environ["CVMM_DEBIAN_MIRROR"]
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted(etc.glob("sources.list.d/*"))]
    for file in filter(Path.is_file, files):
        for uri in re.findall(r"[a-z+]+:/\S+", re.sub(r"(?m)^\s*#.*", "", file.read_text())):
            if uri.rstrip("/").endswith("/debian"):
                return uri
    raise RigError(
        "no Debian mirror found in /etc/apt: the rig takes kernels and QEMU from Debian; "
        "set CVMM_DEBIAN_MIRROR to the address of one (it ends in /debian)"
    )


def keyring():
    """The archive's signing keys as this machine has them."""
    for name in ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp"):
        if (path := Path("/usr/share/keyrings") / name).exists():
            return path
    raise RigError("no Debian signing keys in /usr/share/keyrings: install the package debian-archive-keyring")


class StaleLists(RigError):
    """The archive has moved on: a file that the package lists name is gone."""


def with_fresh_lists(action):
    """Runs action; when the archive has moved on since the lists were fetched, fetches them and runs it again."""
    try:
        return action()
    except StaleLists as stale:
        say("Debian's archive has changed; fetching the package lists again")
        for stamp in (cache.root() / "apt").glob("*/updated"):
            os.utime(stamp, (0, 0))
        try:
            return action()
        except StaleLists:
            raise RigError(f"Debian's mirror lacks files that its own lists name; try later or another mirror\n{stale}") from stale


class Suite:
    """One suite of the archive (`sid`, `trixie`), with its package lists in the cache."""

    def __init__(self, name, source=False):
        self.name = name
        self.source = source
        self.home = cache.root() / "apt" / (name + ("-src" if source else ""))

    def refresh(self):
        """Downloads the package lists when they are older than three days; old ones serve when that fails."""
        for tool in ("apt-get", "dpkg"):
            if not shutil.which(tool):
                raise RigError(f"{tool} is missing: the rig needs a Debian or a derivative of it to fetch packages")
        stamp = self.home / "updated"
        with cache.lock(f"apt-{self.home.name}"):
            if stamp.exists() and time.time() - stamp.stat().st_mtime < FRESH_SECONDS:
                return
            self._configure()
            say(f"fetching Debian's package lists ({self.home.name})")
            run = self._run("apt-get", "update", check=False)
            if run.returncode == 0:
                stamp.touch()
            elif stamp.exists():
                say(f"package lists of {self.name} not refreshed, using those at hand")
            else:
                raise RigError(
                    f"apt-get update for Debian {self.name} did not work; is the network there?\n{run.stderr.strip()}"
                )

    def _configure(self):
        for folder in ("lists/partial", "archives/partial", "etc/parts", "log"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        kinds = "deb deb-src" if self.source else "deb"
        (self.home / "etc/debian.sources").write_text(
            f"Types: {kinds}\nURIs: {mirror()}\nSuites: {self.name}\nComponents: main\nSigned-By: {keyring()}\n"
        )
        home, etc = self.home, self.home / "etc"
        (self.home / "apt.conf").write_text(
            f'Dir::State "{home}";\nDir::State::status "{home}/status";\nDir::State::lists "{home}/lists";\n'
            f'Dir::Cache "{home}";\nDir::Cache::archives "{home}/archives";\nDir::Log "{home}/log";\n'
            f'Dir::Etc::sourcelist "{etc}/debian.sources";\nDir::Etc::sourceparts "{etc}/parts";\n'
            f'Dir::Etc::preferences "/dev/null";\nDir::Etc::preferencesparts "{etc}/parts";\n'
            'APT::Architecture "amd64";\nAPT::Architectures { "amd64"; };\nAPT::Sandbox::User "";\n'
            'APT::Install-Recommends "false";\nAcquire::Languages "none";\nAcquire::Retries "3";\n'
        )

    def _run(self, *command, check=True, cwd=None):
        env = dict(os.environ, APT_CONFIG=str(self.home / "apt.conf"), LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
        run = subprocess.run(command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if check and run.returncode != 0:
            kind = StaleLists if re.search(r"404|Hash Sum mismatch", run.stderr) else RigError
            raise kind(f"`{' '.join(command)}` for Debian {self.name} failed:\n{(run.stderr or run.stdout).strip()}")
        return run

    def candidate(self, package):
        """(version, direct dependencies) of the newest version of package."""
        shown = self._asked("apt-cache", "show", "--no-all-versions", package)
        fields = dict(re.findall(r"(?m)^([A-Za-z-]+): (.*)$", shown))
        names = [re.split(r"[ (|:]", part.strip())[0] for part in fields.get("Depends", "").split(",")]
        return fields["Version"], names

    def _asked(self, *command):
        """The answer to a question about the package lists, remembered until they are fetched anew."""
        self.refresh()
        answer = self.home / f"answer-{cache.key(*command)}"
        if not answer.exists() or answer.stat().st_mtime < (self.home / "updated").stat().st_mtime:
            text = self._run(*command).stdout
            fresh = answer.with_suffix(f".{os.getpid()}")
            fresh.write_text(text)
            fresh.rename(answer)
        return answer.read_text()

    def unpack(self, package, into, closure=False):
        """Downloads package (with closure: and all that it depends on) and unpacks it into a folder."""
        self.refresh()
        with cache.lock(f"apt-{self.home.name}"):
            if closure:
                # What an interrupted run has left would not be planned again, and be missing from the folder.
                for left in (self.home / "archives").glob("*.deb"):
                    left.unlink()
                planned = self._run("apt-get", "install", "--print-uris", "-qq", package).stdout
                names = [Path(uri.split("'")[2].split()[0]).name for uri in planned.splitlines()]
                self._run("apt-get", "install", "--download-only", "-y", "-qq", package)
                debs = [self.home / "archives" / name for name in names]
            else:
                work = self.home / "archives" / "partial"
                printed = self._run("apt-get", "download", "--print-uris", package, cwd=work).stdout
                self._run("apt-get", "download", package, cwd=work)
                debs = [work / printed.split("'")[2].split()[0]]
            # Under the lock: another rig may want the same package, and takes the file that is there for its own.
            for deb in debs:
                done = subprocess.run(["dpkg", "-x", deb, into], stderr=subprocess.PIPE, text=True)
                if done.returncode != 0:
                    raise RigError(f"cannot unpack {deb.name}: {done.stderr.strip()}")
                deb.unlink()

    def fetch_source(self, package, into):
        """Downloads the source archives of package into a folder and gives the upstream tarball's path."""
        self.refresh()
        with cache.lock(f"apt-{self.home.name}"):
            self._run("apt-get", "source", "--download-only", "-qq", package, cwd=into)
        found = sorted(Path(into).glob("*.orig.tar.*"))
        tarballs = [path for path in found if not path.name.endswith(".asc")]
        if not tarballs:
            raise RigError(f"Debian {self.name} gave no upstream tarball for {package}")
        return tarballs[0]

    def source_version(self, package):
        """The newest version of the source package."""
        shown = self._asked("apt-cache", "showsrc", "--only-source", package)
        return re.findall(r"(?m)^Version: (.*)$", shown)[0]


def packaged(package, name):
    """The file called name of a package of Debian unstable, kept in the cache."""
    suite = Suite("sid")
    version, _ = suite.candidate(package)

    def fetch(folder):
        suite.unpack(package, folder / "tree")
        shutil.move(next((folder / "tree").rglob(name)), folder / name)
        shutil.rmtree(folder / "tree")

    return cache.made(f"{package}/{version.replace(':', '_')}", fetch) / name
