"""TDX guests on the emulated TDX host: KVM's own TDX code runs, and a model of the TDX module measures and refuses."""

import hashlib
import re

import soft
from host import output

CONFIG_ID = "c1" * 48


def measure(host, words, *arguments, flavour="cloud"):
    """What `cvmm measure` says on this machine, which has no TDX: the registers by name."""
    command = [
        host.binary, "measure", "--platform", "tdx", "--kernel", host.files[f"{flavour}_kernel"],
        "--initrd", host.files[f"{flavour}_initrd"], "--cmdline", words, *arguments,
    ]  # fmt: skip
    return dict(re.findall(r"(?m)^(mrtd|rtmr\d)\W+([0-9a-f]{96})", output(*command).lower()))


def registers(ended):
    """The registers as the guest's kernel showed them before anything extended the last one, and that one after."""
    note = ended.results()["registers"][1]
    return {name.split(":")[0]: value for name, value in re.findall(r"(\S+)=([0-9a-f]+)", note)}


def attested(host, ended, *arguments, flavour="cloud"):
    """Asserts that prediction, launch and the guest's own registers agree."""
    seen = registers(ended)
    predicted = measure(host, ended.words, *arguments, flavour=flavour)
    assert {"mrtd", "rtmr1", "rtmr2"} <= set(predicted), predicted
    for name, value in predicted.items():
        assert seen[name] == value, f"{name}: predicted {value}, the guest reads {seen[name]}"
    announced = [event["digest"] for event in ended.events if event["event"] == "measured"]
    assert announced == [seen["mrtd"]], (announced, seen["mrtd"])
    assert seen["extended"] == hashlib.sha384(bytes(48) + b"\x5a" * 48).hexdigest(), seen["extended"]
    return seen


def a_stock_kernel_is_what_was_predicted(host):
    """Every device works in the guest, with checksums; MRTD and the run-time registers of `cvmm measure` are those
    that the guest's kernel reads from the module; so is the owner's MRCONFIGID."""
    ended, times = soft.traffic(
        host, "cloud", 1, 32, 8, 4, "--mrconfigid", CONFIG_ID, run=["registers"], timeout=600
    )
    seen = attested(host, ended)
    assert seen["mrconfigid"] == CONFIG_ID, seen
    return times


def a_reboot_has_the_same_digest(host):
    """A reboot is a new TD from the same plan."""
    wait = "await CVMM-INIT 2; while kill -TERM $PID 2>/dev/null; do sleep 2; done"
    ended = host.guest(run="smp", cmdline="cvmm.then=reboot", extra=wait, timeout=400)
    digests = [event["digest"] for event in ended.events if event["event"] == "measured"]
    assert len(digests) >= 2 and len(set(digests)) == 1, (digests, ended.code, ended.tail())


def two_vcpus(host):
    """The guest wakes its second processor through the shim's mailbox."""
    ended = host.guest("--cpus", "2", run="smp,registers", timeout=400)
    results = ended.passed("smp", "registers")
    assert results["smp"][1].startswith("online 0-1"), results["smp"]
    attested(host, ended)


def four_vcpus(host):
    """Debian's other kernel with four processors."""
    ended = host.guest("--cpus", "4", run="smp", flavour="amd64", timeout=400)
    assert ended.passed("smp")["smp"][1].startswith("online 0-3"), ended.tail()


def kvm_and_module_answer_as_the_model_says(host):
    """tdx/tests/live.rs: launches and refusals on KVM's real code; its answers equal the model's."""
    return host.run_tests("tdx", "live")


TESTS = [
    kvm_and_module_answer_as_the_model_says,
    a_stock_kernel_is_what_was_predicted,
    a_reboot_has_the_same_digest,
    two_vcpus,
    four_vcpus,
]
