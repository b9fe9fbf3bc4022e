"""Rows, columns and blocks that would be all zero at any threshold: by the largest magnitude in each of them.

A unit is all zero after magnitude pruning exactly where its maximum is. Histograms of the maxima answer for every
sparsity at once, from the same single pass over the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_sparse.measure.magnitudes import Cut, count

SIDES = (4, 16)


@dataclass(frozen=True)
class Units:
    """All-zero units of one kind in a matrix: how many, of how many, and how many zeros at random would give."""

    zero: int
    of: int
    chance: float

    def __add__(self, other: Units) -> Units:
        return Units(self.zero + other.zero, self.of + other.of, self.chance + other.chance)


@dataclass
class Maxima:
    """Of a row block of magnitudes [r, K]: histograms of its blocks' maxima, its rows' and columns' maxima."""

    blocks: dict[int, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor

    def add(self, below: Maxima) -> None:
        """Joins the maxima of the rows that follow."""
        for side, counts in below.blocks.items():
            self.blocks[side] += counts
        self.rows += below.rows
        self.columns = torch.maximum(self.columns, below.columns)

    def units(self, cut: Cut, shape: tuple[int, int]) -> dict[str, Units]:
        """By kind ("row", "column", "4x4", "16x16"), with every weight of the cut's `share` at zero."""
        n, k = shape
        found = {
            "row": Units(_up_to(self.rows, cut.last), n, n * cut.share**k),
            "column": Units(_up_to(count(self.columns), cut.last), k, k * cut.share**n),
        }
        for side, counts in self.blocks.items():
            grid = -(-n // side) * -(-k // side)
            found[f"{side}x{side}"] = Units(_up_to(counts, cut.last), grid, _chance(shape, side, cut.share))
        return found


def maxima(block: torch.Tensor) -> Maxima:
    """int16 magnitudes [r, K] -> Maxima; edges that are no whole block count as blocks."""
    blocks = {}
    reduced, side = block, 1
    for wanted in SIDES:
        reduced = _reduce(reduced, wanted // side)
        side = wanted
        blocks[wanted] = count(reduced)
    return Maxima(blocks, count(block.amax(1)), block.amax(0))


def _reduce(block: torch.Tensor, side: int) -> torch.Tensor:
    """Maxima of side x side squares; a ragged edge is filled with zeros, which change no maximum."""
    short = (0, -block.shape[1] % side, 0, -block.shape[0] % side)
    if any(short):
        block = torch.nn.functional.pad(block, short)
    tall = block.view(-1, side, block.shape[1]).amax(1)
    return tall.view(tall.shape[0], -1, side).amax(2)


def _up_to(counts: torch.Tensor, last: int) -> int:
    return int(counts[: last + 1].sum())


def _chance(shape: tuple[int, int], side: int, share: float) -> float:
    """Expected all-zero blocks where each weight is zero with probability `share`, ragged edges included."""
    tall, wide = ({side: size // side, size % side: 1 if size % side else 0} for size in shape)
    return sum(n * m * share ** (r * c) for r, n in tall.items() for c, m in wide.items())
