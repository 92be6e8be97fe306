"""Guests without protection, on an ordinary L1: the machine, its devices, and cvmm as a subprocess."""

import re
import signal
import subprocess
import tempfile
from pathlib import Path

import hardware
from host import RIG, ROOT

TRAFFIC = ["smp", "disk", "net", "vsock", "vsock-listen", "rng"]
NETWORK = "cvmm.ip=10.9.0.2/24 cvmm.peer=10.9.0.1:7000"


def traffic(host, flavour, cpus, disk_mib, net_mib, vsock_mib, *more, timeout=420, run=(), words=""):
    """One guest with all devices. Both sides of each transfer compare checksums; the disk is read again after
    power-off, by L1's own ext4."""
    sizes = f"cvmm.disk_mib={disk_mib} cvmm.net_mib={net_mib} cvmm.vsock_mib={vsock_mib}"
    wanted = [*TRAFFIC, *run]
    ended = host.guest(
        "--cpus", str(cpus), "--disk", "/root/disk", "--rng", *more,
        run=",".join(wanted), cmdline=f"{NETWORK} {sizes} {words}".strip(), flavour=flavour, timeout=timeout,
        net=True, VSOCK=vsock_mib,
    )  # fmt: skip
    results = ended.passed(*wanted)
    online = "online 0" if cpus == 1 else f"online 0-{cpus - 1}"
    assert results["smp"][1].startswith(online), results["smp"]
    digest = re.search(r"sha256 (\w+)", results["disk"][1]).group(1)
    _, found = host.shell("mkdir -p /mnt && mount -o ro,loop /root/disk /mnt && sha256sum /mnt/data; umount /mnt", 120)
    assert digest in found, f"the guest wrote {digest}, the disk holds {found}"
    times = [f"{name} {re.search(r'[(]([0-9.]+ s)[)]', note).group(1)}" for name, (_, note) in results.items()]
    return ended, ", ".join(times)


def cloud_kernel_1_vcpu(host):
    """256 MiB to disk, 100 MiB each way over the network and over vsock in both directions of connecting."""
    return traffic(host, "cloud", 1, 256, 100, 100)[1]


def cloud_kernel_4_vcpus(host):
    """The same with four processors."""
    return traffic(host, "cloud", 4, 256, 100, 100)[1]


def amd64_kernel_1_vcpu(host):
    """Debian's other kernel."""
    return traffic(host, "amd64", 1, 256, 100, 100)[1]


def amd64_kernel_4_vcpus(host):
    """Debian's other kernel with four processors."""
    return traffic(host, "amd64", 4, 256, 100, 100)[1]


def memory_above_4_gib(host):
    """5 GiB, of which 2 lie above 4 GiB."""
    ended = host.guest("--memory", "5G", run="memory,touch", cmdline="cvmm.touch_mib=64")
    results = ended.passed("memory", "touch")
    total_kib = int(re.search(r"MemTotal: (\d+)", results["memory"][1]).group(1))
    assert 4_800_000 < total_kib < 5 << 20, results["memory"]
    return f"{total_kib >> 10} MiB usable"


def reboot_is_a_new_vm_from_the_same_plan(host):
    """The guest reboots; cvmm starts it again, measured the same, and SIGTERM ends the second life."""
    wait = "await CVMM-INIT 2; while kill -TERM $PID 2>/dev/null; do sleep 2; done"
    ended = host.guest(run="smp", cmdline="cvmm.then=reboot", extra=wait)
    names = ended.event_names()
    assert "guest_reboot" in names and names.count("running") >= 2, names
    digests = {event["digest"] for event in ended.events if event["event"] == "measured"}
    assert len(digests) == 1, digests
    assert ended.code in (0, 143), (ended.code, ended.tail())


def sigterm_presses_the_power_button(host):
    """A stock guest powers off in order."""
    wait = "await CVMM-WAITING && kill -TERM $PID"
    ended = host.guest(run="wait", extra=wait)
    assert ended.code == 0 and "CVMM-POWER-BUTTON" in ended.console, (ended.code, ended.tail())
    assert ended.event_names()[-3:] == ["stopping", "guest_off", "stopped"], ended.event_names()


