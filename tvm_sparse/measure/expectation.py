"""Bytes and speed-up that each format promises at each sparsity, by the plan's own cost model, before any pruning.

Density, exponents of the survivors and all-zero blocks are those measured; gaps between non-zeros are taken as
those of zeros at random, which is what magnitude pruning leaves in a matrix without structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from tvm_sparse.formats import FORMATS, FormatChoice, Stats
from tvm_sparse.formats.speed import seconds
from tvm_sparse.layout import RuntimeParam, make_layout
from tvm_sparse.measure.figures import Measured
from tvm_sparse.models.config import ModelConfig
from tvm_sparse.plan import decide, expected_stats
from tvm_sparse.pruning import Pattern, parse_pattern
from tvm_sparse.targets import MACHINES

TARGETS = ("cpu", "h200", "b200")
BATCH = 1
PLAN = "plan"  # the row of what the plan would choose, matrix by matrix
_BLOCK = (16, 16)


@dataclass
class Sum:
    """Of all projections in one format."""

    nbytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, machine: str, choice: FormatChoice, nbytes: int, time: float) -> None:
        self.nbytes[machine] = self.nbytes.get(machine, 0) + nbytes
        self.seconds[machine] = self.seconds.get(machine, 0.0) + time
        counts = self.chosen.setdefault(machine, {})
        counts[str(choice)] = counts.get(str(choice), 0) + 1


def expect(config: ModelConfig, tensors: Mapping[str, Measured], sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """For every sparsity, format and machine: bytes of all projections, speed-up over dense for one token.

    `tensors` are the text tensors by short name. Projections are fused as the compiled model fuses them.
    """
    params = [param for param in make_layout(config).params if param.kind == "projection"]
    rows: list[dict[str, Any]] = []
    for index, sparsity in enumerate(sparsities):
        stats = {param: _stats(param, tensors, index) for param in params}
        dense = _total(stats, "dense")
        rows += [_row("magnitude", sparsity, name, _total(stats, name), dense) for name in ("bitmap", "delta", "block")]
        rows.append(_row("magnitude", sparsity, PLAN, _planned(stats), dense))
        for pattern, name in (("2:4", "2:4"), ("block:16x16", "block")):
            if pattern == "2:4" and sparsity != 0.5:
                continue
            kept = parse_pattern(pattern, sparsity)
            structured = {param: _at_random(_shape(param), 1 - sparsity, kept) for param in params}
            rows.append(_row(pattern, sparsity, name, _total(structured, name), dense))
    return rows


def _stats(param: RuntimeParam, tensors: Mapping[str, Measured], index: int) -> Stats:
    parts = [tensors[source] for source in param.sources]
    survivors = np.sum([part.survivors[index] for part in parts], 0)
    shape = _shape(param)
    found = _at_random(shape, round(int(survivors.sum()) / (shape[0] * shape[1]), 4), Pattern())
    blocks = sum(units.of - units.zero for part in parts for units in (part.units[index]["16x16"],))
    return replace(found, nnz=int(survivors.sum()), exponents=(*survivors.tolist(), 0), blocks={_BLOCK: blocks})


@cache
def _at_random(shape: tuple[int, int], density: float, pattern: Pattern) -> Stats:
    return expected_stats(shape, density, pattern)


def _shape(param: RuntimeParam) -> tuple[int, int]:
    return param.shape[0], param.shape[1]


def _total(stats: Mapping[RuntimeParam, Stats], name: str) -> Sum:
    total = Sum()
    form = FORMATS[name]
    for each in stats.values():
        for machine in TARGETS:
            choice = form.choices(each, MACHINES[machine])[0]
            nbytes = form.nbytes(each, choice)
            total.add(machine, choice, nbytes, seconds(each, choice, MACHINES[machine], BATCH))
    return total


def _planned(stats: Mapping[RuntimeParam, Stats]) -> Sum:
    total = Sum()
    for param, each in stats.items():
        for machine in TARGETS:
            entry = decide(param.name, each, (MACHINES[machine],), BATCH)
            total.add(machine, entry.choice, entry.nbytes, entry.seconds[machine])
    return total


def _row(pruning: str, sparsity: float, name: str, total: Sum, dense: Sum) -> dict[str, Any]:
    return {
        "pruning": pruning,
        "sparsity": sparsity,
        "format": name,
        "targets": {
            machine: {
                "bytes": total.nbytes[machine],
                "dense_bytes": dense.nbytes[machine],
                "speedup": dense.seconds[machine] / total.seconds[machine],
                "choices": total.chosen[machine],
            }
            for machine in TARGETS
        },
    }
