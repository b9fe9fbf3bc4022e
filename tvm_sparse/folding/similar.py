"""How alike a checkpoint's layers are as weights, and which neighbours are alike enough to become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tvm_sparse.checkpoint import Checkpoint
from tvm_sparse.measure.components import similarity_group
from tvm_sparse.measure.similarity import weight_similarity
from tvm_sparse.measure.sweep import sweep

Alike = Callable[[int, int], bool]


def layer_cosines(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """By kind: `layers`, the `cosine` of every pair (all projections joined) and the `largest`.

    Reads every projection once. A kind with a single layer is left out.
    """
    projections = tuple(tensor for tensor in checkpoint.stored() if similarity_group(tensor))
    products = sweep(checkpoint, projections, lambda *_: None)
    found: dict[str, dict[str, Any]] = weight_similarity(checkpoint.config, products)["kinds"]
    return found


def alike_as_weights(checkpoint: Checkpoint, kinds: dict[str, dict[str, Any]], threshold: float) -> Alike:
    """Two layers of a kind are alike where the cosine of their projections reaches the threshold, their projections'
    lengths differ by no larger share, and both hold for their small tensors (norms, convolution, decay) together."""
    cosines = {
        (a, b): facts["cosine"][i][j]
        for facts in kinds.values()
        for i, a in enumerate(facts["layers"])
        for j, b in enumerate(facts["layers"])
    }

    def alike(a: int, b: int) -> bool:
        if cosines[a, b] < threshold:
            return False
        lengths = [_square(checkpoint, layer) for layer in (a, b)]
        small = [_small(checkpoint, layer) for layer in (a, b)]
        return min(lengths) >= threshold**2 * max(lengths) and agreement(small[0], small[1]) >= threshold

    return alike


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 <a, b> / (|a|^2 + |b|^2): the cosine, lowered where the lengths differ; 1 of equal vectors only."""
    scale = float(a.square().sum() + b.square().sum())
    return float(2 * (a * b).sum()) / scale if scale else 1.0


def runs(layers: Sequence[int], alike: Alike) -> list[tuple[int, ...]]:
    """Layers of one kind -> neighbours (among these) that are all alike, each pair of them; two layers at least."""
    found: list[list[int]] = []
    for layer in layers:
        if found and all(alike(other, layer) for other in found[-1]):
            found[-1].append(layer)
        else:
            found.append([layer])
    return [tuple(run) for run in found if len(run) > 1]


def _square(checkpoint: Checkpoint, layer: int) -> float:
    """Sum of the squares of a layer's projections."""
    names = [name for name in _names(checkpoint, layer) if len(checkpoint.spec(name).shape) == 2]
    return sum(float(block.double().square().sum()) for name in names for block in checkpoint.blocks(name))


def _small(checkpoint: Checkpoint, layer: int) -> torch.Tensor:
    """A layer's other tensors as one float64 vector."""
    names = [name for name in _names(checkpoint, layer) if len(checkpoint.spec(name).shape) != 2]
    return torch.cat([checkpoint.tensor(name).double().flatten() for name in names])


def _names(checkpoint: Checkpoint, layer: int) -> list[str]:
    return [name for name in checkpoint.names() if name.startswith(f"layers.{layer}.")]
