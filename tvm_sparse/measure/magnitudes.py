"""The distribution of a tensor's magnitudes: one exact histogram of bfloat16 bit patterns without their sign.

As integers these 15 bits order as the values do, so every figure that depends on magnitudes alone (shares under a
threshold, the threshold and the error of any sparsity, exponents, distance from normal) is exact and comes from here,
and histograms of parts of a model add up to that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
import torch

BINS = 1 << 15
FINITE = 0x7F80  # patterns from here on are infinity and NaN
VALUES = (np.arange(FINITE, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_SQUARES = VALUES**2
# What rounds to a value ends half way to the next one: where an empirical share may be held against a formula.
_EDGES = np.append((VALUES[:-1] + VALUES[1:]) / 2, np.inf)


@dataclass(frozen=True)
class Cut:
    """What magnitude pruning at one sparsity does to one histogram.

    `threshold` is the largest magnitude that becomes zero, pattern `last`; `share` of all weights are that small, a
    little over the sparsity where equals are split. `error` is the Frobenius norm of what is dropped over that of all.
    """

    sparsity: float
    last: int
    threshold: float
    share: float
    error: float


class Magnitudes:
    """counts[b]: weights whose bits without sign are b; int64 [0x7F80]."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        self.total = int(counts.sum())
        self._running = counts.cumsum()
        self._energy = (counts * _SQUARES).cumsum()

    def __add__(self, other: Magnitudes) -> Magnitudes:
        return Magnitudes(self.counts + other.counts)

    @property
    def zeros(self) -> int:
        return int(self.counts[0])

    @property
    def rms(self) -> float:
        """Root mean square: the standard deviation about zero."""
        return sqrt(self._energy[-1] / self.total) if self.total else 0.0

    @property
    def excess_kurtosis(self) -> float:
        """Fourth moment about zero over the squared second, minus a normal distribution's 3."""
        if not self.rms:
            return 0.0
        return float((self.counts * (VALUES / self.rms) ** 4).sum() / self.total - 3)

    def below(self, threshold: float) -> float:
        """Share of weights with |w| < threshold."""
        return share_below(self._running, threshold)

    @cached_property
    def normal(self) -> np.ndarray:
        """What the running count [0x7F80] would be for a normal distribution around zero with this root mean square."""
        return self.total * (half_normal(_EDGES / self.rms) if self.rms else np.ones(FINITE))

    def distance(self, normal: np.ndarray) -> float:
        """Kolmogorov-Smirnov: the largest gap, over all magnitudes, between the share under them and `normal`'s."""
        return float(np.abs(self._running - normal).max() / self.total) if self.total else 0.0

    def cut(self, sparsity: float) -> Cut:
        """Exactly round(sparsity * total) zeros, the smallest first, as `Pruner("magnitude")` makes them."""
        zeros = int(sparsity * self.total + 0.5)
        last = int(np.searchsorted(self._running, zeros, "left"))
        under, dropped = (self._running[last - 1], self._energy[last - 1]) if last else (0, 0.0)
        dropped += (zeros - under) * _SQUARES[last]
        energy = float(self._energy[-1])
        return Cut(
            sparsity=sparsity,
            last=last,
            threshold=float(VALUES[last]),
            share=float(self._running[last] / self.total),
            error=sqrt(dropped / energy) if energy else 0.0,
        )

    def exponents(self, above: int = 0) -> np.ndarray:
        """int64 [255]: non-zero weights with a pattern over `above` by exponent field (0: subnormal)."""
        kept = self.counts.copy()
        kept[: above + 1] = 0
        return kept.reshape(-1, 128).sum(1)

    @property
    def exponent_entropy(self) -> float:
        """Bits a non-zero weight's exponent carries: what a perfect code of it would take, of the 8 it is stored in."""
        counts = self.exponents()
        share = counts[counts > 0] / max(1, counts.sum())
        return float(-(share * np.log2(share)).sum())

    def density(self, limit: float, normal: np.ndarray, parts: int = 16) -> list[tuple[float, float, float, float]]:
        """(from, to, density of |w|, density of `normal`) up to `limit`, `parts` steps a binade on bfloat16's grid."""
        step = 128 // parts
        edges = VALUES[::step]
        found = []
        start = max(0, int(np.searchsorted(edges, limit / 64)))  # below that one bar: steps get ever finer
        bars = [(0, start), *((i, i + 1) for i in range(start, len(edges) - 1) if edges[i] < limit)]
        for i, j in bars:
            width = edges[j] - edges[i]
            if width > 0:
                inside = [run[j * step - 1] - (run[i * step - 1] if i else 0) for run in (self._running, normal)]
                bar = [float(count / self.total / width) for count in inside]
                found.append((float(edges[i]), float(edges[j]), bar[0], bar[1]))
        return found


def share_below(running: np.ndarray, threshold: float) -> float:
    """Of a running count over patterns, the share with |w| < threshold."""
    index = int(np.searchsorted(VALUES, threshold, "left"))
    return float(running[index - 1] / running[-1]) if index and running[-1] else 0.0


def count(block: torch.Tensor) -> torch.Tensor:
    """Magnitude patterns int16 of any shape -> int64 [2^15]."""
    return torch.bincount(block.reshape(-1), minlength=BINS)


def half_normal(ratio: np.ndarray) -> np.ndarray:
    """Share of a normal distribution within `ratio` deviations of zero."""
    return torch.special.erf(torch.from_numpy(ratio / sqrt(2))).numpy()
