"""Writes the packed parameters of an artefact, one after the other, so that an interruption loses one at most.

While it works OUT holds finished params-*.safetensors, one params-*.safetensors.partial, and params.journal: a line
for every finished parameter and file. When work ends early the partial file is cut after its last finished parameter
and becomes an ordinary one; after a kill the next run does that. The same configuration (`fingerprint`) goes on from
there, another one starts anew. params.json is written when everything is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.artefact.reader import FACTS, INDEX, header_hash
from tvm_sparse.artefact.safetensors_stream import SafetensorsStream
from tvm_sparse.errors import Stopped

JOURNAL = "params.journal"
FILE_LIMIT = 4_000_000_000
FULL = (errno.ENOSPC, errno.EDQUOT)

BufferSpec = tuple[str, str, tuple[int, ...], Iterable[torch.Tensor]]
"""Name within the parameter, dtype, shape, and the values in pieces that follow each other."""


class ParamsWriter:
    """A context manager: inside it `write` parameters, at the end `finish`.

    `done` holds the facts of every finished parameter, those of an earlier run included. `expected` are the bytes
    all parameters will take, for the message about a full disk. Raises Stopped where the disk is full.
    """

    def __init__(self, folder: Path, fingerprint: str, expected: int = 0, file_limit: int = FILE_LIMIT) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.expected = expected
        self.file_limit = file_limit
        self.done: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._stream: SafetensorsStream | None = None

    def __enter__(self) -> ParamsWriter:
        with self._told_if_full():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            (self.folder / FACTS).unlink(missing_ok=True)  # until this build ends the folder is no artefact
            (self.folder / INDEX).unlink(missing_ok=True)
            self._write_journal()
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever ended the work, what is finished is kept and no temporary file stays."""
        with self._told_if_full():
            self._close_file()

    def write(self, name: str, facts: dict[str, Any], buffers: Sequence[BufferSpec], nbytes: int) -> dict[str, Any]:
        """Appends one parameter of about `nbytes`; returns its entry of params.json: `facts`, file, bytes, buffers.

        `facts` may be completed while the pieces are drawn: it is read when they are written.
        """
        names = [f"{name}.{part}" if part else name for part, *_ in buffers]
        with self._told_if_full():
            stream = self._file_for(names, nbytes)
            finished = len(stream.entries)
            try:
                entries = {
                    part: _write_buffer(stream, full, dtype, shape, pieces)
                    for full, (part, dtype, shape, pieces) in zip(names, buffers, strict=True)
                }
                total = sum(entry["bytes"] for entry in entries.values())
                self.done[name] = {**facts, "file": self._name(), "bytes": total, "buffers": entries}
                self._note({"param": name, "facts": self.done[name]})
            except BaseException:
                self.done.pop(name, None)
                stream.cut(finished)
                raise
        return self.done[name]

    def finish(self, order: Sequence[str]) -> None:
        """Writes params.json, parameters in this order, and removes what an earlier configuration left."""
        with self._told_if_full():
            self._close_file()
            params = {name: self.done[name] for name in order}
            used = {facts["file"] for facts in params.values()}
            files = {name: entry for name, entry in self.files.items() if name in used}
            write_json(self.folder / INDEX, {"fingerprint": self.fingerprint, "files": files, "params": params})
            (self.folder / JOURNAL).unlink()
        for path in self.folder.glob("params-*.safetensors*"):
            if path.name not in files:
                path.unlink()

    def _file_for(self, names: list[str], nbytes: int) -> SafetensorsStream:
        stream = self._stream
        if stream and stream.entries and (stream.size + nbytes > self.file_limit or not stream.has_room(names)):
            self._close_file()
        if self._stream is None:
            self._stream = SafetensorsStream(self.folder / (self._name() + ".partial"))
        return self._stream

    def _name(self) -> str:
        return f"params-{len(self.files) + 1:05}.safetensors"

    def _close_file(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if not stream.entries:
            stream.discard()
            return
        name = self._name()
        stream.close()
        entry = {"bytes": stream.size, "header_sha256": header_hash(stream.path)}
        stream.path.rename(self.folder / name)
        self.files[name] = entry
        self._note({"file": name, "entry": entry})

    def _recover(self) -> None:
        """Takes over what an earlier run of the same configuration finished; removes everything else."""
        params, files = _read_journal(self.folder, self.fingerprint)
        for name, entry in files.items():
            path = self.folder / name
            whole = path.is_file() and path.stat().st_size == entry["bytes"]
            if not whole or header_hash(path) != entry["header_sha256"]:
                break  # file names are numbered: a later one is taken over only behind an unbroken row
            self.files[name] = entry
        self.done = {name: facts for name, facts in params.items() if facts["file"] in self.files}
        partial = self.folder / (self._name() + ".partial")
        unfinished = {name: facts for name, facts in params.items() if facts["file"] == self._name()}
        # a kill can fall between the renaming of a file and its line in the journal
        renamed = self.folder / self._name()
        if unfinished and renamed.is_file() and not partial.exists():
            renamed.rename(partial)
        if unfinished and partial.is_file():
            whole_params = _whole(partial, unfinished)
            self._stream = SafetensorsStream.reopen(partial, _tensors(whole_params))
            self.done |= whole_params
        keep = {*self.files, partial.name if self._stream else ""}
        for path in self.folder.glob("params-*.safetensors*"):
            if path.name not in keep:
                path.unlink()

    def _write_journal(self) -> None:
        """The journal anew, without what was not taken over; then the partial file becomes an ordinary one."""
        lines: list[dict[str, Any]] = [{"fingerprint": self.fingerprint}]
        lines += [{"param": name, "facts": facts} for name, facts in self.done.items()]
        lines += [{"file": name, "entry": entry} for name, entry in self.files.items()]
        temporary = self.folder / (JOURNAL + ".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.folder / JOURNAL)
        self._close_file()

    def _note(self, line: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab", buffering=0) as journal:
            end = journal.tell()
            text = (json.dumps(line) + "\n").encode()
            try:
                if journal.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(journal.fileno())
            except OSError:
                journal.truncate(end)  # a line cut short would hide the ones after it
                raise

    @contextmanager
    def _told_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            written = sum(facts["bytes"] for facts in self.done.values())
            free = shutil.disk_usage(self.folder).free
            missing = max(self.expected - written - free, 0)
            much = f"about {missing / 1e9:.2f} GB more are" if missing else "more room is"
            raise Stopped(
                f"the disk of {self.folder} is full: {written / 1e9:.2f} GB in {len(self.done)} parameters are "
                f"finished and kept, {much} needed; make room and run the same command again"
            ) from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON under a temporary name and renames it when complete. Raises Stopped where the disk is full."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Stopped(f"the disk is full: no room for {path}; make room and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_buffer(
    stream: SafetensorsStream, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[torch.Tensor]
) -> dict[str, Any]:
    digest = hashlib.sha256()

    def hashed() -> Iterator[memoryview]:
        for piece in pieces:
            if str(piece.dtype) != f"torch.{dtype}":
                raise ValueError(f"{name}: a piece is {piece.dtype}, not {dtype}")
            view = piece.contiguous().view(-1).view(torch.uint8).cpu().numpy().data
            digest.update(view)
            yield view

    offset, size = stream.write(name, dtype, shape, hashed())
    return {"dtype": dtype, "shape": list(shape), "offset": offset, "bytes": size, "sha256": digest.hexdigest()}


def _read_journal(folder: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, files) of the journal, or of a finished params.json; empty for another configuration."""
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["fingerprint"] == fingerprint:
            return index["params"], index["files"]
    except (OSError, ValueError, KeyError):
        pass
    params: dict[str, Any] = {}
    files: dict[str, Any] = {}
    try:
        lines = (folder / JOURNAL).read_text().splitlines()
        if not lines or json.loads(lines[0]).get("fingerprint") != fingerprint:
            return {}, {}
        for line in map(json.loads, lines[1:]):
            if "param" in line:
                params[line["param"]] = line["facts"]
            else:
                files[line["file"]] = line["entry"]
    except (OSError, ValueError):
        pass  # no journal, or a last line cut short by a kill: what stands before it holds
    return params, files


def _whole(path: Path, params: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The leading parameters of an unfinished file whose bytes are all there."""
    found: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for name, facts in params.items():
            for entry in facts["buffers"].values():
                file.seek(entry["offset"])
                digest, left = hashlib.sha256(), entry["bytes"]
                while left and (piece := file.read(min(left, 1 << 24))):
                    digest.update(piece)
                    left -= len(piece)
                if digest.hexdigest() != entry["sha256"]:
                    return found
            found[name] = facts
    return found


def _tensors(params: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    for name, facts in params.items():
        for part, entry in facts["buffers"].items():
            full = f"{name}.{part}" if part else name
            yield full, entry["dtype"], tuple(entry["shape"]), entry["offset"], entry["bytes"]
