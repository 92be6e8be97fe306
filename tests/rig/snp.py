"""SNP guests on the emulated SNP host: KVM's own SNP code runs, and the security processor's answers are checked."""

import json
import re

import soft

NONCE = "c0ffee" * 21 + "c0"
HOST_DATA = "5a" * 32


def measured(ended):
    """The digests that cvmm announced, one for each life."""
    return [event["digest"] for event in ended.events if event["event"] == "measured"]


def predicted(host, *arguments, run, cmdline="", flavour="cloud"):
    """What `cvmm measure` says, on this machine and from the same arguments, about Host.guest's guest."""
    from host import output

    words = f"console=hvc0 quiet cvmm.run={run} {cmdline}".strip()
    command = [
        host.binary, "measure", "--platform", "snp", "--kernel", host.files[f"{flavour}_kernel"],
        "--initrd", host.files[f"{flavour}_initrd"], "--cmdline", words, *arguments,
    ]  # fmt: skip
    return output(*command).split()[0]


def report_of(ended):
    """The report that the guest printed: its bytes in base64, and the measurement that the guest read in it."""
    text = re.search(r"^CVMM-REPORT (\S+)", ended.console, flags=re.M).group(1)
    measurement = re.search(r"measurement (\w+)", ended.results()["report"][1]).group(1)
    return text, measurement


def a_stock_kernel_is_measured_as_predicted(host):
    """The digest of `cvmm measure`, of the launch, and in the guest's report are one; all devices work."""
    ended, times = soft.traffic(
        host, "cloud", 1, 64, 16, 16, "--host-data", HOST_DATA, run=["report"], timeout=600, more_words=f"cvmm.nonce={NONCE}"
    )
    text, measurement = report_of(ended)
    assert measured(ended) == [measurement], (measured(ended), measurement)
    host.report, host.measurement = text, measurement
    return f"{measurement[:16]}…, {times}"


TESTS = []
