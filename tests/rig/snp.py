"""SNP guests on the emulated SNP host: KVM's own SNP code runs, and a model of the security processor measures,
signs and refuses."""

import base64
import re
import subprocess
import tempfile
from pathlib import Path

import hardware
import soft
from host import RIG, output

NONCE = "c0ffee" * 21 + "c0"
HOST_DATA = "5a" * 32
POLICY = "0x30000"


def measure(host, words, *arguments, flavour="cloud", kernel=None):
    """What `cvmm measure` says on this machine, which has no SNP."""
    command = [
        host.binary, "measure", "--platform", "snp", "--kernel", kernel or host.files[f"{flavour}_kernel"],
        "--initrd", host.files[f"{flavour}_initrd"], "--cmdline", words, *arguments,
    ]  # fmt: skip
    return output(*command).split()[0]


def announced(ended):
    """The digests in cvmm's events, one for each life."""
    return [event["digest"] for event in ended.events if event["event"] == "measured"]


def report_of(ended):
    """The report that the guest printed, and the measurement that it read there."""
    text = re.search(r"^CVMM-REPORT (\S+)", ended.console, flags=re.M).group(1)
    return base64.b64decode(text), re.search(r"measurement (\w+)", ended.results()["report"][1]).group(1)


def attested(host, ended, words, *arguments, flavour="cloud"):
    """Asserts that prediction, launch and report agree, and gives the report."""
    report, measurement = report_of(ended)
    assert announced(ended) == [measurement], (announced(ended), measurement)
    prediction = measure(host, words, *arguments, flavour=flavour)
    assert prediction == measurement, f"predicted {prediction}, reported {measurement}"
    return report, measurement


