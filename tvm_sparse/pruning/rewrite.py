"""The same checkpoint with other values: every file copied byte for byte, then matrices overwritten where they stand.

The work goes on in OUT.partial, which becomes OUT by one rename when everything is there. Its prune.journal has a
line for whatever is finished: an interrupted run of the same settings (`fingerprint`) goes on behind it. A matrix
is read from the model until its line stands, so a half-written one is simply written again. A finetune.state beside
it is the state of fine-tuning under way.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tvm_sparse.checkpoint.folder import FolderCheckpoint, shard_names
from tvm_sparse.checkpoint.names import split_name
from tvm_sparse.checkpoint.safetensors_file import Entry, read_header
from tvm_sparse.errors import Refusal, Stopped

SUMMARY = "sparsity.json"
JOURNAL = "prune.journal"
STATE = "finetune.state"
_COPYING = ".copying"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # the same model, not pruned
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class CheckpointCopy:
    """A context manager: inside it `write` matrices, at the end `finish`.

    `done` has the facts of every finished matrix, `notes` what else was noted, both of an earlier run too. Raises
    Refusal where OUT cannot be written, before any work, and Stopped where the disk is full.
    """

    def __init__(self, model: FolderCheckpoint, out: Path, fingerprint: str, room: int = 0) -> None:
        """`room`: bytes that will be needed beside the checkpoint's own."""
        self.model = model
        self.out = out
        self.folder = out.resolve().parent / f"{out.resolve().name}.partial"
        self.done: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._fingerprint = fingerprint
        self._room = room
        self._places = _places(model.folder)
        self._files, self.left_behind = _files(model.folder)
        self._check()

    def __enter__(self) -> CheckpointCopy:
        with _told_if_full():
            if not self._recover():
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                self._append({"fingerprint": self._fingerprint})
            for name in self._files:
                _copy(self.model.folder / name, self.folder / name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is finished is kept, but for a refusal: the same settings would be refused again."""
        if kind and issubclass(kind, Refusal):
            shutil.rmtree(self.folder, ignore_errors=True)

    def pruned(self) -> FolderCheckpoint:
        """The copy as a checkpoint: finished matrices pruned, the others as they were."""
        return FolderCheckpoint(self.folder, self.model.config)

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A matrix as the file will hold it: bfloat16 where all its values were, in the stored dtype."""
        if self.model.exact_bf16(name):
            weight = weight.bfloat16()
        return weight.to("cpu", _DTYPES[self._places[name][1].dtype])

    def write(self, matrices: Mapping[str, Iterable[torch.Tensor]], facts: Mapping[str, dict[str, Any]]) -> None:
        """Overwrites matrices, given in row blocks, and notes them as finished, all together.

        `facts` are read when the blocks have been written.
        """
        with _told_if_full():
            for name, blocks in matrices.items():
                self._overwrite(name, blocks)
            finished = {name: dict(facts[name]) for name in matrices}
            self._append({"matrices": finished})
        self.done.update(finished)

    def note(self, key: str, value: Any) -> None:
        with _told_if_full():
            self._append({"note": [key, value]})
        self.notes[key] = value

    @property
    def state(self) -> Path:
        """Where `save_state` puts a safetensors file; it is there once there was one."""
        return self.folder / STATE

    def save_state(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Work under way, in the place of what was saved before: the file is whole or not there."""
        saving = self.state.with_name(STATE + _COPYING)
        try:
            with _told_if_full():
                save_file(tensors, saving, {"facts": json.dumps(facts)})
                saving.rename(self.state)
        finally:
            saving.unlink(missing_ok=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes sparsity.json and makes the folder OUT."""
        with _told_if_full():
            _write_durably(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        self.state.unlink(missing_ok=True)
        (self.folder / JOURNAL).unlink()
        self.folder.rename(self.out)  # an empty OUT gives way

    def _check(self) -> None:
        model, out = self.model.folder.resolve(), self.out.resolve()
        if out == model or model in out.parents:
            raise Refusal(f"--out {self.out} is the model itself, or inside it: give another folder")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Refusal(f"--out {self.out} exists already: give a new folder, or remove it first")
        if self.folder.exists() and not (self.folder / JOURNAL).is_file():
            raise Refusal(f"{self.folder} is in the way and not of an earlier run: remove it, or give another --out")
        parent = next(folder for folder in (out, *out.parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise Refusal(f"--out {self.out} cannot be made: {parent} is no folder to write to")
        missing = [name for name in self._files if not (self.folder / name).exists()]
        need = sum((self.model.folder / name).stat().st_size for name in missing) + self._room
        free = shutil.disk_usage(parent).free
        if need > free:
            raise Refusal(f"--out {self.out} needs {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f}: make room, or "
                          "give a folder on another disk")  # fmt: skip

    def _recover(self) -> bool:
        """Takes over the journal of an earlier run with the same fingerprint; a torn last line counts as none."""
        path = self.folder / JOURNAL
        if not path.is_file():
            return False
        whole, _, torn = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            return False
        if not lines or lines[0].get("fingerprint") != self._fingerprint:
            return False
        if torn:
            os.truncate(path, len(whole.encode()) + 1)
        for line in lines[1:]:
            self.done.update(line.get("matrices", {}))
            if "note" in line:
                key, value = line["note"]
                self.notes[key] = value
        return True

    def _overwrite(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        file_name, entry = self._places[name]
        with (self.folder / file_name).open("r+b") as file:
            file.seek(entry.begin)
            for block in blocks:
                stored = block.to("cpu", _DTYPES[entry.dtype]).contiguous()
                file.write(stored.view(torch.uint8).numpy().data)
            if file.tell() != entry.end:
                raise ValueError(f"{name}: {file.tell() - entry.begin} bytes for {entry.end - entry.begin}")
            file.flush()
            os.fsync(file.fileno())

    def _append(self, line: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _places(folder: Path) -> dict[str, tuple[str, Entry]]:
    """Where every text tensor stands: short name -> (shard, entry)."""
    return {
        short: (shard, entry)
        for shard in shard_names(folder) or ()
        for full, entry in read_header(folder / shard).items()
        for part, short in [split_name(full)]
        if part == "text"
    }


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """What belongs to the checkpoint; and weights beside it of the model as it was, which stay behind."""
    shards = set(shard_names(folder) or ())
    found: list[str] = []
    left: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or str(name) == SUMMARY:
            continue
        other = path.suffix == ".safetensors" and str(name) not in shards and _holds_text(path)
        (left if other or path.suffix in _OTHER_WEIGHTS else found).append(str(name))
    return found, left


def _holds_text(path: Path) -> bool:
    return any(split_name(full)[0] == "text" for full in read_header(path))


def _copy(source: Path, target: Path) -> None:
    """A file has its name only when it is whole."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    copying = target.with_name(target.name + _COPYING)
    try:
        shutil.copyfile(source, copying)
        copying.rename(target)
    finally:
        copying.unlink(missing_ok=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _told_if_full() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno in _FULL if isinstance(error, OSError) else os.strerror(errno.ENOSPC) in str(error)
        if not full:
            raise
        raise Stopped("the disk is full: what is finished is kept; make room and run the same command again") from error
