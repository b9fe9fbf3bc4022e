"""A checkpoint in which one layer has the mean of several layers' weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tvm_sparse.checkpoint import Checkpoint, Stored


class AveragedCheckpoint(Checkpoint):
    """`ties` are layers of one kind; the first of each has the mean of all, computed in float64, rounded once.

    The mean is bfloat16 where all the layers' tensors are, as a checkpoint would store it.
    """

    def __init__(self, checkpoint: Checkpoint, ties: Iterable[Sequence[int]]) -> None:
        super().__init__(checkpoint.config, checkpoint.origin, checkpoint.dropped)
        self._checkpoint = checkpoint
        self._ties = {layers[0]: tuple(layers) for layers in ties}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        names = self._averaged(name)
        if len(names) == 1:
            return self._checkpoint.rows(name, start, stop)
        total = sum(self._checkpoint.rows(each, start, stop).double() for each in names)
        assert isinstance(total, torch.Tensor)
        return (total / len(names)).to(torch.bfloat16 if self.exact_bf16(name) else torch.float32)

    def exact_bf16(self, name: str) -> bool:
        return all(self._checkpoint.exact_bf16(each) for each in self._averaged(name))

    def stored(self) -> tuple[Stored, ...]:
        return self._checkpoint.stored()

    def stored_rows(self, tensor: Stored, start: int, stop: int) -> torch.Tensor:
        return self._checkpoint.stored_rows(tensor, start, stop)

    def side_files(self) -> dict[str, Path]:
        return self._checkpoint.side_files()

    def _identity(self) -> Any:
        return [self._checkpoint.fingerprint(), sorted(self._ties.items())]

    def _averaged(self, name: str) -> tuple[str, ...]:
        head, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        layers = self._ties.get(int(layer)) if head == "layers" else None
        return (name,) if layers is None else tuple(f"layers.{each}.{part}" for each in layers)
