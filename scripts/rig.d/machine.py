"""The L1 host: its initramfs, its QEMU command line, its process."""

import ctypes
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import cache
import kernel
import patched_qemu
import programs
import snp_keys
import tdx_kernel
from initramfs import Initramfs
from report import RigError, say

PORTS = 8
MAILBOX_BYTES = 4 << 30
HERE = Path(__file__).parent
# What L1 loads at boot, in this order; dependencies come by themselves.
MODULES = "virtio_blk ext4 loop tun bridge configfs ccp kvm kvm-amd".split()
CPUS = {
    "plain": "max,-la57",
    "snp": "max,vendor=AuthenticAMD,family=25,model=1,stepping=1,phys-bits=48,-hypervisor,-la57,+svm,+npt,+nrip-save,"
    "+decodeassists,+flushbyasid,+lbrv,snp-emu=on",
    "tdx": "max,vendor=GenuineIntel,family=6,model=173,stepping=1,phys-bits=48,-hypervisor,-la57,-svm,-mpx,-pks,-pku,"
    "tdx-emu=on",
}
# KVM gives a TD no more vCPUs than the host has CPUs, online or not: L1 has this many and uses those asked for.
TD_CPUS = 8
APPEND = {
    "plain": "",
    "snp": "printk.devkmsg=on",
    "tdx": "printk.devkmsg=on kvm_intel.tdx=1 kvm_intel.nested=0",
}


@dataclass
class Spec:
    """What kind of L1 is wanted."""

    kind: str = "plain"
    cpus: int = 1
    memory: int = 2500
    with_qemu: bool = False
    append: str = ""
    disks: list = field(default_factory=list)
    # A plain L1 also runs in the patched QEMU, which lacks two faults of Debian's (README.md).
    patched: bool = False


def native_kvm():
    """Whether this host's KVM can run L1 with nested virtualisation; a paravirtual /dev/kvm cannot."""
    nested = [Path(f"/sys/module/{module}/parameters/nested") for module in ("kvm_amd", "kvm_intel")]
    enabled = any(path.exists() and path.read_text().strip() in ("1", "Y") for path in nested)
    return enabled and os.access("/dev/kvm", os.R_OK | os.W_OK)


def command(spec, folder):
    """The QEMU command for spec, with its sockets and logs in folder."""
    base = programs.host_qemu()
    native = spec.kind == "plain" and native_kvm()
    patched = spec.kind != "plain" or (spec.patched and not native)
    words = [str(patched_qemu.binary()), *base.firmware] if patched else list(base.words)
    if native:
        machine = ["-M", "q35", "-accel", "kvm", "-cpu", "host"]
    else:
        board = "q35" if spec.kind == "plain" else "q35,kernel-irqchip=off"
        machine = ["-M", board, "-accel", "tcg,thread=multi", "-cpu", CPUS[spec.kind]]
    if spec.kind == "snp":
        machine += ["-device", "amd-iommu,intremap=off"]
        machine += ["-device", f"psp-emu,trace=off,host-checks=off,vcek={snp_keys.secret()}"]
    vmlinuz, initrd = boot_files(spec)
    append = f"console=ttyS0 panic=-1 mitigations=off cvmm.role=l1 {APPEND[spec.kind]} {spec.append}"
    cpus = spec.cpus
    if spec.kind == "tdx":
        cpus = max(spec.cpus, TD_CPUS)
        append += f" maxcpus={spec.cpus}"
    words += [*machine, "-smp", str(cpus), "-m", str(spec.memory), "-nodefaults", "-nographic", "-no-reboot"]
    words += ["-serial", f"file:{folder}/console.log", "-kernel", vmlinuz, "-initrd", initrd]
    words += ["-device", f"virtio-serial-pci,max_ports={PORTS + 1}", "-device", "virtio-rng-pci"]
    for port in range(PORTS):
        words += ["-chardev", f"socket,id=rig{port},path={folder}/port.{port},server=on,wait=off"]
        words += ["-device", f"virtserialport,chardev=rig{port},name=rig.{port},nr={port + 1}"]
    disks = [(folder / "mailbox", "off"), *((Path(disk).absolute(), "off") for disk in spec.disks)]
    if spec.with_qemu:
        disks.append((qemu_disk(), "on"))
        append += f" cvmm.qemu=/dev/vd{chr(ord('a') + len(disks) - 1)}"
    for number, (path, readonly) in enumerate(disks):
        words += ["-drive", f"file={path},format=raw,if=none,id=disk{number},cache=writeback,readonly={readonly}"]
        words += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    return [*map(str, words), "-append", append], base.environment


