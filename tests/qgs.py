#!/usr/bin/env python3
"""A stand-in for Intel's quote generation service: quotes of the form of version 4, signed with a test key.

Usage: tests/qgs.py SOCKET|vsock=PORT [--misbehave HOW] [--once]

Checks the TDREPORT's two hashes as a TDX host's CPU would its MAC, which emulated hosts do not make, and puts its fields
into a quote. `cvmm quote` reads that quote and finds its signature good; there is no certificate behind it, so it
never verifies. Anybody can have this key: such a quote proves function, never protection.

HOW: late=SECONDS, silent, close, cut, long, error, type, length: what a service may do wrong.
"""

import argparse
import hashlib
import os
import socket
import struct
import time

# NIST P-256 (FIPS 186-4, D.1.2.3).
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
KEY = int.from_bytes(hashlib.sha256(b"cvmm test attestation key").digest()) % N

REPORT_BYTES = 1024
REQUEST, RESPONSE = 0, 1
INVALID_PARAMETER, INVALID_VERSION, INVALID_TYPE, INVALID_SIZE = 0x12003, 0x12004, 0x12005, 0x12006
# Intel's identity as a quoting enclave's vendor.
VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")


class Refused(Exception):
    """A request that the service answers with an error code."""

    def __init__(self, code, why):
        super().__init__(why)
        self.code = code


def add(a, b):
    """The sum of two points; None is the point at infinity."""
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = 3 * (a[0] * a[0] - 1) * pow(2 * a[1], -1, P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(number, point):
    """`number` times a point."""
    result = None
    while number:
        if number & 1:
            result = add(result, point)
        point = add(point, point)
        number >>= 1
    return result


def public():
    """The public key, x and y."""
    return b"".join(part.to_bytes(32) for part in times(KEY, G))


def sign(message):
    """ECDSA with SHA-256, r and s."""
    digest = int.from_bytes(hashlib.sha256(message).digest())
    while True:
        nonce = int.from_bytes(os.urandom(40)) % (N - 1) + 1
        r = times(nonce, G)[0] % N
        s = pow(nonce, -1, N) * (digest + r * KEY) % N
        if r and s:
            return r.to_bytes(32) + s.to_bytes(32)


def check(report):
    """Refuses what no TDX module can have made."""
    if report[0] != 0x81:
        raise Refused(INVALID_PARAMETER, f"the report is of type {report[0]:#x}, a TDREPORT of type 0x81")
    for name, at, start, length in (("TEE_TCB_INFO", 32, 256, 239), ("TDINFO", 80, 512, 512)):
        if hashlib.sha384(report[start : start + length]).digest() != report[at : at + 48]:
            raise Refused(INVALID_PARAMETER, f"the TDREPORT's hash of {name} is wrong")


def body(report):
    """A quote's TD report from a TDREPORT (Intel TDX module ABI, "TDREPORT_STRUCT")."""
    tcb, info = report[256 : 256 + 239], report[512:]
    svn, seam, signer = tcb[8:24], tcb[24:72], tcb[72:120]
    attributes, xfam, registers = info[:8], info[8:16], info[16 : 16 + 8 * 48]
    data = report[128:192]
    made = svn + seam + signer + tcb[120:128] + attributes + xfam + registers + data
    assert len(made) == 584, len(made)
    return made


def quote(report):
    """A quote of version 4."""
    check(report)
    key, bound = public(), bytes(range(32))
    header = struct.pack("<HHI4x16s20x", 4, 2, 0x81, VENDOR)
    signed = header + body(report)
    enclave = bytearray(384)
    enclave[320:352] = hashlib.sha256(key + bound).digest()
    certified = bytes(enclave) + sign(bytes(enclave)) + struct.pack("<H", len(bound)) + bound
    certified += struct.pack("<HI", 5, 0)
    authority = sign(signed) + key + struct.pack("<HI", 6, len(certified)) + certified
    return signed + struct.pack("<I", len(authority)) + authority


def requested(message):
    """The TDREPORT of a request, or Refused."""
    if len(message) < 24:
        raise Refused(INVALID_SIZE, f"a request of {len(message)} bytes")
    major, _, kind, size, _, report_size, ids = struct.unpack_from("<HHIIIII", message)
    if major != 1:
        raise Refused(INVALID_VERSION, f"version {major}")
    if kind != REQUEST:
        raise Refused(INVALID_TYPE, f"type {kind}")
    if size != len(message) or report_size != REPORT_BYTES or ids or size != 24 + report_size:
        raise Refused(INVALID_SIZE, f"size {size}, report {report_size}, ids {ids}")
    return message[24:]


def response(code, content=b"", kind=RESPONSE):
    """An answer, its length before it."""
    size = 24 + len(content)
    message = struct.pack("<HHIIIII", 1, 1, kind, size, code, 0, len(content)) + content
    return struct.pack(">I", size) + message


def exactly(stream, count):
    """`count` bytes, or EOFError."""
    got = b""
    while len(got) < count:
        piece = stream.recv(count - len(got))
        if not piece:
            raise EOFError
        got += piece
    return got


def answer(message, how):
    """The bytes to send for a request."""
    try:
        made = response(0, quote(requested(message)))
    except Refused as refusal:
        print(f"refused: {refusal}", flush=True)
        return response(refusal.code)
    wrong = {
        "cut": made[: len(made) // 2],
        "long": response(0, bytes(200 << 10)),
        "error": response(0x11001),
        "type": response(0, b"no quote", kind=3),
        "length": b"\xff" * 4 + made[4:],
        "close": b"",
    }
    return wrong.get(how, made)


def serve(stream, how):
    """One connection, one request."""
    length = struct.unpack(">I", exactly(stream, 4))[0]
    message = exactly(stream, min(length, 1 << 16))
    print(f"request of {length} bytes", flush=True)
    if how == "silent":
        # Until the other side gives up.
        stream.recv(1)
        return
    if how.startswith("late="):
        time.sleep(float(how.removeprefix("late=")))
    stream.sendall(answer(message, how))


def listen(where):
    """A listening socket."""
    if where.startswith("vsock="):
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, int(where.removeprefix("vsock="))))
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(where)
    listener.listen(8)
    return listener


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", metavar="SOCKET|vsock=PORT")
    parser.add_argument("--misbehave", default="", metavar="HOW")
    parser.add_argument("--once", action="store_true", help="end after one connection")
    chosen = parser.parse_args()
    listener = listen(chosen.where)
    print("listening", flush=True)
    while True:
        stream, _ = listener.accept()
        with stream:
            try:
                serve(stream, chosen.misbehave)
            except (EOFError, OSError) as error:
                print(f"connection ended: {error!r}", flush=True)
        if chosen.once:
            return


if __name__ == "__main__":
    main()
