"""Magnitude pruning of a checkpoint, streamed by row blocks: each matrix by itself, or all by one threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from tvm_sparse.progress import bar
from tvm_sparse.pruning.magnitude import MatrixThreshold
from tvm_sparse.pruning.pruner import Pruner, Zeros, require_finite, split_bits
from tvm_sparse.pruning.rewrite import CheckpointCopy


def prune_matrices(copy: CheckpointCopy, pruner: Pruner, zeros: Mapping[str, int]) -> None:
    """Each matrix of `zeros` (name -> how many) on its own. Raises Refusal for NaN and infinity, by name."""
    for name, count in bar(zeros.items(), len(zeros), "matrix", "prune by magnitude"):
        if name in copy.done:
            continue
        rows, columns = copy.model.spec(name).shape
        share = count / (rows * columns) if pruner.pattern.kind != "n:m" else pruner.sparsity
        _write(copy, name, replace(pruner, sparsity=share))


def prune_globally(copy: CheckpointCopy, names: tuple[str, ...], zeros: int) -> None:
    """The `zeros` smallest weights of all the matrices together; among equals the first.

    Raises Refusal for NaN and infinity, by name.
    """
    model = copy.model
    dtype = torch.bfloat16 if all(model.exact_bf16(name) for name in names) else torch.float32
    threshold = MatrixThreshold(zeros, dtype)
    for index in range(threshold.scans):
        row = 0
        for name in bar(names, len(names), "matrix", "find the threshold"):
            for block in model.blocks(name):
                _, magnitude = split_bits(block.to(dtype))
                require_finite(name, magnitude)
                threshold.scan(index, row, magnitude)
                row += len(block)
    for name in bar(names, len(names), "matrix", "prune by one magnitude"):
        facts: dict[str, Any] = {"shape": list(model.spec(name).shape), "zeros": 0}

        def blocks(name: str = name, facts: dict[str, Any] = facts) -> Iterator[torch.Tensor]:
            for block in model.blocks(name):
                block = block.to(dtype)
                _, magnitude = split_bits(block)
                kept = threshold.keep(0, magnitude) & (magnitude != 0)  # -0.0 becomes +0.0
                facts["zeros"] += kept.numel() - int(kept.count_nonzero())
                yield torch.where(kept, block, 0)

        copy.write({name: blocks()}, {name: facts})


def _write(copy: CheckpointCopy, name: str, pruner: Pruner) -> None:
    model = copy.model
    rows, columns = model.spec(name).shape
    dtype = torch.bfloat16 if model.exact_bf16(name) else torch.float32
    zeros, facts = Zeros((rows, columns)), {}

    def read(start: int, stop: int) -> torch.Tensor:
        return model.rows(name, start, stop).to(dtype).contiguous()

    def blocks() -> Iterator[torch.Tensor]:
        yield from pruner.stream(name, zeros.shape, dtype, read, zeros)
        facts.update({"shape": [rows, columns], "zeros": prod(zeros.shape) - zeros.nnz})

    copy.write({name: blocks()}, {name: facts})
