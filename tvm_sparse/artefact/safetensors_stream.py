"""A safetensors file written front to back: space for the header first, every tensor 64-byte aligned, header last.

The format allows no holes between tensors, so the bytes up to the next multiple of 64 are tensors too, named
`_pad.N`; and it allows spaces at the header's end, which is what keeps its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path

from tvm_sparse.artefact.reader import ALIGNMENT

HEADER = 1 << 18
DTYPES = {"bfloat16": "BF16", "float32": "F32", "int32": "I32", "uint16": "U16", "uint32": "U32"}
_SIZES = {"bfloat16": 2, "float32": 4, "int32": 4, "uint16": 2, "uint32": 4}


class SafetensorsStream:
    """`entries` are (name, safetensors dtype, shape, begin, end), begin and end counted after the header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[tuple[str, str, tuple[int, ...], int, int]] = []
        self._at = 0
        self._file = path.open("w+b", buffering=0)  # unbuffered: a full disk is noticed where it happens
        try:
            self._append(memoryview(b" " * HEADER))
        except OSError:
            self.discard()
            raise

    @staticmethod
    def reopen(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], int, int]]) -> SafetensorsStream:
        """A file left unfinished, cut after the given (name, dtype, shape, offset, bytes)."""
        stream = SafetensorsStream.__new__(SafetensorsStream)
        stream.path, stream.entries, stream._at = path, [], 0
        stream._file = path.open("r+b", buffering=0)
        for name, dtype, shape, _, size in tensors:
            stream._enter(name, dtype, shape, size)
        stream.cut(len(stream.entries))
        return stream

    @property
    def size(self) -> int:
        return HEADER + self._at

    def has_room(self, names: Iterable[str]) -> bool:
        """Whether the header can take more tensors of these names, and their padding."""
        return len(_header(self.entries)) + sum(len(name) + 240 for name in names) < HEADER - 8

    def write(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview]) -> tuple[int, int]:
        """Appends a tensor given piece by piece; its offset in the file and its bytes."""
        offset = HEADER + self._at
        size = 0
        for piece in pieces:
            self._append(piece)
            size += piece.nbytes
        if size != prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{name}: {size} bytes do not make {dtype} {list(shape)}")
        self._append(memoryview(bytes(-size % ALIGNMENT)))
        self._enter(name, dtype, shape, size)
        return offset, size

    def cut(self, entries: int) -> None:
        """Forgets all but the first entries, and their bytes."""
        del self.entries[entries:]
        self._at = self.entries[-1][4] if self.entries else 0
        self._file.truncate(self.size)
        self._file.seek(self.size)

    def close(self) -> None:
        """Fills the header and makes the file durable."""
        header = _header(self.entries)
        self._file.seek(0)
        self._append(memoryview((HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8)))
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _append(self, piece: memoryview) -> None:
        piece = piece.cast("B")
        while piece.nbytes:
            piece = piece[self._file.write(piece) :]

    def _enter(self, name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        self.entries.append((name, DTYPES[dtype], shape, self._at, self._at + size))
        self._at += size
        if padding := -size % ALIGNMENT:
            self.entries.append((f"_pad.{len(self.entries)}", "U8", (padding,), self._at, self._at + padding))
            self._at += padding


def _header(entries: list[tuple[str, str, tuple[int, ...], int, int]]) -> bytes:
    table = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        for name, dtype, shape, begin, end in entries
    }
    return json.dumps(table, separators=(",", ":")).encode()
