"""The L2 guests' files: stock kernels, a small test initrd for each, an ext4 disk, our program for their peers."""

import os
import shutil
import subprocess
from pathlib import Path

import cache
import kernel
import programs
from initramfs import Initramfs
from report import RigError, say

FLAVOURS = {"amd64": "amd64", "cloud": "cloud-amd64"}
NEEDED = "virtio_pci virtio_blk virtio_net vmw_vsock_virtio_transport virtio-rng virtio_console ext4".split()
# A flavour of the kernel may leave these out; the test that needs one then says so.
WANTED = "virtio_mmio button evdev virtio_input sev-guest tdx-guest".split()
DISK_MIB = 1024
HERE = Path(__file__).parent


def files():
    """(name, path) of everything, made when it is not in the cache yet."""
    found = []
    for name, flavour in FLAVOURS.items():
        debian = kernel.newest(flavour)
        found += [(f"{name}_kernel", debian.vmlinuz), (f"{name}_initrd", _initrd(debian))]
    return [*found, ("disk", _disk()), ("guest_tool", programs.guest_program_path())]


def _initrd(debian):
    busybox, program = programs.busybox(), programs.guest_program()
    source = cache.key(busybox[-4096:], program, debian.release, HERE / "guest.py", HERE / "initramfs.py")

    def make(folder):
        say(f"making the test initrd for Linux {debian.release}")
        names = NEEDED + [name for name in WANTED if debian.has(name)]
        (folder / "initrd").write_bytes(_tree(busybox, program, debian.modules(names)).archive())

    return cache.made(f"guest/{debian.release}-{source}", make) / "initrd"


def _tree(busybox, program, modules):
    tree = Initramfs()
    for folder in ("proc", "sys", "dev", "run", "tmp", "root", "mnt", "bin"):
        tree.folder(folder)
    tree.device("dev/console", 5, 1)
    tree.file("init", program, 0o755)
    tree.file("bin/busybox", busybox, 0o755)
    for applet in sorted(set(programs.applets()) - {"busybox"}):
        tree.link(f"bin/{applet}", "busybox")
    for name, data in modules:
        tree.file(f"modules/{name}", data)
    tree.file("modules/ORDER", "".join(f"{name}\n" for name, _ in modules).encode())
    return tree


def _disk():
    def make(folder):
        mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if mkfs is None:
            raise RigError("mkfs.ext4 is missing: install the package e2fsprogs")
        with open(folder / "disk.ext4", "wb") as file:
            file.truncate(DISK_MIB << 20)
        run = subprocess.run([mkfs, "-q", "-L", "cvmm", folder / "disk.ext4"], stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise RigError(f"mkfs.ext4 for the guests' disk: {run.stderr.strip()}")

    return cache.made(f"guest-disk/{DISK_MIB}-1", make) / "disk.ext4"
