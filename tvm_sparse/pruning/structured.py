"""Structured pruning: N of every M columns, and whole blocks by their L2 norm."""

from __future__ import annotations

from itertools import combinations

import torch
from torch.nn.functional import pad


class KeepNOfM:
    """Keeps the n largest of each m consecutive columns; among equals drops the first."""

    scans = 0

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m

    def scan(self, index: int, start: int, magnitude: torch.Tensor) -> None: ...

    def keep(self, start: int, magnitude: torch.Tensor) -> torch.Tensor:
        rows, columns = magnitude.shape
        lanes = magnitude.view(-1, self.m).T.contiguous()
        rank = torch.zeros(lanes.shape, dtype=torch.int16, device=lanes.device)  # how many of the group are smaller
        for i, j in combinations(range(self.m), 2):
            later = lanes[i] <= lanes[j]
            rank[j] += later
            rank[i] += later.logical_not_()
        return (rank >= self.m - self.n).T.reshape(rows, columns)


class BlockNorms:
    """Drops the `share` of rows x cols blocks with the smallest L2 norm; among equals the first. Edges are ragged."""

    scans = 1

    def __init__(self, rows: int, cols: int, shape: tuple[int, int], share: float) -> None:
        self.rows, self.cols = rows, cols
        grid = (-(-shape[0] // rows), -(-shape[1] // cols))
        self._norms = torch.zeros(grid, dtype=torch.float64)
        self._count = round_half_up(share * self._norms.numel())
        self._kept: torch.Tensor | None = None

    def scan(self, index: int, start: int, magnitude: torch.Tensor) -> None:
        kind = torch.bfloat16 if magnitude.dtype == torch.int16 else torch.float32
        # squares summed in float64: the order of summation, and so the size of a row block, cannot matter
        values = magnitude.view(kind).double()
        short_rows, short_cols = -values.shape[0] % self.rows, -values.shape[1] % self.cols
        values = pad(values, (0, short_cols, 0, short_rows)).square_()
        norms = values.view(-1, self.rows, self._norms.shape[1], self.cols).sum((1, 3))
        first = start // self.rows
        self._norms[first : first + len(norms)] = norms

    def keep(self, start: int, magnitude: torch.Tensor) -> torch.Tensor:
        if self._kept is None:
            order = self._norms.view(-1).sort(stable=True).indices
            kept = torch.ones(self._norms.numel(), dtype=torch.bool)
            kept[order[: self._count]] = False
            self._kept = kept.view(self._norms.shape)
        rows, columns = magnitude.shape
        first = start // self.rows
        here = self._kept[first : first + -(-rows // self.rows)]
        return here.repeat_interleave(self.rows, 0)[:rows].repeat_interleave(self.cols, 1)[:, :columns]


def round_half_up(value: float) -> int:
    return int(value + 0.5)
