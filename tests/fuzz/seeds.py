"""Well-formed inputs that the fuzzer starts from, made anew for each run: nothing of it is worth keeping."""
import pathlib
import struct
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Operations of a driver's program, in the order of tests/fuzz/src/program.rs.
TYPICAL, REQUEST, DESCRIPTOR, OFFER, INDEX, POKE, KICK, CONVERT, WRITE, READ, CONFIG, SETUP, OUTSIDE, EVENT, RECYCLE = range(15)
# The same in the order of one that is after registers.
R_WRITE, R_READ, R_CONFIG, R_KICK, R_CONVERT, R_EVENT, R_SETUP, R_OUTSIDE = 0, 2, 3, 5, 6, 7, 9, 10


def op(code, *operands):
    return bytes([code]) + b"".join(bytes([part]) if isinstance(part, int) else part for part in operands)


def u16(value):
    return struct.pack("<H", value)


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def setup(how=0, without=0, mask=0):
    return bytes([how, without]) + u64(mask)


def descriptor(queue, index, kind, offset, length, flags, following):
    return op(DESCRIPTOR, queue, index, kind, u16(offset), u32(length), u16(flags), u16(following))


def rings(queue):
    """What breaks rings, for any device: one program for each."""
    loop = descriptor(queue, 0, 0, 0, 64, 1, 1) + descriptor(queue, 1, 0, 64, 64, 1, 0) + op(OFFER, queue, u16(0)) + op(KICK, queue)
    private = op(CONVERT, 0x20, 0) + descriptor(queue, 0, 0, 0, 512, 2, 0) + op(OFFER, queue, u16(0)) + op(KICK, queue)
    indirect = descriptor(queue, 0, 8, 0, 64, 4, 0) + op(OFFER, queue, u16(0)) + op(KICK, queue)
    ahead = op(INDEX, queue, u16(0x7fff)) + op(KICK, queue)
    hidden_ring = op(CONVERT, 1, 3) + op(KICK, queue) + op(CONVERT, 1, 0x83) + op(SETUP, setup()) + op(KICK, queue)
    high = descriptor(queue, 0, 13, 16, 0xFFFF, 2, 0) + op(OFFER, queue, u16(0)) + op(KICK, queue)
    again = op(OFFER, queue, u16(3)) + op(OFFER, queue, u16(3)) + op(KICK, queue) + op(EVENT, 0xFF)
    request = op(REQUEST, queue, 0x05, u16(40), 4, b"abcd", u16(100)) + op(RECYCLE, queue)
    return [loop, private, indirect, ahead, hidden_ring, high, again, request]


def device(queues, *programs):
    all_programs = list(programs) + [p for queue in queues for p in rings(queue)]
    whole = [setup() + program for program in all_programs]
    return whole + [setup(how, 0, 0xFFFF_FFFF) + programs[0] for how in (1, 7, 8, 32)] + [setup() + b"".join(programs)]


def blk():
    requests = [op(TYPICAL, 0, kind, 3, 8, 1) for kind in range(9)]
    many = b"".join(op(TYPICAL, 2, kind, kind * 9, 4, 0) for kind in range(8)) + op(KICK, 0) + op(RECYCLE, 0)
    second = op(TYPICAL, 1, 0x80 | 1, 2, 2) + op(TYPICAL, 0, 0x80, 2, 2)
    in_flight = op(TYPICAL, 4, 0, 1, 16) + op(CONVERT, 0x20, 7) + op(SETUP, setup()) + op(TYPICAL, 4, 1, 1, 16)
    return device([0, 1], many, second, in_flight, *requests)


