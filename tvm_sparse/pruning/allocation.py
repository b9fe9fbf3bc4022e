"""How many zeros each matrix gets: the same share in all, or more in layers with fewer outliers (OWL).

OWL is Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity": the share of weights whose Wanda score is over M times their layer's mean says how much a layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch

from tvm_sparse.pruning.structured import round_half_up

OWL_THRESHOLD = 5.0  # M
OWL_REACH = 0.08  # lambda


def uniform(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """Zeros of every matrix: the same share, rounded."""
    return {name: round_half_up(sparsity * prod(shape)) for name, shape in shapes.items()}


def outlier_share(scores: Iterable[torch.Tensor], threshold: float = OWL_THRESHOLD) -> float:
    """Equation 2: the share of a layer's scores over `threshold` times their mean."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    return int((flat > threshold * flat.mean()).sum()) / flat.numel()


def layer_sparsities(
    outliers: Sequence[float], sizes: Sequence[int], sparsity: float, reach: float = OWL_REACH
) -> list[float]:
    """A sparsity for every layer, lower where outliers are more, from their shares and the layers' weights.

    As in the paper's code the shares are stretched to a range of 2 `reach`, less where that would leave [0, 1), and
    shifted so that the mean, here weighed by the layers' sizes, is `sparsity`.
    """
    low, high = min(outliers), max(outliers)
    if low == high:
        return [sparsity] * len(outliers)
    reach = min(reach, sparsity / 2, (1 - sparsity) / 2)
    extra = [2 * reach * (share - low) / (high - low) for share in outliers]
    mean = sum(more * size for more, size in zip(extra, sizes, strict=True)) / sum(sizes)
    return [sparsity - (more - mean) for more in extra]


def by_layer(
    shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, int], sparsities: Mapping[int, float], sparsity: float
) -> dict[str, int]:
    """Zeros of every matrix by its layer's sparsity; in all exactly round(sparsity * weights)."""
    total = round_half_up(sparsity * sum(prod(shape) for shape in shapes.values()))
    zeros, wanted, given = {}, 0.0, 0
    for name, shape in shapes.items():
        wanted += sparsities[layers[name]] * prod(shape)
        zeros[name] = min(round_half_up(wanted), total) - given
        given += zeros[name]
    last = next(reversed(zeros))
    zeros[last] += total - given  # what sums of floats lose
    return zeros
