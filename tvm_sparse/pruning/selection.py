"""Which weights go, from a score for each: an exact number of the lowest, in the group that a method compares."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from tvm_sparse.pruning.pattern import Pattern
from tvm_sparse.pruning.structured import KeepNOfM, round_half_up


def keep_highest(scores: torch.Tensor, zeros: int, pattern: Pattern, by_row: bool) -> torch.Tensor:
    """A mask of what stays of [N, K]: `zeros` weights go, or what an N:M or whole blocks of that share make.

    `by_row` compares within rows, whose zeros differ by one at most; else over the whole matrix. Among equals the
    first go.
    """
    if pattern.kind == "n:m":
        return KeepNOfM(pattern.n, pattern.m).keep(0, scores.contiguous())
    if pattern.kind == "block":
        return _keep_blocks(scores, zeros, pattern)
    if by_row:
        return drop_lowest(scores, spread(zeros, len(scores)))
    return drop_lowest(scores.reshape(1, -1), [zeros]).view(scores.shape)


def drop_lowest(scores: torch.Tensor, zeros: list[int]) -> torch.Tensor:
    """A mask of what stays of [N, K] when the `zeros[row]` lowest of every row go, among equals the first."""
    counts = torch.tensor(zeros, device=scores.device)
    threshold = torch.full((len(scores), 1), float("-inf"), dtype=scores.dtype, device=scores.device)
    for count in sorted(set(zeros) - {0}):
        rows = counts == count
        threshold[rows] = scores[rows].kthvalue(count, dim=1, keepdim=True).values
    ties = scores == threshold
    left = counts[:, None] - (scores < threshold).sum(1, keepdim=True)
    return (scores > threshold) | (ties & (ties.cumsum(1) > left))


def spread(total: int, parts: int) -> list[int]:
    """A total in `parts` shares that differ by one at most."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def _keep_blocks(scores: torch.Tensor, zeros: int, pattern: Pattern) -> torch.Tensor:
    """Blocks by the root of their squared scores' sum; edges are ragged, and the share is one of blocks."""
    height, width = scores.shape
    squares = pad(scores.square(), (0, -width % pattern.cols, 0, -height % pattern.rows))
    grid = squares.view(-1, pattern.rows, squares.shape[1] // pattern.cols, pattern.cols).sum((1, 3))
    count = round_half_up(zeros / scores.numel() * grid.numel())
    kept = drop_lowest(grid.reshape(1, -1), [count]).view(grid.shape)
    return kept.repeat_interleave(pattern.rows, 0)[:height].repeat_interleave(pattern.cols, 1)[:, :width]
