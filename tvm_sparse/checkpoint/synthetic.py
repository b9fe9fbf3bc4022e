"""Synthetic weights: seeded normal values, for benchmarks and builds without a download.

The standard deviations reproduce the share of small weights measured on the 27B, component by component. Every
256 rows of every tensor have their own seed, so any block of rows can be drawn alone and always comes out the same.
"""

from __future__ import annotations

from hashlib import blake2b

import torch

from tvm_sparse.checkpoint.base import Checkpoint
from tvm_sparse.checkpoint.whole import Stored, VisionTower, stored_tensors, text_dtype
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.threads import on_all_cores

ROWS = 256
_STD = {
    "down_proj": 0.0109,
    "gate_proj": 0.01115,
    "up_proj": 0.01115,
    "q_proj": 0.0144,
    "k_proj": 0.0138,
    "v_proj": 0.0173,
    "o_proj": 0.0155,
    "conv1d": 0.29,  # of its initialisation, uniform within 1 / sqrt(4): smaller ones silence the layer
}
_OTHER = 0.0152


class SyntheticCheckpoint(Checkpoint):
    """`tower` gives a model the vision tower that its size does not tell; only `stored()` lists it."""

    def __init__(self, config: ModelConfig, seed: int = 0, tower: VisionTower | None = None) -> None:
        super().__init__(config, {"kind": "synthetic", "seed": seed}, {})
        self.seed = seed
        self._stored = stored_tensors(config, tower)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._rows(name, self.spec(name).shape, text_dtype(name), start, stop)

    def stored(self) -> tuple[Stored, ...]:
        return self._stored

    def stored_rows(self, tensor: Stored, start: int, stop: int) -> torch.Tensor:
        name = tensor.short if tensor.part == "text" else tensor.name
        return self._rows(name, tensor.shape, tensor.dtype, start, stop)

    def _rows(self, name: str, shape: tuple[int, ...], stored: str, start: int, stop: int) -> torch.Tensor:
        count, *rest = shape
        stop = min(stop, count)
        dtype = torch.float32 if stored == "F32" else torch.bfloat16
        out = torch.empty((max(stop - start, 0), *rest), dtype=dtype)

        def draw(block: int) -> None:
            first = block * ROWS
            drawn = self._draw(name, block, (min(ROWS, count - first), *rest))
            low, high = max(start, first), min(stop, first + ROWS)
            out[low - start : high - start] = drawn[low - first : high - first]

        on_all_cores(draw, range(start // ROWS, -(-stop // ROWS)))
        return out

    def exact_bf16(self, name: str) -> bool:
        return text_dtype(name) == "BF16"

    def _draw(self, name: str, block: int, shape: tuple[int, ...]) -> torch.Tensor:
        digest = blake2b(f"{self.seed}/{name}/{block}".encode(), digest_size=8).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        component = name.removesuffix(".weight").rpartition(".")[2]
        if component == "A_log":  # as the model is initialised: decay between 0.01 and 16
            return torch.empty(shape).uniform_(0.01, 16, generator=source).log_()
        if component == "dt_bias":
            return torch.ones(shape)
        values = torch.randn(shape, generator=source)
        if name.endswith("linear_attn.norm.weight"):
            return values.mul_(0.02).add_(1)
        return values.mul_(0.02 if "norm" in component else _STD.get(component, _OTHER))