def net():
    receive = op(TYPICAL, 4, 0, u16(1600)) * 3 + op(OUTSIDE, 0, u16(64), 4, b"abcd") * 2 + op(RECYCLE, 0)
    sums = bytes([1, 1, 54, 0, 0xB4, 5, 34, 0, 16, 0, 0, 0])
    send = op(TYPICAL, 0, 1, u16(60)) + op(TYPICAL, 0, 3, u16(9000), sums) + op(TYPICAL, 0, 0x35, u16(1000), b"xyz") + op(OUTSIDE, 5, 15)
    full = op(TYPICAL, 0, 9, u16(0x3FFF)) * 30 + op(OUTSIDE, 5, 15) * 20 + op(RECYCLE, 1)
    merged = op(TYPICAL, 4, 6, u16(100)) * 4 + op(OUTSIDE, 0, u16(1500), 0) + op(RECYCLE, 0)
    odd = op(TYPICAL, 4, 0, u16(1600)) + op(OUTSIDE, 4, 8, u32(0xFFFF_FFFF) + b"abcd") + op(OUTSIDE, 7) + op(TYPICAL, 0, 1, u16(60))
    return device([0, 1], receive, send, full, merged, odd)


def packet(code, ports, flags=0, wrong=0, length=0):
    body = op(TYPICAL, 0, code, ports, flags, wrong)
    return body + (u16(length) if code & 15 == 5 else b"")


def vsock():
    buffers = op(TYPICAL, 4, 0, u16(0x1000)) * 6
    # From the guest to port 1 of the host: request, data both ways, half close, close.
    begin = buffers + packet(1, 0x11) + op(OUTSIDE, 1) + op(RECYCLE, 0)
    data = packet(5, 0x11, 0, 0, 100) + op(OUTSIDE, 4, 10) + op(OUTSIDE, 2, u16(500), 3, b"abc") + op(RECYCLE, 0)
    credit = packet(6, 0x11, 0x80) + u16(100) + u16(50) + packet(7, 0x11)
    close = packet(4, 0x11, 2) + packet(4, 0x11, 3) + packet(3, 0x11)
    # From a client to port 5 of the guest.
    inward = buffers + op(OUTSIDE, 0, 5) + packet(2, 0x45) + packet(5, 0x45, 0, 0, 20) + op(OUTSIDE, 4, 10) + op(OUTSIDE, 6)
    wrong = b"".join(packet(code, 0x11, 0, bit) for code in range(1, 8) for bit in (0, 1, 2, 4, 8))
    return [begin + data + credit + close, inward, begin + inward, begin + wrong, begin + data * 5]


def console():
    session = op(OUTSIDE, 3) + op(OUTSIDE, 0, 5, b"hello") + op(TYPICAL, 0, 0, u16(64)) + op(TYPICAL, 0, 0x29, u16(200), b"first")
    escape = op(OUTSIDE, 0, 3, b"\x01x\n") + op(OUTSIDE, 2) + op(TYPICAL, 0, 1, u16(0x3FFF)) * 8 + op(OUTSIDE, 3) + op(OUTSIDE, 1)
    return device([0, 1], session, escape)


def button():
    press = op(TYPICAL, 4, 0x70) * 5 + op(OUTSIDE) + op(RECYCLE, 0) + op(OUTSIDE) * 3
    status = op(TYPICAL, 0, 0x39) + op(WRITE, u16(0xB000), 0, u64(0x11)) + op(READ, u16(0xB000), 7)
    return device([0, 1], press, status)


def transport():
    def write(at, length, value):
        return op(R_WRITE, u16(at), length - 1, u64(value))

    status = [write(0x14, 1, value) for value in (0, 1, 3, 11, 15)]
    features = write(8, 4, 0) + write(0xC, 4, 0x3000_0000) + write(8, 4, 1) + write(0xC, 4, 3)
    queue = write(0x16, 2, 0) + write(0x18, 2, 8) + write(0x20, 8, 0x1000) + write(0x28, 8, 0x3000) + write(0x30, 8, 0x4000) + write(0x1C, 2, 1)
    good = b"".join(status[:3]) + features + status[3] + queue + status[4] + op(R_KICK, 0)
    msix = b"".join(write(0xC000 + at, 4, value) for at, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x41), (12, 0)))
    config = b"".join(op(R_CONFIG, u16(at), 3, u64(0xFFFF_FFFF)) for at in range(0x8000, 0x8100, 4))
    reads = b"".join(op(R_READ, u16(at), length) for at in (0, 0x14, 0x38, 0x9000, 0xA000, 0xB000, 0xC000, 0xD000) for length in (0, 1, 3, 7))
    window = b"".join(op(R_CONFIG, u16(0x8000 + at), 3, u64(value)) for at in range(0x80, 0xC0, 4) for value in (0, 4, 0x14))
    return [good, good + msix + op(R_EVENT, 0), config, reads, window, good + op(R_SETUP, setup()) + config + op(R_KICK, 1) + good]