def boot_files(spec):
    """(vmlinuz, initrd) of L1."""
    busybox, program = programs.busybox(), programs.guest_program()
    if spec.kind == "tdx":
        vmlinuz, release, modules = tdx_kernel.image(), "TDX", []
    else:
        debian = kernel.newest("amd64")
        vmlinuz, release = debian.vmlinuz, debian.release
        modules = [*MODULES, "kvm-intel"] if spec.kind == "plain" and native_kvm() else MODULES
    key = cache.key(busybox[-4096:], program, release, " ".join(modules), HERE / "machine.py", HERE / "initramfs.py")

    def make(folder):
        say(f"making the initramfs of L1 for Linux {release}")
        (folder / "initrd").write_bytes(_initramfs(busybox, program, debian.modules(modules) if modules else []))

    return vmlinuz, cache.made(f"l1/{key}", make) / "initrd"


def _initramfs(busybox, program, modules):
    tree = Initramfs()
    for folder in ("proc", "sys", "dev", "run", "tmp", "root", "mnt", "etc", "sbin", "usr/bin", "lib"):
        tree.folder(folder)
    tree.device("dev/console", 5, 1)
    tree.device("dev/null", 1, 3)
    tree.file("init", program, 0o755)
    tree.link("bin/cvmm-guest", "/init")
    tree.file("bin/busybox", busybox, 0o755)
    for applet in sorted(set(programs.applets()) - {"busybox"}):
        tree.link(f"bin/{applet}", "busybox")
    tree.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/group", b"root:x:0:\n")
    for name, data in modules:
        tree.file(f"modules/{name}", data)
    tree.file("modules/ORDER", "".join(f"{name}\n" for name, _ in modules).encode())
    return tree.archive()


def qemu_disk():
    """An ext4 image of Debian's QEMU for L1, where /opt/qemu/run starts it."""
    tree = programs.qemu_tree()

    def make(folder):
        say("packing QEMU into a disk for L1")
        root = folder / "root"
        shutil.copytree(tree, root, symlinks=True)
        words = programs.private_words(tree, at="/opt/qemu")
        modules = "/opt/qemu/usr/lib/x86_64-linux-gnu/qemu"
        (root / "run").write_text(f"#!/bin/sh\nQEMU_MODULE_DIR={modules} exec {' '.join(map(str, words))} \"$@\"\n")
        (root / "run").chmod(0o755)
        image = folder / "qemu.ext4"
        with open(image, "wb") as file:
            file.truncate(400 << 20)
        mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if mkfs is None:
            raise RigError("mkfs.ext4 is missing: install the package e2fsprogs")
        run = subprocess.run([mkfs, "-q", "-O", "^has_journal", "-d", root, image], stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise RigError(f"mkfs.ext4 for L1's QEMU disk: {run.stderr.strip()}")
        shutil.rmtree(root)

    return cache.made(f"qemu-disk/{tree.name}-{cache.key(HERE / 'machine.py')}", make) / "qemu.ext4"


def start(spec, folder):
    """Starts L1's QEMU; it dies with this process, however that ends."""
    words, environment = command(spec, folder)
    with open(folder / "mailbox", "wb") as mailbox:
        mailbox.truncate(MAILBOX_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def die_with_parent():
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    errors = open(folder / "qemu.log", "wb")
    return subprocess.Popen(
        words, env=dict(os.environ, **environment), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
        preexec_fn=die_with_parent, start_new_session=True,
    )
