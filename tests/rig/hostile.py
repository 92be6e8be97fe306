"""The hostile guest of tests/hostile under cvmm on the real KVM of an L1, on either platform."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from host import RIG, ROOT

sys.path.insert(0, str(ROOT / "tests/hostile"))
import run as cases  # noqa: E402

# What cvmm may hold more at the end than after the first seconds: its allocator keeps freed pages, and each interrupt
# vector that a driver ever enabled keeps its event descriptor.
RSS_GROWTH_KIB, DESCRIPTOR_GROWTH, THREAD_GROWTH = 8192, 32, 2
EVENTS_MAX, STDERR_MAX = 20_000, 200_000
# Descriptors, threads and resident KiB of cvmm; scripts say HELD for it.
HELD = (
    r"echo held $(ls /proc/$PID/fd | wc -l) $(ls /proc/$PID/task | wc -l)"
    r" $(sed -n 's/VmRSS:[^0-9]*\([0-9]*\).*/\1/p' /proc/$PID/status)"
)
SCRIPT = r"""
cd /root; rm -f hconsole hevents hv hv_*; : > hconsole
[ -d /sys/class/net/tap0 ] || { tunctl -t tap0 && ip link set tap0 up; } >/dev/null 2>&1
timeout -s KILL 900 ./cvmm run --platform PLATFORM --memory 128M --kernel hostile --cmdline 'CMDLINE' --disk hd \
    --disk hro,ro --rng --net tap=tap0 --vsock cid=42,uds=/root/hv --console file=hconsole --events hevents 2>herr &
PID=$!
while kill -0 $PID 2>/dev/null; do
    ! grep -q '"running"' hevents || HELD
    sleep 2
done 2>/dev/null
wait $PID; echo "code $?"
echo "sizes $(wc -l < hevents) $(wc -c < herr)"
tail -c 300 herr
echo "=== console"; tr -d '\000' < hconsole
"""


# The border between private and shared memory, and one of each group: an SNP guest's every access to a device is slow.
ON_SNP = "C01,C05,C09,C13f,C15b,C22,C30,C40b,C43e,C61,C63b,C50,C50b,C50c,C50d,C50e,C50f,C50g,C50h,C51,C52,C53"


def hostile_guest(host, only=""):
    """Every case that applies, all of them PASS or REJECT; nothing grows meanwhile. HOSTILE_ALL=1 plays all on SNP too."""
    platform = "snp" if host.kind == "snp" else "soft"
    if host.kind == "snp" and not os.environ.get("HOSTILE_ALL"):
        only = only or ON_SNP
    held = []

    def start(words):
        script = SCRIPT.replace("HELD", HELD).replace("PLATFORM", platform).replace("CMDLINE", words)
        _, text = host.shell(script, 960, check=False)
        log, _, console = text.partition("=== console\n")
        held.append(log)
        return console, re.sub(r"held .*\n", "", log)[-200:]

    _push(host)
    results = cases.play(start, f"mode={platform} ecam=e0000000 ram=8000000" + (f" only={only}" if only else ""))
    cases.save(f"cvmm {platform}", results)
    print(cases.table({f"cvmm {platform}": results}), flush=True)
    bad = [f"{o.case} {o.device}: {o.verdict} {o.why}" for o in results if o.verdict not in cases.GOOD]
    bad += cases.gaps(results, only)
    assert not bad, "\n".join(bad)
    return _bounded(held)


def _push(host):
    with tempfile.TemporaryDirectory() as folder:
        image = cases.build(folder)["bzimage"]
        subprocess.run([RIG, "push", "--name", host.name, f"{image}:/root/hostile"], check=True)
    host.shell("cd /root; truncate -s 16M hd; truncate -s 16M hro")


def _bounded(logs):
    """Descriptors, threads, memory, events and messages of every run."""
    notes = []
    for log in logs:
        # None, if a run is over before it was looked at.
        if not (samples := _samples(log)):
            continue
        events, messages = map(int, re.search(r"sizes (\d+) (\d+)", log).groups())
        # Of many samples, the first two may be of a cvmm that has not opened everything, the last of one on its way out.
        first, last = (samples[2:] or samples)[0], _most(samples[len(samples) // 2 :])
        assert last[0] <= first[0] + DESCRIPTOR_GROWTH and last[1] <= first[1] + THREAD_GROWTH, f"descriptors, threads: {first} -> {last}"
        assert last[2] <= first[2] + RSS_GROWTH_KIB, f"resident KiB: {first[2]} -> {last[2]}"
        assert events <= EVENTS_MAX and messages <= STDERR_MAX, f"{events} events, {messages} bytes of messages"
        notes.append(f"{first[0]} -> {last[0]} descriptors, {first[2]} -> {last[2]} KiB resident, {events} events")
    assert notes, logs
    return "; ".join(notes)


def _samples(log):
    """Descriptors, threads and resident KiB, as often as they were looked at."""
    return [tuple(map(int, found)) for found in re.findall(r"held (\d+) (\d+) (\d+)", log)]


def _most(samples):
    """The most of each; between two lives a machine holds little."""
    return tuple(map(max, zip(*samples)))


REBOOTS = r"""
cd /root; rm -f hconsole hevents hv hv_*
./cvmm run --platform PLATFORM --memory 128M --kernel hostile --cmdline 'mode=PLATFORM only=none then=reboot' --disk hd \
    --rng --vsock cid=42,uds=/root/hv --console file=hconsole --events hevents 2>herr &
