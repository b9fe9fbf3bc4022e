"""What a checkpoint is to the rest of the compiler: tensors by short name, read by rows, never all at once."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.checkpoint.whole import Stored
from tvm_sparse.errors import Stopped
from tvm_sparse.models.config import ModelConfig, TensorSpec, tensors

READ_ROWS = 1024  # rows of a matrix held at a time: 36 MB of bf16 in the widest matrix of the 27B


class WeightsUnavailable(Stopped):
    """No weights can be had here; the message says both ways on."""


class Checkpoint(ABC):
    """Text tensors by short name (`layers.0.mlp.gate_proj.weight`), checked by name, shape and dtype when opened.

    `origin` is what a report says of where the weights came from; `dropped` counts the tensors of other parts of
    the model, left out.
    """

    def __init__(self, config: ModelConfig, origin: dict[str, Any], dropped: dict[str, int]) -> None:
        self.config = config
        self.origin = origin
        self.dropped = dropped
        self._specs = tensors(config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor: bfloat16 where every value of the tensor is one, else float32."""

    @abstractmethod
    def exact_bf16(self, name: str) -> bool:
        """Whether every value of a tensor is exactly a bfloat16 (reads it where the stored dtype does not say)."""

    def tensor(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, self._specs[name].shape[0])

    def blocks(self, name: str, rows: int = READ_ROWS) -> Iterator[torch.Tensor]:
        """A tensor in row blocks, in order."""
        count = self._specs[name].shape[0]
        for start in range(0, count, rows):
            yield self.rows(name, start, min(start + rows, count))

    @abstractmethod
    def stored(self) -> tuple[Stored, ...]:
        """Every tensor of the checkpoint by its name there, the MTP layer and the vision tower included.

        A folder's are those of its files, already checked against their sizes; a tied copy of the head is none.
        """

    @abstractmethod
    def stored_rows(self, tensor: Stored, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one of `stored()`, in its own dtype. Raises Refusal where that is no float to read."""

    def side_files(self) -> dict[str, Path]:
        """Tokenizer, chat template and generation config, where present: file name -> path."""
        return {}

    def fingerprint(self) -> str:
        """A hash that changes with the weights, without reading them: what resuming unfinished work goes by."""
        facts = [self.config.to_json(), self._identity()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _identity(self) -> Any:
        """What tells these weights from others of the same configuration; JSON."""
        return self.origin

    def dropped_line(self) -> str:
        """One line for the user about tensors left out; empty where nothing was."""
        if not self.dropped:
            return ""
        return "left out: " + ", ".join(f"{count} {part} tensors" for part, count in self.dropped.items())
