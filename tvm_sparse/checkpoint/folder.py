"""A checkpoint folder: safetensors shards through their index, checked whole before the first tensor is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.checkpoint.base import READ_ROWS, Checkpoint
from tvm_sparse.checkpoint.names import split_name
from tvm_sparse.checkpoint.safetensors_file import Entry, read_header, read_rows
from tvm_sparse.checkpoint.whole import Stored
from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import ModelConfig, TensorSpec, tensors, token_ids

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

Place = tuple[Path, str, Entry]  # file, full name, where in it


class FolderCheckpoint(Checkpoint):
    """Lazy: rows are read from their shard when asked for."""

    def __init__(self, folder: Path, config: ModelConfig | None, origin: dict[str, Any] | None = None) -> None:
        self.folder = folder
        found = folder_config(folder, config)
        text, others = _split_tensors(folder)
        dropped = dict(sorted(Counter(part for part, _ in others.values()).items()))
        _check_tensors(folder, text, tensors(found), dropped, found.tie_word_embeddings)
        super().__init__(found, origin or {"kind": "folder", "path": str(folder.resolve())}, dropped)
        self._text = text
        self._others = others
        self._exact: dict[str, bool] = {}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        block = self._stored(name, start, stop)
        if block.dtype == torch.bfloat16:
            return block
        return block.bfloat16() if self.exact_bf16(name) else block.float()

    def exact_bf16(self, name: str) -> bool:
        if self._text[name][2].dtype == "BF16":
            return True
        if name not in self._exact:
            count = self.spec(name).shape[0]
            self._exact[name] = all(
                _is_bf16(self._stored(name, start, min(start + READ_ROWS, count)))
                for start in range(0, count, READ_ROWS)
            )
        return self._exact[name]

    def stored(self) -> tuple[Stored, ...]:
        places = [("text", self._text[name]) for name in self.names()] + list(self._others.values())
        return tuple(
            Stored(full, part, split_name(full)[1], entry.shape, entry.dtype) for part, (_, full, entry) in places
        )

    def stored_rows(self, tensor: Stored, start: int, stop: int) -> torch.Tensor:
        path, full, entry = self._text[tensor.short] if tensor.part == "text" else self._others[tensor.name][1]
        return read_rows(path, full, entry, start, stop)

    def side_files(self) -> dict[str, Path]:
        return {name: self.folder / name for name in SIDE_FILES if (self.folder / name).is_file()}

    def _stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        path, full, entry = self._text[name]
        return read_rows(path, full, entry, start, stop)

    def _identity(self) -> Any:
        shards = sorted({path for path, _, _ in self._text.values()})
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards]


def folder_config(folder: Path, expected: ModelConfig | None = None) -> ModelConfig:
    """The folder's configuration, end ids of its generation_config.json joined in.

    `expected` (of a registered name) must agree with config.json where both are there. Raises Refusal.
    """
    path = folder / "config.json"
    if path.is_file():
        try:
            config = ModelConfig.from_json(read_json(path))
        except Refusal as refusal:
            raise Refusal(f"{path}: {str(refusal).removeprefix('config: ')}") from None
    elif expected is not None:
        config = expected
    else:
        raise Refusal(f"{path} is missing: give the model's folder, or a registered --model and this as --weights")
    for field in fields(ModelConfig) if expected else ():
        ours, theirs = getattr(expected, field.name), getattr(config, field.name)
        if ours != theirs and field.name not in ("eos_token_ids", "max_position_embeddings"):
            raise Refusal(f"{path}: {field.name} is {theirs}, --model says {ours}: give weights of the same model")
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = token_ids(list(config.eos_token_ids), read_json(generation).get("eos_token_id"))
        config = replace(config, eos_token_ids=ends)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; Refusal where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise Refusal(f"{path} is not readable as JSON ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise Refusal(f"{path} is not a JSON object: fetch it again")
    return data


def shard_names(folder: Path) -> tuple[str, ...] | None:
    """The files that hold the weights, by the index or by the single file; None where there are neither."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refusal(f"{folder / INDEX} has no weight_map: fetch it again")
        names = tuple(dict.fromkeys(weight_map.values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise Refusal(f"{folder / INDEX} names a shard outside its folder: {name!r}")
        return names
    return (SINGLE,) if (folder / SINGLE).is_file() else None


def _split_tensors(folder: Path) -> tuple[dict[str, Place], dict[str, tuple[str, Place]]]:
    """Every text tensor by short name; every other tensor by full name, with its part."""
    shards = shard_names(folder)
    if shards is None:
        raise Refusal(f"{folder} has no {INDEX} and no {SINGLE}: only safetensors checkpoints are read")
    text: dict[str, Place] = {}
    others: dict[str, tuple[str, Place]] = {}
    held: set[str] = set()
    for shard in shards:
        for full, entry in read_header(folder / shard).items():
            held.add(full)
            part, short = split_name(full)
            if part != "text":
                others[full] = (part, (folder / shard, full, entry))
            elif short in text:
                raise Refusal(f"{folder}: tensor {short} is there twice, as {text[short][1]} and {full}")
            else:
                text[short] = (folder / shard, full, entry)
    if (folder / INDEX).is_file():
        for full, shard in read_json(folder / INDEX)["weight_map"].items():
            if full not in held:
                raise Refusal(f"{folder / shard} does not hold {full}, which {INDEX} promises: fetch it again")
    return text, others


def _check_tensors(
    folder: Path,
    text: dict[str, Place],
    expected: dict[str, TensorSpec],
    dropped: dict[str, int],
    tied: bool,
) -> None:
    if tied and "lm_head.weight" in text:
        del text["lm_head.weight"]  # some writers keep the copy
        dropped["tied lm_head"] = 1
    missing = [name for name in expected if name not in text]
    if missing:
        raise Refusal(f"{folder}: tensor {missing[0]}{_more(missing)} is missing: fetch the whole checkpoint again")
    unknown = [full for short, (_, full, _) in text.items() if short not in expected]
    if unknown:
        raise Refusal(f"{folder}: tensor {unknown[0]}{_more(unknown)} is not part of a Qwen3.5 text model")
    for name, spec in expected.items():
        entry = text[name][2]
        if entry.shape != spec.shape:
            raise Refusal(
                f"{folder}: tensor {name} has shape {list(entry.shape)}, the configuration says {list(spec.shape)}"
            )
        if entry.dtype not in spec.dtypes:
            raise Refusal(
                f"{folder}: tensor {name} is {entry.dtype}: give an unquantised checkpoint ({', '.join(spec.dtypes)})"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _is_bf16(block: torch.Tensor) -> bool:
    """Whether the lower half of every value's float32 is zero."""
    bits = block.float().contiguous().view(torch.int32)
    return not bool((bits & 0xFFFF).any())
