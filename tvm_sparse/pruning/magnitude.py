"""Magnitude pruning without structure: an exact number of zeros per matrix or per row, by counting bit patterns.

The magnitude of a float is its bits without the sign, and as integers they order as the values do. So the threshold
of a whole matrix is found exactly from a histogram gathered over row blocks, without sorting and without the matrix
in memory: one pass for bfloat16 (15 bits), two for float32 (upper 15 bits, then the lower 16 of one bin).
"""

from __future__ import annotations

import numpy as np
import torch

_LOW = 16  # bits of a float32 below its bfloat16


class MatrixThreshold:
    """Drops the `zeros` smallest weights of a matrix; among equals the first in row-major order."""

    def __init__(self, zeros: int, dtype: torch.dtype) -> None:
        self.scans = 1 if dtype == torch.bfloat16 else 2
        self._left = zeros  # of the bin that the threshold falls into, once that is known
        self._counts = torch.zeros(1 << 15, dtype=torch.int64)
        self._threshold = 0
        self._ties = 0
        self._found = False

    def scan(self, index: int, start: int, magnitude: torch.Tensor) -> None:
        if self.scans == 1:
            self._counts += _count(magnitude, 1 << 15)
        elif index == 0:
            self._counts += _count(magnitude >> _LOW, 1 << 15)
        else:
            if start == 0:
                self._narrow()
                self._counts = torch.zeros(1 << _LOW, dtype=torch.int64)
            inside = magnitude[(magnitude >> _LOW) == self._threshold] & ((1 << _LOW) - 1)
            self._counts += _count(inside, 1 << _LOW)

    def keep(self, start: int, magnitude: torch.Tensor) -> torch.Tensor:
        if not self._found:
            self._narrow()
            self._found = True
        if self._left == 0:
            return magnitude >= self._threshold
        if self._left == self._ties:
            return magnitude > self._threshold
        ties = magnitude == self._threshold
        here = int(ties.count_nonzero())
        if here <= self._left:
            self._left -= here
            self._ties -= here
            return magnitude > self._threshold
        kept = magnitude >= self._threshold
        kept.view(-1)[ties.view(-1).nonzero()[: self._left, 0]] = False
        self._left = 0
        return kept

    def _narrow(self) -> None:
        """Moves the threshold into the bin where the running count passes what is left to drop."""
        running = self._counts.cumsum(0)
        found = int(torch.searchsorted(running, self._left, right=True))
        found = min(found, len(running) - 1)
        self._left -= int(running[found - 1]) if found else 0
        self._ties = int(self._counts[found])
        self._threshold = (self._threshold << _LOW) + found


class RowThreshold:
    """Drops the `zeros` smallest weights of every row; among equals the first."""

    scans = 0

    def __init__(self, zeros: int) -> None:
        self.zeros = zeros

    def scan(self, index: int, start: int, magnitude: torch.Tensor) -> None: ...

    def keep(self, start: int, magnitude: torch.Tensor) -> torch.Tensor:
        if self.zeros == 0:
            return torch.ones_like(magnitude, dtype=torch.bool)
        if magnitude.is_cuda:
            return self.keep(start, magnitude.cpu()).to(magnitude.device)
        ordered = np.partition(magnitude.numpy(), self.zeros - 1, axis=1)
        threshold = torch.from_numpy(ordered[:, self.zeros - 1 : self.zeros].copy())
        kept = magnitude >= threshold
        left = self.zeros - (magnitude.shape[1] - kept.sum(1))  # to drop among the equals of each row
        row, column = (magnitude == threshold).nonzero(as_tuple=True)
        starts = torch.searchsorted(row, torch.arange(len(magnitude)))
        dropped = torch.arange(len(row)) - starts[row] < left[row]
        kept[row[dropped], column[dropped]] = False
        return kept


def _count(values: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.bincount(values.view(-1), minlength=bins).cpu()
