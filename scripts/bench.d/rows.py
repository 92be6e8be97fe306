"""What is measured, the target of each, and the table that says how far it is reached."""

import json
from dataclasses import dataclass
from statistics import median

BASES = ("microvm", "q35", "ovmf", "tdvf", "sev-snp-measure")


@dataclass
class Row:
    """One quantity; target is at most `limit` times base's median, or at most `limit` itself when there is no base."""

    key: str
    title: str
    unit: str
    limit: float | None = None
    base: str | None = None


ROWS = [
    Row("start_cpu_local", "CPU, exec to first output, tiny payload, this host's KVM", "ms", 0.02, "microvm"),
    Row("start_wall_local", "wall time of the same", "ms"),
    Row("ready_cpu_local", "CPU, exec to first vCPU entering, this host's KVM (QEMU: to first output)", "ms", 0.02, "microvm"),
    Row("start_cpu", "host CPU, exec to first output, tiny payload, in L1", "ms"),
    Row("start_wall", "wall time of the same", "ms"),
    Row("calls", "system calls from exec to first output, in L1", "", 200),
    Row("ioctls", "KVM ioctls from exec to first output, in L1", "", 40),
    Row("boot_cpu", "host CPU, exec to init, stock kernel", "s"),
    Row("boot_wall", "wall time of the same", "s"),
    Row("boot_exits", "exits until init", ""),
    Row("boot_io_exits", "port accesses among them", ""),
    Row("beside_ram", "resident memory beside guest RAM, after boot", "MiB", 4),
    Row("ram", "guest RAM resident (512 MiB given)", "MiB"),
    Row("read-4k_cpu", "host CPU of a 4 KiB read", "ms", 0.3, "q35"),
    Row("write-4k_cpu", "host CPU of a 4 KiB write", "ms", 0.3, "q35"),
    Row("read-1m_cpu", "host CPU of a 1 MiB read", "ms", 0.7, "q35"),
    Row("write-1m_cpu", "host CPU of a 1 MiB write", "ms", 0.7, "q35"),
    Row("read-4k_wall", "time of a 4 KiB read in the guest", "ms"),
    Row("write-4k_wall", "time of a 4 KiB write in the guest", "ms"),
    Row("read-1m_wall", "time of a 1 MiB read in the guest", "ms"),
    Row("write-1m_wall", "time of a 1 MiB write in the guest", "ms"),
    Row("read-4k_exits", "exits per 4 KiB read", ""),
    Row("write-4k_exits", "exits per 4 KiB write", ""),
    Row("read-1m_exits", "exits per 1 MiB read", ""),
    Row("round-trip_wall", "TCP round trip of 64 bytes to the tap, in the guest", "ms", 0.6, "q35"),
    Row("round-trip_cpu", "host CPU of the same", "ms", 0.6, "q35"),
    Row("round-trip_exits", "exits per round trip", ""),
    Row("send-mib_cpu", "host CPU of sending 1 MiB", "ms"),
    Row("receive-mib_cpu", "host CPU of receiving 1 MiB", "ms"),
    Row("send-mib_wall", "time of sending 1 MiB", "ms"),
    Row("receive-mib_wall", "time of receiving 1 MiB", "ms"),
    Row("snp_boot_cpu", "SNP: host CPU, exec to init", "s", 0.25, "ovmf"),
    Row("snp_boot_wall", "SNP: wall time of the same", "s", 0.25, "ovmf"),
    Row("snp_exits", "SNP: exits until init", ""),
    Row("snp_pages", "SNP: measured pages, 1 vCPU", "", 21),
    Row("tdx_pages", "TDX: pages added at launch (TDH.MEM.PAGE.ADD)", "", 21),
    Row("tdx_extends", "TDX: measuring commands at launch (TDH.MR.EXTEND)", ""),
    Row("tdx_bytes", "TDX: bytes measured at launch", "KiB"),
    Row("tdx_commands", "TDX: launch commands, 1 vCPU, in the model", ""),
    Row("tdx_exits", "TDX: exits until the first kernel instruction, in the model", "", 1),
    Row("tdx_calls", "TDX: TDCALLs until then (acceptance by 4 KiB, as KVM backs a TD)", ""),
    Row("measure_cpu", "CPU of predicting the digest, 64 vCPUs, kernel and initrd given", "s", 0.05, "sev-snp-measure"),
    Row("binary", "stripped static binary", "MiB", 4),
]


class Results:
    """Samples by row and contender, and remarks on what could not be measured."""

    def __init__(self):
        self.samples = {}
        self.remarks = []

    def add(self, key, who, value):
        """Adds one sample; key is a row's."""
        self.samples.setdefault(key, {}).setdefault(who, []).append(value)

    def remark(self, text):
        """Says once what the table cannot."""
        if text not in self.remarks:
            self.remarks.append(text)

    def median(self, key, who):
        """The median of a contender's samples; None without any."""
        found = self.samples.get(key, {}).get(who)
        return median(found) if found else None

    def verdict(self, row):
        """(target in words, whether it is met: True, False or None)."""
        if row.limit is None:
            return "", None
        own = self.median(row.key, "cvmm")
        if row.base is None:
            return f"≤ {row.limit:g} {row.unit}".strip(), None if own is None else own <= row.limit
        base = self.median(row.key, row.base)
        known = own is not None and base
        return f"≤ {row.limit:g} × {row.base}", own <= row.limit * base if known else None

    def table(self):
        """All rows with samples as a Markdown table, and the remarks below it."""
        lines = ["| what | cvmm | beside it | ratio | target | met |", "|---|---|---|---|---|---|"]
        for row in ROWS:
            if row.key not in self.samples:
                continue
            own = self.median(row.key, "cvmm")
            others = [(base, self.median(row.key, base)) for base in BASES]
            others = [(base, value) for base, value in others if value is not None]
            beside = ", ".join(f"{base} {self._cell(row, base)}" for base, _ in others)
            ratios = ", ".join(f"{own / value:.2g}" for _, value in others if own is not None and value)
            target, met = self.verdict(row)
            said = "" if not target else {True: "yes", False: "**no**", None: "not measured"}[met]
            lines.append(f"| {row.title} | {self._cell(row, 'cvmm')} | {beside} | {ratios} | {target} | {said} |")
        return "\n".join([*lines, "", *(f"- {text}" for text in self.remarks)])

    def _cell(self, row, who):
        value = self.median(row.key, who)
        if value is None:
            return "–"
        text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
        return f"{text} {row.unit}".strip()

    def raw(self):
        """Every sample, a line for each row and contender."""
        lines = []
        for row in ROWS:
            for who, found in self.samples.get(row.key, {}).items():
                lines.append(f"{row.key:<18} {who:<16} {' '.join(f'{value:.4g}' for value in found)}")
        return "\n".join(lines)

    def write(self, path, about):
        """Writes everything as JSON."""
        rows = []
        for row in ROWS:
            if row.key in self.samples:
                target, met = self.verdict(row)
                rows.append(dict(
                    key=row.key, title=row.title, unit=row.unit, target=target, met=met, samples=self.samples[row.key]
                ))
        path.write_text(json.dumps(dict(about=about, rows=rows, remarks=self.remarks), indent=1) + "\n")
