"""Whether weights that run again are still in the last-level cache, and what that saves.

Between two uses of a layer's weights everything executed in between passes through the cache: a use finds its weights
there where that is no more than the cache holds. This is the distance a cache that throws out the oldest first goes by.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tvm_sparse.folding.ranges import KINDS
from tvm_sparse.formats.speed import seconds
from tvm_sparse.formats.stats import Stats
from tvm_sparse.plan import Plan, PlanEntry, decide, expected_stats
from tvm_sparse.targets import Machine

# NVIDIA H200, 60 MiB of L2 (docs/folding.md): a reader of the same 32 MB gets them from there every time, of 40 MB in
# part, of 48 MB not at all. The delta kernel streams 1.1 times as many bytes a second from there as from memory, since
# decoding takes as long as memory does. Assumed of every machine.
HOLDS = 0.5
CACHED = 1.1


def residence(
    kinds: Sequence[str], schedule: Sequence[int], plan: Plan, machines: Sequence[Machine], batch: int
) -> list[dict[str, Any]]:
    """For every layer of weights that is executed more than once: bytes, how often they are found, predicted times.

    `kinds` are those of the checkpoint's layers. `between` are the bytes that pass from one use to the next, the
    layer's own included: {bytes: how many times}.
    """
    layers = _by_layer(plan)
    sizes = {layer: sum(entry.nbytes for entry in entries) for layer, entries in layers.items()}
    found = []
    for layer in dict.fromkeys(schedule):
        uses = [place for place, other in enumerate(schedule) if other == layer]
        if len(uses) < 2:
            continue
        passing = [sum(sizes[other] for other in set(schedule[begin:end])) for begin, end in pairwise(uses)]
        found.append({
            "layer": layer,
            "kind": KINDS[kinds[layer]],
            "uses": len(uses),
            "bytes": sizes[layer],
            "between": {str(size): passing.count(size) for size in sorted(set(passing))},
            "machines": {m.name: _on(m, layers[layer], passing, batch) for m in machines},
        })  # fmt: skip
    return found


def _on(machine: Machine, entries: Sequence[PlanEntry], passing: Sequence[int], batch: int) -> dict[str, Any]:
    """`first` and `later` are seconds of one use, from memory and from the cache; `saved` of a whole token."""
    size, nearest = sum(entry.nbytes for entry in entries), min(passing)
    holds = round(HOLDS * machine.l2)
    resident = sum(each <= holds for each in passing)
    from_cache = replace(machine, bandwidth=CACHED * machine.bandwidth)
    first, later = (_seconds(entries, each, batch) for each in (machine, from_cache))
    facts: dict[str, Any] = {
        "l2": machine.l2,
        "holds": holds,
        "found": resident,
        "first": first,
        "later": later,
        "saved": resident * (first - later),
    }
    if nearest > holds:
        facts["part"] = holds / nearest
        facts["from_sparsity"] = _fitting_sparsity(machine, entries, holds * size / nearest, batch)
    return facts


def _seconds(entries: Sequence[PlanEntry], machine: Machine, batch: int) -> float:
    return sum(seconds(_stats(entry), entry.choice, machine, batch) for entry in entries)


def _stats(entry: PlanEntry) -> Stats:
    """The matrix with its zeros at random; one stored in blocks has as many as its bytes hold."""
    stats = expected_stats(entry.shape, entry.density)
    if entry.choice.name != "block":
        return stats
    rows, cols = entry.choice.option("rows"), entry.choice.option("cols")
    return replace(stats, blocks={(rows, cols): entry.nbytes // (2 * rows * cols + 4)})


def _fitting_sparsity(machine: Machine, entries: Sequence[PlanEntry], room: float, batch: int) -> float | None:
    """The least sparsity in whole per cents at which the matrices take no more room."""

    def fits(percent: int) -> bool:
        stats = [expected_stats(entry.shape, 1 - percent / 100) for entry in entries]
        return sum(decide("", each, (machine,), batch).nbytes for each in stats) <= room

    percent = bisect_left(range(100), True, key=fits)
    return percent / 100 if percent < 100 else None


def _by_layer(plan: Plan) -> dict[int, list[PlanEntry]]:
    layers: dict[int, list[PlanEntry]] = {}
    for name, entry in plan.items():
        head, _, rest = name.partition(".")
        if head == "layers":
            layers.setdefault(int(rest.partition(".")[0]), []).append(entry)
    return layers
