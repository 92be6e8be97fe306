"""The command lines that are compared: one small machine with a disk and a network card, by each VMM."""

NAMES = ("cvmm", "microvm", "q35")
MEMORY_MIB = 512
QUIET = "console=ttyS0 quiet panic=-1"


def payload(name, files, qemu, memory=256):
    """Words that start the tiny payload; files has `bzimage` and `pvh`, qemu are the first words of QEMU."""
    if name == "cvmm":
        return [files["cvmm"], "run", "--platform", "soft", "--memory", f"{memory}M", "--kernel", files["bzimage"]]
    return [*qemu, *_machine(name), "-m", str(memory), "-kernel", files["pvh"]]


def stock(name, files, qemu, words):
    """Words that boot a stock kernel with disk and network; files has `kernel`, `initrd`, `disk`; tap0 must exist."""
    line = f"{QUIET} {words}"
    if name == "cvmm":
        return [
            files["cvmm"], "run", "--platform", "soft", "--memory", f"{MEMORY_MIB}M", "--kernel", files["kernel"],
            "--initrd", files["initrd"], "--cmdline", line, "--disk", files["disk"], "--net", "tap=tap0",
        ]
    bus = "device" if name == "microvm" else "pci"
    return [
        *qemu, *_machine(name), "-m", str(MEMORY_MIB), "-kernel", files["kernel"], "-initrd", files["initrd"],
        "-append", line, "-drive", f"file={files['disk']},format=raw,if=none,id=d", "-device", f"virtio-blk-{bus},drive=d",
        "-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no",
        "-device", f"virtio-net-{bus},netdev=n" + ("" if bus == "device" else ",romfile="),
    ]


def snp(name, files, qemu, words):
    """Words that boot a stock kernel as an SNP guest; `cvmm` or `ovmf` (QEMU with OVMF and kernel hashes)."""
    line = f"{QUIET} {words}"
    if name == "cvmm":
        return [
            files["cvmm"], "run", "--platform", "snp", "--memory", f"{MEMORY_MIB}M", "--kernel", files["kernel"],
            "--initrd", files["initrd"], "--cmdline", line,
        ]
    return [
        *qemu, "-M", "q35,confidential-guest-support=sev0,memory-backend=ram", "-accel", "kvm", "-cpu", "EPYC-v4",
        "-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=true",
        "-object", "sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=0x30000,kernel-hashes=on",
        "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-bios", files["ovmf"], "-kernel", files["kernel"], "-initrd", files["initrd"], "-append", line,
    ]


def _machine(name):
    # qboot is QEMU's fastest firmware, and a clock saves the guest 40,000 port accesses in search of one.
    machine = ["-M", "microvm,rtc=on", "-bios", "qboot.rom"] if name == "microvm" else ["-M", "q35"]
    common = ["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"]
    return [*machine, *common, "-serial", "stdio"]
