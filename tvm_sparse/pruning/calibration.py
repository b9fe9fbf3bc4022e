"""Text to calibrate or fine-tune on: a file, or one of a data set on the hub, cut into sequences of equal length."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tvm_sparse.checkpoint.hub import is_hub_id
from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import ModelConfig

_CHARACTERS = 16  # of text read for a token that is wanted: a token has about four
_MOST_CHARACTERS = 1 << 28  # read where all of a text is wanted
_JSON = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Calibration:
    """Sequences [samples, length] of token ids, and what a report says of them."""

    ids: torch.Tensor
    text: str
    sha256: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["ids"]
        return facts | {"samples": self.ids.shape[0], "length": self.ids.shape[1]}


def calibration(text: str, folder: Path, config: ModelConfig, samples: int, length: int, seed: int) -> Calibration:
    """`samples` of the text's consecutive windows of `length` tokens, drawn with the seed, none twice.

    Raises Refusal where there is no such text, it is too short, or a sequence would not fit the model.
    """
    path, tokens, windows = _cut("--text", text, folder, config, length, samples * length * _CHARACTERS, seed)
    if len(windows) < samples:
        raise Refusal(f"--text {text} has {tokens} tokens, that is {len(windows)} sequences of {length} and not "
                      f"{samples}: give more text, or --samples {len(windows)}")  # fmt: skip
    chosen = sorted(random.Random(seed).sample(range(len(windows)), samples))
    return Calibration(windows[chosen], text, _sha256(path), seed)


def all_windows(flag: str, text: str, folder: Path, config: ModelConfig, length: int, seed: int) -> Calibration:
    """All consecutive windows of `length` tokens of a text that came by `flag`. Raises Refusal as `calibration`."""
    path, _, windows = _cut(flag, text, folder, config, length, _MOST_CHARACTERS, seed)
    return Calibration(windows, text, _sha256(path), seed)


def _cut(
    flag: str, text: str, folder: Path, config: ModelConfig, length: int, characters: int, seed: int
) -> tuple[Path, int, torch.Tensor]:
    """The file, how many tokens were read of it, and its windows [count, length], at least one."""
    limit = config.max_position_embeddings
    if length > limit:
        raise Refusal(f"--length {length} is over the model's {limit} positions: ask for at most {limit}")
    path = _locate(text)
    ids = _tokenize(folder, _read(path, characters, random.Random(seed)), config)
    if len(ids) < length:
        raise Refusal(f"{flag} {text} has {len(ids)} tokens, not one sequence of {length}: give more text or "
                      f"--length {max(len(ids) // 2, 1)}")  # fmt: skip
    return path, len(ids), ids[: len(ids) // length * length].view(-1, length)


def _locate(text: str) -> Path:
    """A file here, or OWNER/DATASET/FILE on the hub."""
    path = Path(text)
    if path.is_file():
        return path
    owner, name, file = (*text.split("/", 2), "", "")[:3]
    if path.is_dir() or not is_hub_id(f"{owner}/{name}"):
        raise Refusal(f"no calibration text {text}: give a text file, or OWNER/DATASET/FILE of a data set on the hub")
    if not file:
        raise Refusal(f"no calibration text {text}: name a file of that data set too, {text}/FILE, or a file here")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:
        raise Refusal(f"no calibration text {text}: no file here, and the hub does not give it "
                      f"({type(error).__name__}): give a text file") from error  # fmt: skip


def _read(path: Path, limit: int, source: random.Random) -> str:
    """About `limit` characters: the first documents of JSON lines, a random stretch of a plain text."""
    try:
        with _open(path) as file:
            if path.name.removesuffix(".gz").endswith(_JSON):
                return "\n\n".join(_documents(path, file, limit))
            text = file.read()
    except (OSError, EOFError) as error:
        raise Refusal(f"cannot read calibration text {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"calibration text {path} is not UTF-8 (byte {error.start}): convert it first") from error
    if len(text) <= limit:
        return text
    start = source.randrange(len(text) - limit)
    return text[start : start + limit]


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _documents(path: Path, file: IO[str], limit: int) -> Iterator[str]:
    taken = 0
    for number, line in enumerate(file, 1):
        try:
            document = json.loads(line)["text"]
            taken += len(document)
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"calibration text {path}, line {number}: not a JSON object with a text in it") from error
        yield document
        if taken >= limit:
            return


def _tokenize(folder: Path, text: str, config: ModelConfig) -> torch.Tensor:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Refusal(f"{folder} has no tokenizer.json: calibration on a text needs one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise Refusal(f"{path} is not a tokenizer: fetch it again") from error
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    if len(ids) and int(ids.max()) >= config.vocab_size:
        raise Refusal(f"{path} makes token {int(ids.max())}, the model has {config.vocab_size}: give its own tokenizer")
    return ids


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
