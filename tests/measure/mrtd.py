"""MRTD of a firmware image, computed without cvmm: metadata by struct, digest by hashlib."""
import hashlib
import struct
import uuid

PAGE = 4096
FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
AUG, EXTEND = 2, 1


def _descriptor(image):
    """Offset of the descriptor: by OVMF's table of GUIDs, or by td-shim's word 32 bytes before the end."""
    at = len(image) - 32 - 18
    total, guid = struct.unpack_from("<H16s", image, at)
    if guid != FOOTER:
        return struct.unpack_from("<I", image, len(image) - 32)[0]
    start = at + 18 - total
    while at > start:
        length, guid = struct.unpack_from("<H16s", image, at - 18)
        if guid == METADATA:
            return len(image) - struct.unpack_from("<I", image, at - 22)[0]
        at -= length
    raise ValueError("no TDX metadata")


def sections(image):
    """(bytes of the file, gpa, length, type, attributes) in the order of the metadata."""
    at = _descriptor(image)
    magic, _, version, count = struct.unpack_from("<4sIII", image, at)
    assert (magic, version) == (b"TDVF", 1), "no TDX metadata"
    for entry in struct.iter_unpack("<IIQQII", image[at + 16 : at + 16 + 32 * count]):
        offset, raw, gpa, length, kind, attributes = entry
        yield image[offset : offset + raw], gpa, length, kind, attributes


def _record(name, gpa):
    return name.ljust(16, b"\0") + struct.pack("<Q", gpa) + bytes(104)


def mrtd(parts, two_pass=False):
    """The digest of parts, each (contents, gpa, length, type, attributes)."""
    digest = hashlib.sha384()

    def extend(page, contents):
        for at in range(0, PAGE, 256):
            digest.update(_record(b"MR.EXTEND", page + at) + contents[at : at + 256])

    for data, gpa, length, _, attributes in parts:
        if attributes & AUG:
            continue
        data = data.ljust(length, b"\0")
        pages = [(gpa + at, data[at : at + PAGE]) for at in range(0, length, PAGE)]
        for page, contents in pages:
            digest.update(_record(b"MEM.PAGE.ADD", page))
            if attributes & EXTEND and not two_pass:
                extend(page, contents)
        for page, contents in pages if attributes & EXTEND and two_pass else []:
            extend(page, contents)
    return digest.hexdigest()
