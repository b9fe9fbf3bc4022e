"""Opens an artefact: checks that it fits this runtime and is whole, then hands out its buffers without a copy.

Cheap at every start: versions, target, file sizes and the hash of each file's header. The hash of every buffer is
checked on demand, for it reads everything.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sparse.artefact.versions import installed
from tvm_sparse.errors import Refusal

FACTS = "tvm_sparse.json"
INDEX = "params.json"
LIBRARY = "lib.so"
ALIGNMENT = 64
NUMPY = {"float32": "float32", "bfloat16": "uint16", "int32": "int32", "uint16": "uint16", "uint32": "uint32"}
"""How numpy holds each dtype: it has no bfloat16, so the bits stand in a uint16."""


@dataclass(frozen=True)
class StoredBuffer:
    """One buffer of a file: `offset` is from the file's start, a multiple of 64."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str


class Artefact:
    """An opened folder. `facts` is tvm_sparse.json, `params` params.json's entry of each parameter."""

    def __init__(self, folder: Path, facts: dict[str, Any], index: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.params: dict[str, dict[str, Any]] = index["params"]
        self.files: dict[str, dict[str, Any]] = index["files"]
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    @cached_property
    def buffers(self) -> dict[str, StoredBuffer]:
        """Every buffer by its runtime name: the parameter's, or `parameter.buffer` for a packed one."""
        found = {}
        for name, param in self.params.items():
            for part, entry in param["buffers"].items():
                full = f"{name}.{part}" if part else name
                shape = tuple(entry["shape"])
                stored = (param["file"], entry["dtype"], shape, entry["offset"], entry["bytes"], entry["sha256"])
                found[full] = StoredBuffer(full, *stored)
        return found

    def array(self, name: str) -> np.ndarray:
        """A buffer as a read-only view of the mapped file, 64-byte aligned; bfloat16 as uint16 bits."""
        buffer = self.buffers[name]
        if buffer.file not in self._maps:
            with (self.folder / buffer.file).open("rb") as file:
                self._maps[buffer.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = np.dtype(NUMPY[buffer.dtype])
        count = buffer.nbytes // dtype.itemsize
        return np.frombuffer(self._maps[buffer.file], dtype, count, buffer.offset).reshape(buffer.shape)

    def verify(self) -> None:
        """Reads every buffer and compares its hash. Raises Refusal naming the first that differs."""
        for name, buffer in self.buffers.items():
            if hashlib.sha256(self.array(name).data).hexdigest() != buffer.sha256:
                raise Refusal(
                    f"{self.folder / buffer.file}: {name} is damaged (its hash differs): build or copy it again"
                )


def open_artefact(folder: str | Path, device: str | None = None, verify: bool = False) -> Artefact:
    """Opens OUT. `device` ("cpu" or "cuda", an index after a colon is ignored) must be what it was built for.

    Raises Refusal, in one line, for a folder that is no artefact, has no weights, was written by another version or
    for another device, or whose files are missing, cut or changed.
    """
    folder = Path(folder)
    facts = read_facts(folder, device)
    index = _json(folder / INDEX, f"{folder} has no weights ({INDEX} is missing): run its build again with --weights")
    if "params" not in index or "files" not in index:
        raise Refusal(f"{folder / INDEX} is damaged: build or copy it again")
    for name, entry in index["files"].items():
        _check_file(folder / name, entry)
    artefact = Artefact(folder, facts, index)
    missing = [name for name in facts.get("params", ()) if name not in artefact.buffers]
    if missing:
        raise Refusal(f"{folder / INDEX} does not hold {missing[0]}, which the library reads: build or copy it again")
    if verify:
        artefact.verify()
    return artefact


def read_facts(folder: str | Path, device: str | None = None) -> dict[str, Any]:
    """tvm_sparse.json of OUT, with or without weights. Raises Refusal as `open_artefact` does."""
    folder = Path(folder)
    facts = _json(folder / FACTS, f"{folder} is not an artefact (no {FACTS}): give the folder that build wrote")
    _check_versions(folder, facts)
    built = facts.get("device")
    if device is not None and device.split(":")[0] != built:
        raise Refusal(f"{folder} was built for {built}, not for {device.split(':')[0]}: build it with another --target")
    return facts


def header_hash(path: Path) -> str:
    """SHA-256 of a safetensors file's header, its length included."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(int.from_bytes(prefix, "little"))).hexdigest()


def _check_versions(folder: Path, facts: dict[str, Any]) -> None:
    theirs, ours = facts.get("versions", {}), installed()
    if theirs.get("artefact") != ours["artefact"]:
        raise Refusal(
            f"{folder} has artefact version {theirs.get('artefact')}, this tvm_sparse reads {ours['artefact']}: "
            f"build it again, or use tvm_sparse {theirs.get('tvm_sparse')}"
        )
    if ours["tvm"] is not None and theirs.get("tvm") != ours["tvm"]:
        raise Refusal(
            f"{folder} was compiled by TVM {theirs.get('tvm')}, installed is {ours['tvm']}: "
            f"build it again, or pip install apache-tvm=={theirs.get('tvm')}"
        )


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise Refusal(f"{path} is missing: build or copy it again")
    if path.stat().st_size != entry["bytes"]:
        raise Refusal(f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}: build or copy it again")
    if header_hash(path) != entry["header_sha256"]:
        raise Refusal(f"{path} has another header than {INDEX} says: build or copy it again")


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    if not path.is_file():
        raise Refusal(otherwise)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refusal(f"{path} is damaged: build or copy it again")
    return found