def map_gpa():
    page = 0x08
    convert = b"".join(op(kind, 0x80 | how, u16(at), count) for kind, how, at, count in ((0, 0, 3, 4), (1, page, 100, 1), (2, 0, 511, 9), (0, 5, 17, 0)))
    back = b"".join(op(0, 0, u16(at), count) for at, count in ((3, 4), (0, 200), (500, 40)))
    faults = op(3, 0, u16(9), 0) + op(3, 0x80, u16(9), 3) + op(4, 0, u16(509), 10)
    body = lambda part: part.ljust(144, b"\0")
    ports = op(5, 0x45, u16(0x3F8), 0, body(bytes(range(32)))) + op(6, 0x45, u16(0x3FD), 2, body(b"")) + op(5, 0x45, u16(0x600), 1, body(b""))
    snp = op(9, 0x45, u16(24), 0, body(struct.pack("<IIQ", 6, 1, 0x11100))) + op(9, 0x45, u16(43), 0, body(u64(0x5000) + u64(4)))
    tdx = b"".join(op(9, 0x45, u16(40), 0, body(u64(0) + u64(0x1_0000 + call) + u64(0) + u64(0x3000) + u64(0x1000))) for call in (0, 2, 4, 9))
    tdx += op(9, 0x45, u16(24), 0, body(struct.pack("<II", 7, 16) + b"".join(u64(0x4142_4300 + register) for register in range(16))))
    held = op(0xE0, 0, u16(3), 4) + op(0xF0, 0x80, u16(3), 4)
    return [convert, convert + back, faults, ports, snp, tdx, held, faults + convert + ports + back + snp]


def kernel():
    file = bytearray(6 * 512)
    for at, value in (
        (0x1F1, b"\x04"), (0x1FE, b"\x55\xaa"), (0x201, b"\x6a"), (0x202, b"HdrS"), (0x206, u16(0x20F)), (0x211, b"\x01"),
        (0x230, u32(0x20_0000)), (0x234, b"\x01"), (0x236, b"\x7f"), (0x238, u32(2047)), (0x260, u32(40 << 20)),
    ):
        file[at : at + len(value)] = value
    return [u32(0) + u16(20) + file, u32(1 << 20) + u16(2047) + file[:0x268], u32(0) + u16(0) + file[:1024]]


def guid(text):
    return uuid.UUID(text).bytes_le


def table(*entries):
    """The table of GUIDs at the end of an image."""
    body = b"".join(data + u16(len(data) + 18) + guid(name) for name, data in entries)
    return body + u16(len(body) + 18) + guid("96b582de-1fb2-45f7-baea-a366c55a082d") + bytes(32)


def ovmf():
    sections = [(0x80_0000, 0x9000, 1), (0x80_A000, 0x3000, 1), (0x80_D000, 0x1000, 2), (0x80_E000, 0x1000, 3), (0x81_0000, 0x1000, 0x10), (0x80_F000, 0, 4)]
    images = []
    for chosen in (sections, sections[:3], []):
        metadata = b"ASEV" + struct.pack("<III", 16 + 12 * len(chosen), 1, len(chosen)) + b"".join(struct.pack("<III", *s) for s in chosen)
        for hashes in (0x81_0C00, 0):
            build = lambda offset: table(
                ("7255371f-3a3b-4b04-927b-1da6efa8d454", u32(hashes) + u32(0x400)),
                ("00f771de-1a7e-4fcb-890e-68c77e2fb44e", u32(0x80_B004)),
                ("dc886566-984a-4798-a75e-5585a7bf67cc", u32(offset)),
            )
            images.append(bytes([2]) + u32(0x800F12) + metadata + build(len(metadata) + len(build(0))))
    return images


def tdvf():
    sections = [(0, 4096, 0xFFFF_F000, 4096, 0, 1), (0, 0, 0x80_0000, 0x2000, 2, 0), (0, 0, 0x80_9000, 0x1000, 3, 0)]
    images = []
    for chosen in (sections, sections[:1]):
        entries = b"".join(struct.pack("<IIQQII", *section) for section in chosen)
        metadata = guid("e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae") + b"TDVF" + struct.pack("<III", 16 + len(entries), 1, len(chosen)) + entries
        build = lambda offset: table(("e47a6535-984a-4798-865e-4685a7bf8ec2", u32(offset)))
        images.append(metadata + build(len(metadata) - 16 + len(build(0))))
        # td-shim's way: a number at the end says where the descriptor is.
        images.append(bytes(4096 - 32 - len(metadata)) + metadata + u32(4096 - 32 - len(metadata) + 16) + bytes(28))
    return images


def certs():
    roots = [(ROOT / "snp/src/report/roots" / name).read_bytes() for name in ("ark-milan.der", "ask-milan.der")]
    vcek = (ROOT / "snp/tests/recorded/report/vcek-milan.der").read_bytes()
    names = ["63da758d-e664-4564-adc5-f4b93be8accd", "4ab7b379-bbac-4fe4-a02f-05aef327c782", "c0b406a4-a803-4952-9743-3fb6014cd0ae"]
    head, body = b"", b""
    for name, der in zip(names, [vcek, *roots]):
        head += guid(name) + u32(96 + len(body)) + u32(len(der))
        body += der
    pem = (ROOT / "snp/tests/recorded/keys/p256.pem").read_bytes()
    return [head + bytes(24) + body, vcek, pem, bytes(24)]


def report():
    recorded = ROOT / "snp/tests/recorded/report"
    milan = (recorded / "milan.bin").read_bytes()
    ask, ark = ((ROOT / "snp/src/report/roots" / name).read_bytes() for name in ("ask-milan.der", "ark-milan.der"))
    lists = [path.read_bytes() for path in sorted((ROOT / "snp/tests/recorded/revoked").glob("*.crl*"))]
    return [
        milan, milan + (recorded / "vcek-milan.der").read_bytes(), milan + (recorded / "vcek-turin.der").read_bytes(), milan + ask + ark,
        *(milan + each for each in lists),
    ]


def id_block():
    recorded = ROOT / "snp/tests/recorded/id-block"
    block, auth = (recorded / "block.bin").read_bytes(), (recorded / "auth.bin").read_bytes()
    return [block + auth, block + auth[:0x680]]


def cpuid():
    leaves = b"".join(struct.pack("<IBIIII", leaf, sub, 1, 2, 3, 4) for leaf, sub in ((1, 0x80), (7, 0), (0xD, 0), (0xD, 1), (0x8000_001F, 0x80)))
    page = u32(5) + bytes(12) + b"".join(struct.pack("<IIQQIIIIQ", leaf, 0, 0, 0, 9, 9, 9, 9, 0) for leaf in (1, 7, 0xD, 0xD, 0x8000_001F))
    return [bytes([5]) + leaves + page, bytes([0]) + page, bytes([80]) + leaves * 16]


def shim():
    descriptor = b"cvmmdsc1" + struct.pack("<IIQQQQQQ", 1, 2, 0x2000_0000, 0, 0x1000_0000, 0x4000, 0x1800_0000, 0x2000)
    page = bytearray(4096)
    fields = b"cvmmcfg1" + struct.pack("<IIIIQQ", 1, 1, 1, 8, 0x1000_0000, 1 << 40)
    fields += u64(0x4000) + bytes(32) + u64(0x2000) + bytes(32) + u32(13)
    page[: len(fields)] = fields
    page[0x800 : 0x800 + 13] = b"console=ttyS0"
    length = shim_descriptor_bytes()
    return [descriptor.ljust(length, b"\0") + bytes(page)]


def shim_descriptor_bytes():
    """DESCRIPTOR_LEN as the shim has it."""
    text = (ROOT / "shim/src/descriptor.rs").read_text()
    value = text.split("DESCRIPTOR_LEN: usize = ")[1].split(";")[0]
    return int(value, 0)


def config():
    disks = b'"disks":[{"path":"a"},{"path":"b","readonly":true,"queues":4}]'
    nets = b'"nets":[{"tap":"tap0"},{"fd":7,"mac":"02:00:00:00:00:0a"},{"passt":"/p","queues":1}]'
    rest = b'"vsock":{"cid":3,"uds":"/v"},"rng":true,"console":"socket=/c"'
    snp = b'"snp":{"policy":"0x30000","host_data":"' + b"00" * 32 + b'","id_block":"ib","id_auth":"ia","certs":"c","debug_swap":true,"secure_tsc":true}'
    boot = b'"boot":{"kernel":"k","initrd":"i","cmdline":"quiet"},"memory":"512M","cpus":2,"platform":"snp","machine":"v2"'
    notify = b'"notify":{"events":"fd:5","ready_fd":6,"no_reboot":true}'
    devices = b'"devices":{' + b",".join((disks, nets, rest)) + b"}"
    parts = [boot, devices, snp, notify]
    return [b"{" + part + b"}" for part in parts] + [b"{" + b",".join(parts) + b"}", b"{}"]


def quotes():
    recorded = ROOT / "tdx/tests/recorded/quote"
    return [(path.read_bytes(), path.with_suffix(".json").read_bytes()) for path in sorted(recorded.glob("*.quote"))]


def quote():
    return [u16(len(raw)) + raw + json for raw, json in quotes()] + [u16(len(raw)) + raw for raw, _ in quotes()]


def qgs():
    def answer(raw):
        size = 24 + len(raw)
        return struct.pack("<HHIIIII", 1, 1, 1, size, 0, 0, len(raw)) + raw

    return [answer(raw) for raw, _ in quotes()] + [struct.pack(">I", 5030) + answer(b"x"), answer(b"")]


def get_quote():
    header = struct.pack("<QQII", 1, 0, 1024, 0)
    good = b"".join(bytes([0, page]) for page in range(0, 120, 8))
    private = bytes([4, 9, 9]) + bytes([0x10, 8]) + bytes([0xC, 9, 9])
    return [header, good, good + private, bytes([8, 3]) + header, bytes([3, 1]) + u64(0x123) + u64(1 << 40)]


SEEDS = {
    "blk": blk, "blk_ring": blk, "bzimage": kernel, "certs": certs, "config": config, "console": console, "cpuid_page": cpuid,
    "get_quote": get_quote, "id_block": id_block, "input": button, "map_gpa": map_gpa, "net": net, "ovmf": ovmf, "qgs": qgs,
    "quote": quote, "report": report, "rng": lambda: device([0], op(TYPICAL, 0, u16(100)) * 9, op(EVENT, 0xFF)), "shim": shim,
    "tdvf": tdvf, "transport": transport, "vsock": lambda: device([0, 1, 2], *vsock()), "vsock_mux": lambda: [packets(p) for p in vsock()],
}


def packets(program):
    """A driver's program in the order of one that keeps to the rules."""
    # The operations that these programs consist of keep their operands; only the codes differ.
    out, rest = b"", program
    while rest:
        code, rest = rest[0], rest[1:]
        size = {TYPICAL: typical_size, OUTSIDE: outside_size, RECYCLE: lambda _: 1}[code](rest)
        out += bytes([{TYPICAL: 0, OUTSIDE: 4, RECYCLE: 7}[code]]) + rest[:size]
        rest = rest[size:]
    return out


def typical_size(rest):
    op_code = rest[1] & 15
    if op_code == 0:
        return 4
    credit = {0: 0, 1: 8}.get(rest[3] >> 6, 4)
    return 5 + (2 if op_code == 5 else 0) + credit


def outside_size(rest):
    how = rest[0] & 7
    if how in (0, 4, 5):
        return 2
    return 4 + rest[3] if how in (2, 3) else 1


def write(target, into):
    """Writes the seeds of `target` into the directory `into`, and what was once found with it."""
    into.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS.get(target, list)()):
        (into / f"{number:03}").write_bytes(seed)
    for path in (ROOT / "tests/fuzz/found" / target).glob("*"):
        (into / path.name).write_bytes(path.read_bytes())
