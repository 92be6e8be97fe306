"""The emulated SNP host's keys: a VCEK that signs its reports, and certificates up to a root of its own.

They are test keys, readable by anyone on this machine: a report that they sign proves function, never protection.
"""

import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import cache
from report import RigError, say

# As hw/i386/psp_emu.c reports them: its chip identifier and its TCB.
CHIP_ID = bytes([0x5A]) * 64
TCB = {"3.1": 4, "3.2": 0, "3.3": 0x15, "3.8": 0xD3}
AMD = "1.3.6.1.4.1.3704.1"
# SEV-ES Guest-Hypervisor Communication Block standard, "SNP Extended Guest Request": the certificate table.
TABLE = {
    "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
}
SUBJECT = "/O=cvmm emulated SNP host, no protection/CN="
DAYS = "9000"


def folder():
    """The folder of ark.pem, ask.pem, vcek.pem (.der too), certs.table for the guest, and vcek.hex, the secret."""
    return cache.made(f"snp-host/{cache.key(Path(__file__))}", _make)


def secret():
    """The VCEK's secret, 96 hexadecimal digits."""
    return (folder() / "vcek.hex").read_text()


def _make(path):
    if not shutil.which("openssl"):
        raise RigError("openssl is missing: install the package openssl, which makes the emulated SNP host's keys")
    say("making the emulated SNP host's keys and certificates")
    levels = "".join(f"{AMD}.{number}=ASN1:INTEGER:{level}\n" for number, level in TCB.items())
    (path / "extensions").write_text(
        "[authority]\nbasicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n"
        f"[signer]\n{AMD}.1=ASN1:INTEGER:0\n{AMD}.2=ASN1:IA5STRING:Milan-B0\n{levels}"
        f"{AMD}.4=DER:{CHIP_ID.hex(':')}\n"
    )
    rsa = "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:4096".split()
    curve = "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -pkeyopt ec_param_enc:named_curve".split()
    for name, kind in (("ark", rsa), ("ask", rsa), ("vcek", curve)):
        _openssl(path, *kind, "-out", f"{name}.key")
    _certificate(path, "ark", "ARK-Milan", "ark", "authority")
    _certificate(path, "ask", "SEV-Milan", "ark", "authority")
    _certificate(path, "vcek", "SEV-VCEK", "ask", "signer")
    coded = _openssl(path, "ec", "-in", "vcek.key", "-outform", "DER")
    start = coded.index(b"\x02\x01\x01\x04\x30") + 5  # ECPrivateKey: version 1, then 48 bytes
    (path / "vcek.hex").write_text(coded[start : start + 48].hex())
    (path / "certs.table").write_bytes(_table(path))
    for leftover in ("extensions", "ark.key", "ask.key", "vcek.key"):
        (path / leftover).unlink()


def _certificate(path, name, common, issuer, section):
    pss = "-sha384 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:48".split()
    sign = [] if name == "vcek" else pss
    _openssl(path, "req", "-new", "-key", f"{name}.key", "-subj", SUBJECT + common, "-out", f"{name}.csr", *sign)
    by = ["-signkey", "ark.key"] if issuer == name else ["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key"]
    serial = str(list(TABLE).index(name) + 1)
    _openssl(
        path, "x509", "-req", "-in", f"{name}.csr", *by, *pss, "-set_serial", serial, "-days", DAYS,
        "-extfile", "extensions", "-extensions", section, "-out", f"{name}.pem",
    )
    _openssl(path, "x509", "-in", f"{name}.pem", "-outform", "DER", "-out", f"{name}.der")
    (path / f"{name}.csr").unlink()


def _table(path):
    """The table that a host hands a guest: entries of identifier, offset and length, an empty one, the certificates."""
    bodies = {name: (path / f"{name}.der").read_bytes() for name in TABLE}
    offset = 24 * (len(TABLE) + 1)
    head, data = b"", b""
    for name, identifier in TABLE.items():
        head += uuid.UUID(identifier).bytes_le + struct.pack("<II", offset + len(data), len(bodies[name]))
        data += bodies[name]
    table = head + bytes(24) + data
    return table + bytes(-len(table) % 4096)


def _openssl(path, *words):
    run = subprocess.run(["openssl", *words], cwd=path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if run.returncode != 0:
        raise RigError(f"`openssl {' '.join(words)}` failed: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout
