"""Commands in a running L1, over its virtio-serial ports; the other half is tests/guest/src/agent.rs.

A session starts with a magic word and a nonce; frames are one kind byte, a 32-bit length, the payload.
"""

import contextlib
import fcntl
import io
import os
import selectors
import shlex
import signal
import socket
import struct
import tarfile
import time

from machine import MAILBOX_BYTES, PORTS
from report import RigError

MAGIC = b"CVMMRIG1"
CHUNK = 64 << 10
BLOCK = 4096
ESCAPE = b"\x1d"  # Ctrl-]
# Beyond a command's own limit: the agent ends it, and only a dead L1 does not answer in this time.
SLACK_SECONDS = 30


class L1Gone(RigError):
    """L1 ended or does not answer."""


@contextlib.contextmanager
def _port(folder):
    """A connection to a port that nobody else of this rig uses now."""
    with contextlib.ExitStack() as stack:
        while (number := next((n for n in range(PORTS) if _locked(folder / f"lock.{n}", stack)), None)) is None:
            time.sleep(0.2)
        yield _connect(folder / f"port.{number}", stack)


def _locked(path, stack):
    """True if nobody else has the lock; then the stack holds it."""
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return False
    stack.enter_context(lock)
    return True


def _connect(path, stack):
    client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        client.connect(str(path))
    except OSError as error:
        raise L1Gone(f"L1 does not listen at {path} ({error.strerror}): it has ended") from error
    return client


class Session:
    """One command in L1: its output goes to the given descriptors as it comes."""

    def __init__(self, folder, words, limit=0, stdin=None, environment=(), out=1, err=2):
        self.folder = folder
        self.request = [str(limit), "/root", str(len(environment)), *environment, *words]
        self.stdin = stdin
        self.sinks = {b"O": out, b"W": err}
        self.limit = limit
        self.code = None
        self.started = False

    def run(self, patience=None):
        """Runs the command and gives its exit code; patience bounds the whole in seconds."""
        if patience is None and self.limit:
            patience = self.limit + SLACK_SECONDS
        deadline = time.monotonic() + patience if patience else None
        with _port(self.folder) as client:
            nonce = os.urandom(16)
            client.sendall(MAGIC + nonce + _frame(b"R", "\0".join(self.request).encode()))
            with self._forwarded_signals(client):
                self._attend(client, nonce, deadline)
        return self.code

    def _attend(self, client, nonce, deadline):
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            if self.stdin is not None:
                _watch(selector, self.stdin, client)
            while self.code is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise L1Gone("L1 gave no answer in time")
                for key, _ in selector.select(left):
                    if key.fileobj is not client:
                        self._send_input(selector, client)
                        continue
                    if not (data := _receive(client)):
                        raise L1Gone("L1 ended while the command ran")
                    received += data
                    if not self.started and (at := received.find(nonce)) >= 0:
                        del received[: at + len(nonce)]
                        self.started = True
                    if self.started:
                        self._take(received)

    @contextlib.contextmanager
    def _forwarded_signals(self, client):
        """Hands SIGINT, SIGTERM and SIGHUP on to a command that runs; before that, and the third time, they end this side."""
        seen = []

        def forward(number, _):
            seen.append(number)
            if not self.started or len(seen) > 2:
                raise KeyboardInterrupt
            client.sendall(_frame(b"S", bytes([number])))

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, received):
        while len(received) >= 5:
            kind, length = bytes(received[:1]), struct.unpack_from("<I", received, 1)[0]
            if len(received) < 5 + length:
                return
            payload = bytes(received[5 : 5 + length])
            del received[: 5 + length]
            if kind == b"X":
                self.code = struct.unpack("<i", payload)[0]
            else:
                _write_all(self.sinks[kind], payload)

    def _send_input(self, selector, client):
        data = os.read(self.stdin, CHUNK)
        if os.isatty(self.stdin) and ESCAPE in data:
            raise KeyboardInterrupt
        client.sendall(_frame(b"I", data) if data else _frame(b"E", b""))
        if not data:
            with contextlib.suppress(KeyError):
                selector.unregister(self.stdin)


def _watch(selector, stdin, client):
    """Watches standard input; a regular file, which cannot be watched, is sent at once."""
    try:
        selector.register(stdin, selectors.EVENT_READ)
    except PermissionError:
        while data := os.read(stdin, CHUNK):
            client.sendall(_frame(b"I", data))
        client.sendall(_frame(b"E", b""))


def _receive(client):
    try:
        return client.recv(CHUNK)
    except ConnectionResetError:
        return b""


def _frame(kind, payload):
    return kind + struct.pack("<I", len(payload)) + payload


def _write_all(sink, data):
    if hasattr(sink, "extend"):
        sink.extend(data)
        return
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]


def output(folder, words, limit=60):
    """Runs a short command in L1 and gives its output; an exit code other than 0 is an error."""
    out = bytearray()
    code = Session(folder, words, limit=limit, out=out, err=out).run()
    if code != 0:
        raise RigError(f"`{' '.join(words)}` in L1 ended with {code}: {out.decode(errors='replace').strip()}")
    return out


def push(folder, pairs):
    """Copies files or folders, as (source, path in L1), through the mailbox disk that both sides see."""
    after = []
    with open(folder / "lock.mailbox", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "mailbox", "r+b") as mailbox:
            with tarfile.open(fileobj=mailbox, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for source, target in pairs:
                    if not source.exists():
                        raise RigError(f"{source}: no such file to put into L1")
                    if _is_sparse(source):
                        after.append(_add_sparse(tar, source, target))
                    else:
                        tar.add(source.resolve(), target.strip("/"), filter=_as_root)
            size = mailbox.tell()
        if size > MAILBOX_BYTES:
            raise RigError(f"{size >> 20} MiB do not fit L1's mailbox of {MAILBOX_BYTES >> 20} MiB")
        blocks = (size >> 20) + 1
        script = f"blockdev --flushbufs /dev/vda && dd if=/dev/vda bs=1M count={blocks} 2>/dev/null | tar xf - -C /"
        output(folder, ["/bin/sh", "-c", " && ".join([script, *after])], limit=600)


def _is_sparse(path):
    found = path.stat()
    return path.is_file() and found.st_blocks * 512 < found.st_size // 2


def _add_sparse(tar, source, target):
    """Adds only a sparse file's data; gives the shell commands that lay them out in L1, holes and all."""
    quoted, packed = shlex.quote(target), f"{target}.packed"
    size = source.stat().st_size
    data, commands = bytearray(), [f"rm -f {quoted}", f"truncate -s {size} {quoted}"]
    with open(source, "rb") as file:
        end = 0
        with contextlib.suppress(OSError):  # ENXIO: no data after this place
            while True:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA) & ~(BLOCK - 1)
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                count = -(-(end - begin) // BLOCK)
                commands.append(
                    f"dd if={shlex.quote(packed)} of={quoted} bs={BLOCK} conv=notrunc skip={len(data) // BLOCK} "
                    f"seek={begin // BLOCK} count={count} 2>/dev/null"
                )
                data += os.pread(file.fileno(), end - begin, begin).ljust(count * BLOCK, b"\0")
    entry = tarfile.TarInfo(packed.strip("/"))
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(bytes(data)))
    return " && ".join([*commands, f"rm -f {shlex.quote(packed)}"])


def pull(folder, source, target):
    """Copies one file of L1 to the host."""
    with open(target, "wb") as file:
        code = Session(folder, ["/bin/cat", source], limit=600, out=file.fileno()).run()
    if code != 0:
        raise RigError(f"cannot read {source} in L1")


def _as_root(entry):
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
