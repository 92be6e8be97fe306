"""What is measured in an L1: starts, system calls, boots of a stock kernel with disk and network, memory, SNP boots."""

import re
import shutil
import subprocess
from pathlib import Path

import archive
import guest
import local
import nested
import vmms

QEMU = ["/opt/qemu/run"]
IN_L1 = dict(
    cvmm="/root/cvmm", bzimage="/root/payload.bz", pvh="/root/payload.elf", kernel="/root/vmlinuz",
    initrd="/root/initrd", disk="/dev/shm/disk", ovmf="/root/ovmf.fd",
)
STRACE = "/root/strace"
DISK_MIB = 64
NETWORK = f"cvmm.ip=10.9.0.2/24 cvmm.peer={nested.PEER_ADDRESS}"
LOADS = ("round-trip", "send-mib", "receive-mib", *(f"{way}-{size}" for size in ("4k", "1m") for way in ("read", "write")))


def plain(results, files, runs, quick):
    """Everything in an ordinary L1; files are this host's, by the names that IN_L1 has."""
    found = dict(guest.files())
    wanted = dict(files, kernel=found["cloud_kernel"], initrd=found["cloud_initrd"])
    with nested.l1() as l1:
        l1.push([(path, IN_L1[name]) for name, path in wanted.items()])
        l1.output(f"truncate -s {DISK_MIB}M {IN_L1['disk']} && dd if=/dev/urandom of={IN_L1['disk']} bs=1M count=32 conv=notrunc")
        for words in (["/opt/qemu/run", "--version"], [IN_L1["cvmm"], "--version"]):
            l1.output(" ".join(words))  # the first start of a program reads it from the disk
        for _ in range(2 * runs):
            for name in vmms.NAMES:
                _start(results, l1, name)
        _calls(results, l1)
        size = "cvmm.ops_4k=128 cvmm.ops_1m=8 cvmm.trips=50 cvmm.net_mib=1" if quick else ""
        for _ in range(runs):
            for name in vmms.NAMES:
                _boot(results, l1, name, f"cvmm.run=idle,bench-disk,bench-net {NETWORK} {size}")


def _start(results, l1, name):
    journal = l1.start(vmms.payload(name, IN_L1, QEMU))
    go, byte = journal.find("CVMM-GO"), journal.find("BYTE")
    if not byte:
        results.remark(f"{name}: no output from the tiny payload in L1: {_last(l1, journal)}")
        return
    results.add("start_cpu", name, 1e3 * (byte.cpu - go.cpu))
    results.add("start_wall", name, 1e3 * (byte.wall - go.wall))


def _calls(results, l1):
    """System calls are counted in L1, where every VMM gets as far as the payload's output."""
    if not (strace := shutil.which("strace")):
        results.remark("system calls not counted: strace is not installed here")
        return
    libraries = re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", strace], stdout=subprocess.PIPE, text=True).stdout)
    l1.push([(path, f"{STRACE}/{Path(path).name}") for path in (strace, *libraries)])
    loader = next(Path(path).name for path in libraries if "ld-linux" in path)
    run = f"{STRACE}/{loader} --library-path {STRACE} {STRACE}/strace -f -qq -s 8 -o /root/calls"
    for name in vmms.NAMES:
        words = vmms.payload(name, IN_L1, QEMU)
        l1.output(f"timeout 60 {run} {' '.join(words)} </dev/null >/dev/null 2>&1; true", 90)
        total, ioctls, seen = local.count(l1.output("cat /root/calls"))
        if seen:
            results.add("calls", name, total)
            results.add("ioctls", name, ioctls)
        else:
            results.remark(f"{name}: the payload's byte is not among the system calls that strace saw in L1")


def _boot(results, l1, name, words):
    journal = l1.boot(vmms.stock(name, IN_L1, QEMU, words))
    if not _boot_rows(results, l1, name, journal, "", "boot_exits"):
        return
    results.add("boot_io_exits", name, journal.find("CVMM-INIT").exits[1])
    try:
        beside, ram = journal.beside_ram(vmms.MEMORY_MIB << 20)
        results.add("beside_ram", name, beside)
        results.add("ram", name, ram)
    except ValueError as error:
        results.remark(f"{name}: {error}")
    for load in LOADS:
        begin, end = journal.find("CVMM-BENCH", "begin", load), journal.find("CVMM-BENCH", "end", load)
        if not begin or not end or [word.isdigit() for word in end.words[3:]] != [True, True]:
            results.remark(f"{name}: no {load}: {_last(l1, journal)}")
            continue
        count, nanoseconds = int(end.words[3]), int(end.words[4])
        results.add(f"{load}_cpu", name, 1e3 * (end.cpu - begin.cpu) / count)
        results.add(f"{load}_wall", name, nanoseconds / 1e6 / count)
        if begin.exits and end.exits:
            results.add(f"{load}_exits", name, (end.exits[0] - begin.exits[0]) / count)


def _boot_rows(results, l1, name, journal, prefix, exits):
    go, init = journal.find("CVMM-GO"), journal.find("CVMM-INIT")
    if not init:
        results.remark(f"{name}{' (SNP)' if prefix else ''}: the guest did not reach its init: {_last(l1, journal)}")
        return False
    results.add(f"{prefix}boot_cpu", name, init.cpu - go.cpu)
    results.add(f"{prefix}boot_wall", name, init.wall - go.wall)
    if init.exits:
        results.add(exits, name, init.exits[0])
    return True


def _last(l1, journal):
    said = [line for line in journal.lines if line and not line.startswith("CVMM-EXITS")]
    return " / ".join([*said[-2:], l1.output("tail -n 2 /root/vmm.err 2>/dev/null; true").strip()])[-300:]


def snp(results, cvmm, runs):
    """Boots on the emulated SNP host: cvmm's shim beside QEMU with OVMF and kernel hashes."""
    found = dict(guest.files())
    files = dict(cvmm=cvmm, kernel=found["cloud_kernel"], initrd=found["cloud_initrd"], ovmf=ovmf())
    with nested.l1("snp") as l1:
        l1.push([(path, IN_L1[name]) for name, path in files.items()])
        for _ in range(runs):
            for name in ("cvmm", "ovmf"):
                journal = l1.boot(vmms.snp(name, IN_L1, QEMU, "cvmm.run=smp"), pages=True)
                _boot_rows(results, l1, name, journal, "snp_", "snp_exits")
                if journal.pages:
                    results.add("snp_pages", name, journal.pages)


def ovmf():
    """Debian's OVMF for SEV with kernel hashes."""
    return archive.packaged("ovmf-amdsev", "OVMF.amdsev.fd")