PID=$!
life() { grep -c '"running"' hevents; }
until [ $(life) -ge 5 ] || ! kill -0 $PID; do sleep 0.1; done
until [ $(life) -ge LIVES ] || ! kill -0 $PID; do HELD; sleep 0.1; done
kill -9 $PID; wait $PID
tail -c 300 herr
echo "=== events"; cat hevents
"""


def a_hundred_reboots(host):
    """C64: a hundred lives of one cvmm, each measured the same; the later ones hold no more than the earlier ones."""
    platform, lives = ("snp", 30) if host.kind == "snp" else ("soft", 100)
    _push(host)
    script = REBOOTS.replace("PLATFORM", platform).replace("LIVES", str(lives)).replace("HELD", HELD)
    _, text = host.shell(script, 600, check=False)
    log, _, events = text.partition("=== events\n")
    names = [json.loads(line) for line in events.splitlines()]
    assert sum(event["event"] == "running" for event in names) >= lives, log
    digests = {event.get("digest") for event in names if event["event"] == "measured"}
    assert len(digests) == 1, digests
    samples = _samples(log)
    early, late = _most(samples[: len(samples) // 2]), _most(samples[len(samples) // 2 :])
    grown = [after - before for before, after in zip(early, late)]
    assert grown[0] <= 2 and grown[1] <= 2 and grown[2] <= RSS_GROWTH_KIB, (early, late)
    return f"{lives} lives, {len(samples)} looks: descriptors, threads, KiB resident {early} -> {late}"


SOAK_SECONDS = int(os.environ.get("SOAK_SECONDS", "600"))
SERVERS = """
again() { while kill -0 $PID 2>/dev/null; do ./tool serve $1 >>serve.log 2>&1 || sleep 0.2; done; }
again tcp:10.9.0.1:7000 & again unix:/root/v_5000 &
while kill -0 $PID 2>/dev/null; do HELD; sleep 5; done
"""


def soak(host):
    """Disk, network and vsock transfers with checksums all at once, and from every processor of an SNP guest reports, for
    each of which its kernel converts memory; nothing that cvmm holds grows. SOAK_SECONDS is 600 unless set."""
    sizes = f"cvmm.disk_mib=16 cvmm.net_mib=8 cvmm.vsock_mib=8 cvmm.soak_seconds={SOAK_SECONDS}"
    ended = host.guest(
        "--cpus", "4", "--disk", "/root/disk", "--rng", run="soak", cmdline=f"cvmm.ip=10.9.0.2/24 cvmm.peer=10.9.0.1:7000 {sizes}",
        timeout=SOAK_SECONDS * 2 + 300, net=True, VSOCK=8, extra=SERVERS.replace("HELD", HELD),
    )  # fmt: skip
    rounds = ended.passed("soak")["soak"][1]
    held = _samples(ended.extra)
    quarter = len(held) // 4
    # The most of each: the last look may find cvmm on its way out.
    second, last = _most(held[quarter : 2 * quarter]), _most(held[3 * quarter :])
    assert last[0] <= second[0] + DESCRIPTOR_GROWTH and last[2] <= second[2] + RSS_GROWTH_KIB, (second, last)
    return f"{rounds}; in the second quarter {second}, in the last {last} (descriptors, threads, KiB resident)"


TESTS = [hostile_guest, a_hundred_reboots]
# Only by name: it takes ten minutes.
LONG = [soak]
