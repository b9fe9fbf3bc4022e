"""Figures of a tensor and of a component, as measure.json has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np

from tvm_sparse.checkpoint import Stored
from tvm_sparse.measure.components import component
from tvm_sparse.measure.magnitudes import Cut, Magnitudes, share_below
from tvm_sparse.measure.zero_units import Maxima, Units

# Sparsities of the error curves: of a component for its plot, of each of a thousand tensors for the file.
FINE = tuple(i / 100 for i in range(1, 100))
COARSE = FINE[4::5]


@dataclass(frozen=True)
class Asked:
    """What the figures are wanted at."""

    thresholds: tuple[float, ...]
    sparsities: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One tensor. `survivors[i]` counts the non-zeros that sparsity i leaves, by exponent field."""

    tensor: Stored
    figures: dict[str, Any]
    cuts: tuple[Cut, ...]
    units: tuple[dict[str, Units], ...]
    survivors: tuple[np.ndarray, ...]

    def to_json(self) -> dict[str, Any]:
        facts = {"name": self.tensor.name, "shape": list(self.tensor.shape), "component": component(self.tensor)}
        return {**facts, **self.figures, "at": _at(self.cuts, self.units)}


def measured(tensor: Stored, magnitudes: Magnitudes, maxima: Maxima | None, asked: Asked) -> Measured:
    cuts = tuple(magnitudes.cut(sparsity) for sparsity in asked.sparsities)
    shape = (tensor.shape[0], prod(tensor.shape[1:]))
    return Measured(
        tensor=tensor,
        figures=figures(magnitudes, magnitudes.normal, asked, COARSE),
        cuts=cuts,
        units=tuple(maxima.units(cut, shape) if maxima else {} for cut in cuts),
        survivors=tuple(magnitudes.exponents(cut.last) for cut in cuts),
    )


def figures(magnitudes: Magnitudes, normal: np.ndarray, asked: Asked, curve: Sequence[float]) -> dict[str, Any]:
    """Everything that follows from the histogram alone, and `normal`, the running count it is held against; JSON."""
    exponents = magnitudes.exponents()
    return {
        "weights": magnitudes.total,
        "zeros": magnitudes.zeros,
        "rms": magnitudes.rms,
        "excess_kurtosis": magnitudes.excess_kurtosis,
        "distance_from_normal": magnitudes.distance(normal),
        "below": {f"{t:g}": magnitudes.below(t) for t in asked.thresholds},
        "normal_below": {f"{t:g}": share_below(normal, t) for t in asked.thresholds},
        "exponents": {str(e - 127): int(exponents[e]) for e in np.flatnonzero(exponents)},
        "exponent_entropy": magnitudes.exponent_entropy,
        "curve": [[cut.sparsity, cut.error, cut.threshold] for cut in map(magnitudes.cut, curve)],
    }


@dataclass
class Pool:
    """Tensors taken together.

    `dropped` is the energy lost at each sparsity where every tensor is cut by itself, `normal` the running count of
    normal distributions, one for each tensor: tensors of different deviation are no single one.
    """

    asked: Asked
    tensors: int = 0
    magnitudes: Magnitudes | None = None
    normal: np.ndarray | None = None
    units: list[dict[str, Units]] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)

    def add(self, one: Measured, magnitudes: Magnitudes) -> None:
        energy = magnitudes.total * magnitudes.rms**2
        self.tensors += 1
        self.magnitudes = self.magnitudes + magnitudes if self.magnitudes else magnitudes
        normal = magnitudes.normal
        self.normal = normal if self.normal is None else self.normal + normal
        self.units = self.units or [{} for _ in one.cuts]
        self.dropped = self.dropped or [0.0] * len(one.cuts)
        for i, cut in enumerate(one.cuts):
            self.dropped[i] += cut.error**2 * energy
            for kind, units in one.units[i].items():
                self.units[i][kind] = self.units[i][kind] + units if kind in self.units[i] else units

    def __add__(self, other: Pool) -> Pool:
        if not self.magnitudes or not other.magnitudes:
            return self if self.magnitudes else other
        joined = Pool(self.asked, self.tensors + other.tensors, self.magnitudes + other.magnitudes)
        assert self.normal is not None and other.normal is not None
        joined.normal = self.normal + other.normal
        joined.dropped = [a + b for a, b in zip(self.dropped, other.dropped, strict=True)]
        for a, b in zip(self.units, other.units, strict=True):
            joined.units.append({kind: _sum(a.get(kind), b.get(kind)) for kind in {**a, **b}})
        return joined

    def to_json(self) -> dict[str, Any]:
        """The figures of the joined histogram (one threshold for all), and `error_each` of a threshold per tensor."""
        assert self.magnitudes is not None and self.normal is not None
        cuts = tuple(self.magnitudes.cut(sparsity) for sparsity in self.asked.sparsities)
        at = _at(cuts, tuple(self.units))
        energy = self.magnitudes.total * self.magnitudes.rms**2
        for facts, dropped in zip(at, self.dropped, strict=True):
            facts["error_each"] = sqrt(dropped / energy) if energy else 0.0
        rms = self.magnitudes.rms
        return {
            "tensors": self.tensors,
            **figures(self.magnitudes, self.normal, self.asked, FINE),
            "density": self.magnitudes.density(4 * rms, self.normal) if rms else [],
            "at": at,
        }


def _sum(a: Units | None, b: Units | None) -> Units:
    if a and b:
        return a + b
    found = a or b
    assert found is not None
    return found


def _at(cuts: Sequence[Cut], units: Sequence[dict[str, Units]]) -> list[dict[str, Any]]:
    return [
        {
            "sparsity": cut.sparsity,
            "threshold": cut.threshold,
            "share": cut.share,
            "error": cut.error,
            "all_zero": {kind: asdict(found) for kind, found in here.items()},
        }
        for cut, here in zip(cuts, units, strict=True)
    ]
