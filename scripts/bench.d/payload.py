"""The smallest guest: it writes one byte to the serial port and ends the machine.

As a bzImage (entered in 64-bit mode by cvmm's shim and in real mode by firmware) and as an ELF file with a PVH note,
which is how QEMU starts a kernel fastest.
"""

import struct

BYTE = b"\xa5"
LOAD = 0x10_0000
SETUP_SECTORS = 1
SECTOR = 512
XEN_ELFNOTE_PHYS32_ENTRY = 18


def _code(bits, zeros):
    """mov dx,0x3f8; mov al,BYTE; out dx,al; power cvmm's machine off (ACPI sleep control); fault three times over."""
    wide = b"" if bits == 16 else b"\x66"
    code = wide + b"\xba\xf8\x03" + b"\xb0" + BYTE + b"\xee"
    code += wide + b"\xba\x00\x06" + b"\xb0\x34\xee"
    if bits == 16:
        return code + b"\xfa\xf4\xeb\xfc"
    # lidt [six zero bytes]; int3 without a descriptor ends in a shutdown. 64-bit addresses count from the next instruction.
    address = zeros if bits == 32 else zeros - len(code) - 7
    return code + b"\x0f\x01\x1d" + struct.pack("<i", address) + b"\xcc\xfa\xf4\xeb\xfc"


def bzimage():
    """The payload as a bzImage of boot protocol 2.15."""
    return wrap_bzimage(bytes(0x200) + _code(64, 64).ljust(96, b"\0"), 0x1_0000, _code(16, 0))


def wrap_bzimage(body, init_bytes, real_code=b""):
    """A program with its 64-bit entry at 0x200 as a bzImage of boot protocol 2.15, which needs so many bytes of memory."""
    setup = bytearray((1 + SETUP_SECTORS) * SECTOR)
    real = 0x268
    setup[real : real + 32] = real_code.ljust(32, b"\x90")
    fields = [
        (0x1F1, "<B", SETUP_SECTORS), (0x1F4, "<I", len(body) // 16 + 1), (0x1FE, "<H", 0xAA55),
        (0x200, "<B", 0xEB), (0x201, "<B", real - 0x202), (0x206, "<H", 0x20F), (0x211, "<B", 1),
        (0x214, "<I", LOAD), (0x22C, "<I", 0x7FFFFFFF), (0x230, "<I", 0x20_0000), (0x234, "<B", 1), (0x236, "<H", 1),
        (0x238, "<I", 2047), (0x258, "<Q", 0x100_0000), (0x260, "<I", init_bytes),
    ]
    for at, form, value in fields:
        struct.pack_into(form, setup, at, value)
    setup[0x202:0x206] = b"HdrS"
    return bytes(setup) + body


def pvh():
    """The payload as an ELF file with a PVH note."""
    return wrap_pvh(_code(32, LOAD + 64).ljust(96, b"\0"), LOAD, LOAD, 0)


def wrap_pvh(code, load_at, entry, zeros):
    """A program as an ELF file with a PVH note: where it lies, where its 32-bit entry is, how many zeros follow it."""
    note = struct.pack("<III4sI", 4, 4, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", entry)
    text, notes = 0x1000, 0x100
    header = struct.pack(
        "<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, entry, 52, 0, 0, 52, 32, 2, 40, 0, 0
    )
    load = struct.pack("<IIIIIIII", 1, text, load_at, load_at, len(code), len(code) + zeros, 7, 0x1000)
    noted = struct.pack("<IIIIIIII", 4, notes, 0, 0, len(note), len(note), 4, 4)
    file = bytearray(text + len(code))
    for at, data in ((0, header + load + noted), (notes, note), (text, code)):
        file[at : at + len(data)] = data
    return bytes(file)
