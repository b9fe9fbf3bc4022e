"""A safetensors file: its header, checked against the file before anything is read through it, and rows of a tensor.

A header is trusted with nothing: its length, every offset and every shape must fit the file's size, so that a
truncated download is refused in one line instead of failing in the middle of packing. Rows are read, not mapped:
mapped pages count as this process's memory, and a checkpoint of 55 GB would look like 55 GB.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvm_sparse.errors import Refusal

MAX_HEADER = 100_000_000  # the limit of the safetensors library
_LENGTH = struct.Struct("<Q")
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as safetensors writes it, shape, bytes [begin, end) of the file."""

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
        first = _LENGTH.size + length
        entries = {name: _entry(path, name, fields, first) for name, fields in data.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "its header is not readable") from error
    _check_cover(path, entries, first, size)
    return entries


def read_rows(path: Path, name: str, entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a bfloat16, float16 or float32 tensor, in memory of their own. Refusal for other dtypes."""
    if entry.dtype not in _TORCH:
        raise Refusal(f"{path}: tensor {name} is {entry.dtype}: give an unquantised checkpoint ({', '.join(_TORCH)})")
    stop = min(stop, entry.shape[0])
    row = (entry.end - entry.begin) // entry.shape[0]
    raw = np.fromfile(path, np.uint8, (stop - start) * row, offset=entry.begin + start * row)
    if len(raw) != (stop - start) * row:
        raise _damaged(path, f"tensor {name} ends early")
    return torch.from_numpy(raw).view(_TORCH[entry.dtype]).view(stop - start, *entry.shape[1:])


def _entry(path: Path, name: str, fields: dict[str, Any], first: int) -> Entry:
    shape, (begin, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise _damaged(path, f"tensor {name} has shape {shape} at {begin}:{end}")
    wide = _SIZES.get(fields["dtype"])
    # sub-byte and newer dtypes are refused later by name, where the tensor is text at all
    if wide is not None and prod(shape) * wide != end - begin:
        raise _damaged(path, f"tensor {name} needs {prod(shape) * wide} bytes and has {end - begin}")
    return Entry(fields["dtype"], shape, first + begin, first + end)


def _check_cover(path: Path, entries: dict[str, Entry], first: int, size: int) -> None:
    """Tensors must follow each other without a gap or an overlap and end where the file ends."""
    at = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end < entry.begin:
            raise _damaged(path, f"tensor {name} starts at {entry.begin}, expected {at}")
        at = entry.end
    if at != size:
        raise _damaged(path, f"it is truncated or too long: {size} bytes, its header says {at}")


def _damaged(path: Path, why: str) -> Refusal:
    return Refusal(f"{path} is damaged, {why}: fetch it again")
