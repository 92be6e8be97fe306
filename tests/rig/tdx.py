"""TDX guests on the emulated TDX host: KVM's own TDX code runs, and a model of the TDX module measures and refuses."""

import base64
import contextlib
import hashlib
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import hardware
import soft
from host import RIG, ROOT, output

CONFIG_ID = "c1" * 48
NONCE = "7d" * 64
# What `cvmm quote` can say of a quote that no certificate stands behind.
QUOTE_EXIT = 40
SOCKET = "/root/qgs"


def measured(host, words, *arguments, flavour="cloud"):
    """What `cvmm measure` prints on this machine, which has no TDX."""
    command = [
        host.binary, "measure", "--platform", "tdx", "--kernel", host.files[f"{flavour}_kernel"],
        "--initrd", host.files[f"{flavour}_initrd"], "--cmdline", words, *arguments,
    ]  # fmt: skip
    return output(*command)


def registers(ended):
    """The registers as the guest's kernel showed them before anything extended the last one, and that one after."""
    note = ended.results()["registers"][1]
    return {name.split(":")[0]: value for name, value in re.findall(r"(\S+)=([0-9a-f]+)", note)}


def attested(host, ended, *arguments, flavour="cloud"):
    """Asserts that prediction, launch and the guest's own registers agree."""
    seen = registers(ended)
    text = measured(host, ended.words, *arguments, flavour=flavour).lower()
    predicted = dict(re.findall(r"(?m)^(mrtd|rtmr\d)\W+([0-9a-f]{96})", text))
    assert {"mrtd", "rtmr1", "rtmr2"} <= set(predicted), predicted
    for name, value in predicted.items():
        assert seen[name] == value, f"{name}: predicted {value}, the guest reads {seen[name]}"
    announced = [event["digest"] for event in ended.events if event["event"] == "measured"]
    assert announced == [seen["mrtd"]], (announced, seen["mrtd"])
    assert seen["extended"] == hashlib.sha384(bytes(48) + b"\x5a" * 48).hexdigest(), seen["extended"]
    return seen


@contextlib.contextmanager
def quote_service(host):
    """The stand-in for a quote generation service runs on this machine, behind a socket in L1."""
    with contextlib.ExitStack() as stack:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/qgs"
        service = subprocess.Popen([sys.executable, ROOT / "tests/qgs.py", path], stdout=subprocess.PIPE, text=True)
        stack.callback(service.kill)
        assert service.stdout.readline() == "listening\n"
        wire = stack.enter_context(socket.socket(socket.AF_UNIX))
        wire.connect(path)
        command = [RIG, "exec", "--name", host.name, "--stdin", "--timeout", "900", "--", "./tool", "relay", f"unix:{SOCKET}"]
        relay = subprocess.Popen(command, stdin=wire, stdout=wire)
        stack.callback(relay.kill)
        yield