def second_sigterm_ends_at_once(host):
    """A guest that does not listen cannot hold cvmm up."""
    wait = "await running 1 events; kill -TERM $PID; sleep 0.5; kill -TERM $PID"
    ended = host.guest("--cpus", "2", cmdline="rdinit=/bin/sleep -- 100000", extra=wait)
    assert ended.code == 143 and "running" in ended.event_names(), (ended.code, ended.tail())


def kill_9_leaves_nothing_behind(host):
    """After kill -9 no process, lock or tap stays, and the same command starts again over the stale socket."""
    host.shell("[ -d /sys/class/net/tap0 ] || { tunctl -t tap0 && ip link set tap0 up; }")
    for life in range(2):
        wait = "await CVMM-WAITING && kill -KILL $PID"
        script = wait if life == 0 else wait.replace("-KILL", "-TERM")
        ended = host.guest(
            "--disk", "/root/disk", "--net", "tap=tap0", "--vsock", "cid=9,uds=/tmp/stale", run="wait", extra=script,
        )  # fmt: skip
        assert ended.code == (137 if life == 0 else 0), (life, ended.code, ended.tail())
    _, left = host.shell("cat /proc/[0-9]*/comm 2>/dev/null | grep -cx cvmm; ls /tmp/stale 2>/dev/null | wc -l; cat /sys/class/net/tap0/carrier", check=False)
    assert left.split()[:2] == ["0", "0"], left


def disk_full_is_an_error_in_the_guest(host):
    """The host's disk fills up under the guest's writes: the guest sees an I/O error, cvmm and its other devices live."""
    host.shell("mkdir -p /full && mount -t tmpfs -o size=120m none /full")
    try:
        subprocess.run([RIG, "push", "--name", host.name, f"{host.files['disk']}:/full/disk"], check=True)
        ended = host.guest("--disk", "/full/disk", "--rng", run="disk,rng,smp", cmdline="cvmm.disk_mib=128", timeout=200)
        _, used = host.shell("df /full | tail -1")
    finally:
        host.shell("umount /full", check=False)
    results = ended.results()
    verdict, why = results["disk"]
    assert verdict == "FAIL" and ("os error 5" in why or "os error 30" in why), results["disk"]
    assert "100%" in used, used
    assert results["rng"][0] == "PASS", results
    assert results["smp"][0] == "PASS" and ended.code == 0, (ended.code, ended.tail())


def kernel_changed_under_the_shim_is_refused(host):
    """A host process writes to the kernel file while the guest boots: the shim hashes its own copy, so either the
    measured kernel runs or none does."""
    host.shell("cp /root/cloud-kernel /root/changing-kernel")
    write = "until grep -q running events; do kill -0 $PID || break; done; for i in $(seq 300); do printf x | dd of=/root/changing-kernel bs=1 seek=9000000 conv=notrunc 2>/dev/null; done"
    ended = host.guest(kernel="/root/changing-kernel", run="smp", extra=write)
    refused = ended.code == 11 and "not the measured one" in ended.stderr
    assert refused or ended.code == 0, (ended.code, ended.tail())
    return "the shim refused" if refused else "the shim had its copy already"


def every_thread_is_confined(host):
    """With all devices up, each thread has filters, no capability, and no way to new privileges; Landlock is on."""
    fields = "Name|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp"
    look = f"await CVMM-WAITING && grep -hE '^({fields}):' /proc/$PID/task/*/status; kill -TERM $PID"
    ended = host.guest(
        "--cpus", "2", "--disk", "/root/disk", "--rng", "--vsock", "cid=9,uds=/tmp/v", run="wait", extra=look,
    )  # fmt: skip
    assert ended.code == 0, (ended.code, ended.tail())
    threads = [dict(re.findall(r"(\w+):\s*(\S+)", "Name:" + part)) for part in ended.extra.split("Name:")[1:]]
    assert {thread["Name"] for thread in threads} >= {"cvmm", "events", "vcpu0", "vcpu1"}, threads
    for thread in threads:
        name = thread.pop("Name")
        assert (thread.pop("NoNewPrivs"), thread.pop("Seccomp")) == ("1", "2"), name
        assert set(thread.values()) == {"0" * 16} and len(thread) == 5, (name, thread)
    state = next(event for event in ended.events if event["event"] == "sandbox")
    assert state["seccomp"] and state["landlock"] >= 6, state
    return f"{len(threads)} threads, Landlock {state['landlock']}"


