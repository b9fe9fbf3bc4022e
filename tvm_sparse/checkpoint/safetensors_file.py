"""The header of a safetensors file, checked against the file before anything is read through it.

A header is trusted with nothing: its length, every offset and every shape must fit the file's size, so that a
truncated download is refused in one line instead of failing in the middle of packing.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tvm_sparse.errors import Refusal

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_LENGTH = struct.Struct("<Q")
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as safetensors writes it, shape, bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file. Raises Refusal for a missing, truncated or damaged file, naming it."""
    if not path.is_file():
        raise Refusal(f"{path} is missing: fetch the whole checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise _damaged(path, f"it has only {size} bytes")
        (length,) = _LENGTH.unpack(prefix)
        if length > min(MAX_HEADER, size - _LENGTH.size):
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        text = file.read(length)
    try:
        data = json.loads(text)
        data.pop("__metadata__", None)
        entries = {name: _entry(path, name, fields) for name, fields in data.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "its header is not readable") from error
    _check_cover(path, entries, size - _LENGTH.size - length)
    return entries


def _entry(path: Path, name: str, fields: dict[str, Any]) -> Entry:
    shape, (begin, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise _damaged(path, f"tensor {name} has shape {shape} at {begin}:{end}")
    wide = _SIZES.get(fields["dtype"])
    # sub-byte and newer dtypes are refused later by name, where the tensor is text at all
    if wide is not None and prod(shape) * wide != end - begin:
        raise _damaged(path, f"tensor {name} needs {prod(shape) * wide} bytes and has {end - begin}")
    return Entry(fields["dtype"], shape, begin, end)


def _check_cover(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Tensors must follow each other without a gap or an overlap and end where the file ends."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end < entry.begin:
            raise _damaged(path, f"tensor {name} starts at {entry.begin}, expected {at}")
        at = entry.end
    if at != size:
        raise _damaged(path, f"it is truncated or too long: {size} bytes of data, its header says {at}")


def _damaged(path: Path, why: str) -> Refusal:
    return Refusal(f"{path} is damaged, {why}: fetch it again")
