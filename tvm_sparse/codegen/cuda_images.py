"""Reads which kernels a compiled library holds as machine code, without NVIDIA's tools.

nvcc packs its outputs into a "fatbin": a header, then entries of kind ELF (machine code) or PTX (text that a driver
would still have to compile). TVM stores one such fatbin for each CUDA module inside the library's data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

FATBIN_MAGIC = b"\x50\xed\x55\xba"
KIND_PTX, KIND_ELF = 1, 2
ARCH_SPECIFIC = 1 << 20  # entry flag: sm_90a rather than sm_90
ELF_MAGIC, EM_CUDA, KERNEL_ENTRY = b"\x7fELF", 190, 0x10


def images(path: str | Path) -> dict[str, list[str]]:
    """{"sm_100a": sorted kernel names} of the machine code in a library or fatbin.

    PTX stands under its own key, such as "ptx_100a", with no names: such code is compiled at load. Kernels that the
    library holds as source text only do not appear.
    """
    found: dict[str, set[str]] = {}
    for kind, arch, payload in _entries(Path(path).read_bytes()):
        names = _kernels(payload) if kind == KIND_ELF else []
        found.setdefault(("sm_" if kind == KIND_ELF else "ptx_") + arch, set()).update(names)
    return {arch: sorted(names) for arch, names in sorted(found.items())}


def _entries(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    at = data.find(FATBIN_MAGIC)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        if version == 1 and header == 16 and at + header + size <= len(data):
            yield from _entries_of_one(data[at + header : at + header + size])
        at = data.find(FATBIN_MAGIC, at + 4)


def _entries_of_one(body: bytes) -> Iterator[tuple[int, str, bytes]]:
    at = 0
    while at + 48 <= len(body):
        kind, _, header, size = struct.unpack_from("<HHIQ", body, at)
        number, flags = struct.unpack_from("<I8xQ", body, at + 28)
        payload = body[at + header : at + header + size]
        if kind == KIND_ELF and not payload.startswith(ELF_MAGIC):
            raise ValueError("a compressed image: build with --compress-mode=none")
        yield kind, f"{number}{'a' if flags & ARCH_SPECIFIC else ''}", payload
        at += header + size


def _kernels(elf: bytes) -> list[str]:
    """Names of the entry points of a 64-bit CUDA ELF, from its symbol table."""
    machine = struct.unpack_from("<H", elf, 18)[0]
    table, entry_size, count = struct.unpack_from("<Q10xHH", elf, 40)
    if machine != EM_CUDA or entry_size != 64:
        return []
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i) for i in range(count)]
    names = []
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        strings = sections[link][4]
        for symbol in range(offset, offset + size, 24):
            name, info, other = struct.unpack_from("<IBB", elf, symbol)
            if info & 0xF == 2 and other & KERNEL_ENTRY:  # STT_FUNC
                start = strings + name
                names.append(elf[start : elf.index(b"\0", start)].decode())
    return names