def a_jailed_machine_works(host):
    """As another user in an empty root and a cgroup of its own: all devices, both directions of vsock, then a reboot."""
    host.shell("mkdir -p /cg && mount -t cgroup2 none /cg 2>/dev/null; mkdir -p /cg/jail /run/jail && chmod 711 /root")
    jail = ["--user", "1234:1234", "--cgroup", "/cg/jail"]
    look = (
        "until [ -S v_5000 ]; do sleep 0.2; done; chmod 777 /root v_5000; await CVMM-INIT;"
        " ls -A /proc/$PID/root; grep -E '^(Uid|Gid|Groups)' /proc/$PID/status; cat /cg/jail/cgroup.procs;"
        " await CVMM-INIT 2; kill -TERM $PID; sleep 1; kill -TERM $PID"
    )
    ended = host.guest(
        *jail, "--disk", "/root/disk", "--rng", run="smp,disk,net,vsock,rng", net=True, VSOCK=1, timeout=420, extra=look,
        cmdline=f"{NETWORK} cvmm.disk_mib=16 cvmm.net_mib=8 cvmm.vsock_mib=8 cvmm.then=reboot",
    )  # fmt: skip
    for name in ("smp", "disk", "net", "vsock", "rng"):
        verdict = ended.results().get(name, ("missing", ""))
        assert verdict[0] == "PASS", (name, verdict, ended.tail())
    assert ended.code in (0, 143) and "guest_reboot" in ended.event_names(), (ended.code, ended.tail())
    root, *rest = ended.extra.split("\n")
    assert root == "root" and "1234\t1234\t1234\t1234" in ended.extra, ended.extra
    assert len([line for line in rest if line.isdigit()]) == 1, ended.extra


def doctor_finds_a_host_for_soft(host):
    """This L1 runs stock guests; doctor says so, and says what is missing for SNP and TDX, once for each."""
    code, text = host.shell("/root/cvmm doctor", check=False)
    assert code == 0 and re.search(r"soft .*: +yes\n.*snp .*: +no\n.*tdx .*: +no", text), text
    assert re.findall(r"(?m)^missing +(\S+)", text) == ["snp.cpu", "tdx.cpu"], text


def hardware_check_finds_what_was_predicted(host):
    """The command for people with real hardware, here: every digest agrees, and the archive names nobody."""
    return hardware.judged(host, early=True)


def an_interrupted_hardware_check_leaves_nothing_behind(host):
    """^C while the guest runs: exit code 130 in seconds, no archive, and neither process nor file in L1."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["scripts/hardware-check", "soft", "--l1", host.name, "--cvmm", host.binary, "--out", folder]
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert "1 vCPU" in running.stdout.readline()
            host.shell("until grep -q running /root/hardware-check.*/events; do sleep 0.2; done")
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
        assert (running.returncode, said) == (130, "hardware-check: interrupted\n"), (running.returncode, said)
        assert not list(Path(folder).iterdir())
    _, left = host.shell("cat /proc/[0-9]*/comm 2>/dev/null | grep cvmm; ls -d /root/hardware-check* 2>/dev/null; true")
    assert not left, left


TESTS = [
    cloud_kernel_1_vcpu,
    amd64_kernel_4_vcpus,
    cloud_kernel_4_vcpus,
    amd64_kernel_1_vcpu,
    memory_above_4_gib,
    reboot_is_a_new_vm_from_the_same_plan,
    sigterm_presses_the_power_button,
    second_sigterm_ends_at_once,
    kill_9_leaves_nothing_behind,
    disk_full_is_an_error_in_the_guest,
    kernel_changed_under_the_shim_is_refused,
    every_thread_is_confined,
    a_jailed_machine_works,
    doctor_finds_a_host_for_soft,
    hardware_check_finds_what_was_predicted,
    an_interrupted_hardware_check_leaves_nothing_behind,
]