def examined(host, ended):
    """What `cvmm quote` says of the quote that the guest printed, and of one with a changed byte: exit codes and words."""
    quote = base64.b64decode(re.search(r"^CVMM-REPORT (\S+)", ended.console, flags=re.M).group(1))
    with tempfile.TemporaryDirectory() as folder:
        predicted = Path(folder, "predicted.json")
        predicted.write_text(measured(host, ended.words, "--json"))
        for name, data in {"given": quote, "changed": quote[:300] + bytes([quote[300] ^ 1]) + quote[301:]}.items():
            file = Path(folder, name)
            file.write_bytes(data)
            command = [
                host.binary, "quote", file, "--measure-json", predicted, "--nonce", NONCE, "--mrconfigid", CONFIG_ID,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            yield done.returncode, done.stdout + done.stderr


def a_stock_kernel_is_what_was_predicted(host):
    """Every device works in the guest, with checksums; MRTD and the run-time registers of `cvmm measure` are those
    that the guest's kernel reads from the module, and those of the quote that it gets over its nonce; so is the
    owner's MRCONFIGID. A changed quote is noticed."""
    with quote_service(host):
        ended, times = soft.traffic(
            host, "cloud", 1, 32, 8, 4, "--mrconfigid", CONFIG_ID, "--quote-service", SOCKET,
            run=["report", "registers"], words=f"cvmm.nonce={NONCE}", timeout=900,
        )  # fmt: skip
    seen = attested(host, ended)
    assert seen["mrconfigid"] == CONFIG_ID, seen
    (code, text), (code_changed, text_changed) = examined(host, ended)
    fine = set(re.findall(r"(?m)^ok +(\S+)", text))
    assert code == QUOTE_EXIT and {"signature", "mrtd", "rtmr1", "rtmr2", "mrconfigid", "report-data"} <= fine, text
    assert code_changed == QUOTE_EXIT and not re.search(r"(?m)^ok +signature", text_changed), text_changed
    return times


def a_reboot_has_the_same_digest(host):
    """A reboot is a new TD from the same plan."""
    wait = "await CVMM-INIT 2; while kill -TERM $PID 2>/dev/null; do sleep 2; done"
    ended = host.guest(run="smp", cmdline="cvmm.then=reboot", extra=wait, timeout=900)
    digests = [event["digest"] for event in ended.events if event["event"] == "measured"]
    assert len(digests) >= 2 and len(set(digests)) == 1, (digests, ended.code, ended.tail())


def two_vcpus(host):
    """The guest wakes its second processor through the shim's mailbox, gives it back to the shim, and wakes it again."""
    ended = host.guest("--cpus", "2", run="smp,registers,hotplug", timeout=900)
    results = ended.passed("smp", "registers", "hotplug")
    assert results["smp"][1].startswith("online 0-1"), results["smp"]
    assert results["hotplug"][1].startswith("online 0-1, 0, 0-1 "), results["hotplug"]
    attested(host, ended)


def four_vcpus(host):
    """Debian's other kernel with four processors."""
    ended = host.guest("--cpus", "4", run="smp", flavour="amd64", timeout=900)
    assert ended.passed("smp")["smp"][1].startswith("online 0-3"), ended.tail()


def what_the_host_does_not_allow_is_said(host):
    """Refusals name what was asked for, what is allowed and what to do, before any instruction of the guest."""
    for arguments, code, words in [
        (["--td-attributes", "0x10000001"], 22, "DEBUG"),
        (["--td-attributes", "0"], 22, "SEPT_VE_DISABLE"),
        (["--cpus", "9"], 20, "--cpus 8"),
    ]:
        ended = host.guest(*arguments, run="smp", timeout=60)
        assert ended.code == code and words in ended.stderr, (arguments, ended.code, ended.stderr)
        assert "running" not in ended.event_names(), ended.event_names()


def kvm_and_module_answer_as_the_model_says(host):
    """tdx/tests/live.rs: launches and refusals on KVM's real code; its answers equal the model's."""
    return host.run_tests("tdx", "live")


def doctor_finds_a_host_for_tdx(host):
    """An ordinary VM cannot run on this host; that decides nothing about TDs."""
    code, text = host.shell("/root/cvmm doctor --for tdx", check=False)
    assert code == 0 and re.search(r"soft .*: +no\n.*snp .*: +no\n.*tdx .*: +yes", text), text
    assert re.findall(r"(?m)^missing +(\S+)", text) == ["kvm.stock-guest", "snp.cpu"], text


def hardware_check_finds_what_was_predicted(host):
    """The command for people with real hardware, with the guest of one vCPU alone: on this host two double the time, and
    another test has them."""
    return hardware.judged(host, cpus=(1,))


TESTS = [
    doctor_finds_a_host_for_tdx,
    hardware_check_finds_what_was_predicted,
    kvm_and_module_answer_as_the_model_says,
    what_the_host_does_not_allow_is_said,
    a_stock_kernel_is_what_was_predicted,
    a_reboot_has_the_same_digest,
    two_vcpus,
    four_vcpus,
]
