"""Writes initial RAM file systems (cpio, newc format) without root and without any tool of the host."""

import stat


class Initramfs:
    """Collects files and gives the archive's bytes; the same input gives the same bytes."""

    def __init__(self):
        self._entries = {}

    def folder(self, path):
        """Adds a folder and those above it."""
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            self._entries.setdefault("/".join(parts[:depth]), (stat.S_IFDIR | 0o755, b"", 0))

    def file(self, path, data, mode=0o644):
        """Adds a file, with its folders."""
        self._parent(path)
        self._entries[path.strip("/")] = (stat.S_IFREG | mode, bytes(data), 0)

    def link(self, path, target):
        """Adds a symbolic link."""
        self._parent(path)
        self._entries[path.strip("/")] = (stat.S_IFLNK | 0o777, target.encode(), 0)

    def device(self, path, major, minor):
        """Adds a character device."""
        self._parent(path)
        self._entries[path.strip("/")] = (stat.S_IFCHR | 0o600, b"", (major << 8) | minor)

    def _parent(self, path):
        if "/" in (inner := path.strip("/")):
            self.folder(inner.rsplit("/", 1)[0])

    def archive(self):
        """The uncompressed archive, padded to 512 bytes."""
        out = bytearray()
        entries = [(path, *entry) for path, entry in self._entries.items()]
        for number, (path, mode, data, device) in enumerate([*entries, ("TRAILER!!!", 0, b"", 0)], start=1):
            name = path.encode() + b"\0"
            fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, device >> 8, device & 255, len(name), 0)
            out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
            out += bytes(-len(out) % 4) + data
            out += bytes(-len(out) % 4)
        return bytes(out + bytes(-len(out) % 512))