def verify(host, report, measurement, *more):
    """Exit code and words of `cvmm report`, with the emulated host's own root."""
    folder = output(RIG, "certs").strip()
    with tempfile.NamedTemporaryFile() as file:
        file.write(report)
        file.flush()
        command = [
            host.binary, "report", file.name, "--ark", f"{folder}/ark.pem", "--ask", f"{folder}/ask.pem", "--vcek", f"{folder}/vcek.pem", "--measurement", measurement,
            "--host-data", HOST_DATA, "--report-data", NONCE, *more,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def a_stock_kernel_is_what_was_predicted(host):
    """Every device works in the guest, with checksums; the digest of `cvmm measure`, of the launch and of the guest's
    report are one; `cvmm report` accepts the report, and refuses it after any changed byte."""
    words = f"cvmm.nonce={NONCE}"
    ended, times = soft.traffic(
        host, "cloud", 1, 64, 16, 8, "--host-data", HOST_DATA, "--policy", POLICY, run=["report"], words=words, timeout=600
    )
    report, measurement = attested(host, ended, ended.words, "--host-data", HOST_DATA)
    code, text = verify(host, report, measurement)
    assert code == 0, text
    for at in range(0, len(report), 37):
        changed = bytes(byte ^ (index == at) for index, byte in enumerate(report))
        code, text = verify(host, changed, measurement)
        assert code != 0, f"accepted with byte {at:#x} changed"
    code, text = verify(host, report, "00" * 48)
    assert code != 0 and "measurement" in text, text
    return times


def the_other_kernel_and_more_memory(host):
    """Debian's amd64 kernel with 5 GiB, most of which the guest accepts lazily."""
    ended = host.guest("--memory", "5G", run="memory,touch,report", cmdline="cvmm.touch_mib=64", flavour="amd64", timeout=400)
    results = ended.passed("memory", "touch", "report")
    total_kib = int(re.search(r"MemTotal: (\d+)", results["memory"][1]).group(1))
    # The guest keeps a twentieth for bounce buffers.
    assert total_kib > 4_400_000, results["memory"]
    attested(host, ended, ended.words, flavour="amd64")
    return f"{total_kib >> 10} MiB usable"


def the_first_machine_is_what_it_was(host):
    """Machine v1 boots a stock kernel as ever, with the digest that was predicted; cvmm warns of its shim."""
    flags = "--machine", "v1"
    ended = host.guest(*flags, run="smp,report", timeout=400)
    ended.passed("smp", "report")
    assert "CVE-2025-38560; use v2" in ended.stderr, ended.stderr
    attested(host, ended, ended.words, *flags)


def four_vcpus(host):
    """The guest starts its own processors; the digest covers each of them. Its report request comes with one for
    certificates, which cvmm answers from a file (KVM_EXIT_SNP_REQ_CERTS)."""
    table = output(RIG, "certs").strip() + "/certs.table"
    subprocess.run([RIG, "push", "--name", host.name, f"{table}:/root/certs.table"], check=True)
    ended = host.guest("--cpus", "4", "--certs", "/root/certs.table", run="smp,report", timeout=400)
    results = ended.passed("smp", "report")
    assert results["smp"][1].startswith("online 0-3"), results["smp"]
    attested(host, ended, ended.words, "--cpus", "4")


def a_reboot_has_the_same_digest(host):
    """A reboot is a new SNP guest from the same plan; the words for init come after those of the shim, without which the
    kernel would hang in EFI services that do not exist."""
    wait = "await CVMM-INIT 3; while kill -TERM $PID 2>/dev/null; do sleep 2; done"
    ended = host.guest(run="smp", cmdline="cvmm.then=reboot -- words", extra=wait, timeout=400)
    digests = announced(ended)
    assert len(digests) >= 3 and len(set(digests)) == 1, (digests, ended.code, ended.tail())


def firmware_refuses_what_the_owner_did_not_sign(host):
    """With an ID block for one command line, the firmware refuses the launch of another, before any instruction."""
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "id.pem"
        output("openssl", "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", str(key))
        digest = measure(host, "console=hvc0 quiet cvmm.run=smp")
        block, auth = f"{folder}/id-block", f"{folder}/id-auth"
        output(
            host.binary, "id-block", "--digest", digest, "--policy", POLICY, "--id-key", str(key),
            "--id-block", block, "--id-auth", auth,
        )  # fmt: skip
        subprocess.run([RIG, "push", "--name", host.name, f"{block}:/root/id-block", f"{auth}:/root/id-auth"], check=True)
    identity = ["--id-block", "/root/id-block", "--id-auth", "/root/id-auth"]
    good = host.guest(*identity, run="smp", timeout=300)
    good.passed("smp")
    tampered = {
        "command line": host.guest(*identity, run="smp", cmdline="init=/bin/sh", timeout=120),
        "vCPU count": host.guest(*identity, "--cpus", "2", run="smp", timeout=120),
        "kernel": host.guest(*identity, run="smp", kernel="/root/amd64-kernel", timeout=120),
        "initrd": host.guest(*identity, run="smp", initrd="/root/amd64-initrd", timeout=120),
    }
    for what, bad in tampered.items():
        assert bad.code == 22, (what, bad.code, bad.stderr)
        assert "digest" in bad.stderr.lower() or "measurement" in bad.stderr.lower(), (what, bad.stderr)


def killed_launches_leak_no_asid(host):
    """Forty launches, each killed half-way, on a host with 32 ASIDs; then a guest still starts."""
    host.shell(
        "cd /root; for i in $(seq 40); do ./cvmm run --platform snp --kernel cloud-kernel --initrd cloud-initrd "
        "--cmdline x --console none >/dev/null 2>&1 & usleep $((i * 20000)); kill -9 $!; wait $! 2>/dev/null; done; true",
        300,
    )
    host.guest(run="smp", timeout=200).passed("smp")


def the_shim_refuses_a_kernel_that_changes(host):
    """A host process writes to the kernel file for as long as the guest boots: the measured kernel runs, or none."""
    host.shell("cp /root/cloud-kernel /root/changing-kernel")
    write = "until grep -q running events; do kill -0 $PID || break; done; for i in $(seq 300); do printf x | dd of=/root/changing-kernel bs=1 seek=9000000 conv=notrunc 2>/dev/null; done"
    ended = host.guest(kernel="/root/changing-kernel", run="smp", extra=write, timeout=300)
    refused = ended.code == 11 and "not the measured one" in ended.stderr
    assert refused or ended.code == 0, (ended.code, ended.tail())
    return "the shim refused" if refused else "the shim had its copy already"


def memory_is_paid_for_once(host):
    """A 512 MiB guest that touched nearly all of its memory costs that and a few MiB, not twice as much."""
    look = (
        "await CVMM-WAITING && "
        "grep -h -E 'VmRSS|RssAnon|RssShmem' /proc/$PID/status; cat /proc/meminfo | grep -E 'Unevictable|^Cached'; "
        "grep AnonHugePages /proc/$PID/smaps_rollup; cat /sys/kernel/mm/transparent_hugepage/enabled; kill -TERM $PID"
    )
    ended = host.guest(run="touch,wait", cmdline="cvmm.touch_mib=300", extra=look, timeout=400)
    assert ended.code == 0, (ended.code, ended.tail())
    resident = int(re.search(r"VmRSS:\s+(\d+)", ended.extra).group(1)) >> 10
    private = int(re.search(r"Unevictable:\s+(\d+)", ended.extra).group(1)) >> 10
    assert private + resident < 512 + 80, ended.extra
    # The host makes huge pages by itself, but not of what this guest shares.
    assert "[always]" in ended.extra and re.search(r"AnonHugePages:\s+0 kB", ended.extra), ended.extra
    return f"private {private} MiB, cvmm resident {resident} MiB"


def a_host_without_snp_says_what_is_missing(host):
    """The messages of the launch's first step, on a host whose /dev/sev is gone."""
    host.shell("mv /dev/sev /dev/sev.away")
    try:
        ended = host.guest(run="smp", timeout=60)
    finally:
        host.shell("mv /dev/sev.away /dev/sev")
    assert ended.code == 20 and "/dev/sev" in ended.stderr, (ended.code, ended.stderr)


def kvm_and_firmware_answer_as_the_model_says(host):
    """snp/tests/live.rs: launches, refusals and identities on KVM's real code; its answers equal the recorded model."""
    return host.run_tests("snp", "live")


def conversions_leave_nothing_behind(host):
    """vmm/tests/conversions.rs on a real SNP VM: 64,000 conversions, no growth of memory, mappings or descriptors."""
    return host.run_tests("vmm", "conversions")


def doctor_finds_a_host_for_snp(host):
    """This L1 runs ordinary guests too, and lacks TDX."""
    code, text = host.shell("/root/cvmm doctor --for snp", check=False)
    assert code == 0 and re.search(r"soft .*: +yes\n.*snp .*: +yes\n.*tdx .*: +no", text), text
    assert re.findall(r"(?m)^missing +(\S+)", text) == ["tdx.cpu"], text


def hardware_check_finds_what_was_predicted(host):
    """The command for people with real hardware, with the guest of one vCPU alone: on this host two double the time, and
    another test has them."""
    return hardware.judged(host, cpus=(1,))


TESTS = [
    doctor_finds_a_host_for_snp,
    hardware_check_finds_what_was_predicted,
    kvm_and_firmware_answer_as_the_model_says,
    conversions_leave_nothing_behind,
    a_stock_kernel_is_what_was_predicted,
    the_other_kernel_and_more_memory,
    a_reboot_has_the_same_digest,
    firmware_refuses_what_the_owner_did_not_sign,
    the_shim_refuses_a_kernel_that_changes,
    memory_is_paid_for_once,
    killed_launches_leak_no_asid,
    a_host_without_snp_says_what_is_missing,
    the_first_machine_is_what_it_was,
    four_vcpus,
]
