"""The plan: which format each matrix is stored in, decided once, here, from what was measured. Printable, JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, prod, sqrt
from statistics import NormalDist

from tvm_sparse.formats import FORMATS, FormatChoice, Stats
from tvm_sparse.formats.delta import with_pairs
from tvm_sparse.formats.speed import seconds
from tvm_sparse.formats.stats import CHUNK, GAP_BITS
from tvm_sparse.layout import Layout, RuntimeParam
from tvm_sparse.models.config import ModelConfig, tensors
from tvm_sparse.pruning import Pattern
from tvm_sparse.targets import Machine

HANDICAP = {"dense": 0.95, "2:4": 1 / 1.15, "block": 1 / 1.15}


@dataclass(frozen=True)
class PlanEntry:
    """One matrix [N, K]. `seconds` is what a call with `--batch` tokens is expected to take, by machine name.

    `nbytes` are all its buffers; `bits_per_nonzero` counts them by non-zeros (0 where there is none).
    """

    param: str
    choice: FormatChoice
    shape: tuple[int, int]
    density: float
    nbytes: int
    bits_per_nonzero: float
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    dense_seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {**asdict(self), "choice": [self.choice.name, dict(self.choice.options)], "shape": list(self.shape)}

    @staticmethod
    def from_json(data: Mapping) -> PlanEntry:
        name, options = data["choice"]
        choice = FORMATS[name].choice(**options)
        return PlanEntry(**{**data, "choice": choice, "shape": tuple(data["shape"])})


class Plan(dict[str, PlanEntry]):
    """Parameter name -> entry, every matrix of the model, in the layout's order. `print(plan)` is a table."""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.values())

    def to_json(self) -> str:
        return json.dumps({name: entry.to_json() for name, entry in self.items()}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        return Plan({name: PlanEntry.from_json(entry) for name, entry in json.loads(text).items()})

    def __str__(self) -> str:
        rows = [("parameter", "shape", "density", "format", "MB", "bits/nz", "why")]
        for entry in self.values():
            rows.append(
                (
                    entry.param,
                    f"{entry.shape[0]}x{entry.shape[1]}",
                    f"{entry.density:.4f}",
                    str(entry.choice),
                    f"{entry.nbytes / 1e6:.2f}",
                    f"{entry.bits_per_nonzero:.2f}",
                    entry.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]]) for row in rows]
        return "\n".join([*lines, f"{len(self)} matrices, {self.nbytes / 1e9:.3f} GB"])


def decide(
    param: str,
    stats: Stats,
    machines: Sequence[Machine],
    batch: int,
    formats: Collection[str] = tuple(FORMATS),
    pairs: bool = False,
) -> PlanEntry:
    """The fastest format for `batch` tokens at once, over all machines of a library together.

    Every machine weighs the same: what counts is time against dense. A format that is cut for a machine is cut for the
    first. Two thumbs lie on the scale. Dense stays where nothing saves 5 %: it serves prefill and every batch as it is.
    A matrix with structure (2:4, blocks) keeps its own format where that loses less than 15 %: only there can the
    tensor cores use it. A format no smaller than dense has found none. `formats` narrows the choice; where none of them
    fits the matrix stays dense. `pairs` is that of the parameter (layout.py).
    """
    dense = FORMATS["dense"].choice()
    made = [choice for name in FORMATS if name in formats for choice in FORMATS[name].choices(stats, machines[0])]
    candidates = made or [dense]
    times = {choice: {m.name: seconds(stats, choice, m, batch) for m in machines} for choice in {*candidates, dense}}
    ratio = {c: sum(times[c][m] / times[dense][m] for m in times[dense]) / len(machines) for c in candidates}
    size = {choice: FORMATS[choice.name].nbytes(stats, choice) for choice in candidates}
    unstructured = FORMATS["dense"].nbytes(stats, dense)

    def rank(choice: FormatChoice) -> tuple[float, int]:
        thumb = HANDICAP.get(choice.name, 1.0)
        return ratio[choice] * (thumb if choice == dense or size[choice] < unstructured else 1.0), size[choice]

    ranked = sorted(candidates, key=rank)
    best = ranked[0]
    return PlanEntry(
        param=param,
        choice=with_pairs(best) if pairs and best.name == "delta" and machines[0].is_gpu else best,
        shape=stats.shape,
        density=stats.density,
        nbytes=size[best],
        bits_per_nonzero=8 * size[best] / stats.nnz if stats.nnz else 0.0,
        reason=_reason(ranked, ratio),
        seconds=times[best],
        dense_seconds=times[dense],
    )


def keep_dense(param: str, shape: tuple[int, int], nnz: int, reason: str, width: int = 16) -> PlanEntry:
    """The entry of a matrix no format was sought for: the embedding, a head that is not pruned, float32 values."""
    nbytes = prod(shape) * width // 8
    choice = FORMATS["dense"].choice(width=width)
    return PlanEntry(param, choice, shape, nnz / prod(shape), nbytes, 8 * nbytes / nnz if nnz else 0.0, reason)


def declared(
    config: ModelConfig,
    layout: Layout,
    selected: Collection[str],
    sparsity: float,
    pattern: Pattern,
    machines: Sequence[Machine],
    batch: int,
    formats: Collection[str] = tuple(FORMATS),
) -> Plan:
    """The plan of a build without weights: every selected matrix has exactly the zeros it was asked to have."""
    density = 1 - (pattern.sparsity if pattern.sparsity is not None else sparsity)
    known = tensors(config)
    plan = Plan()
    for param in matrices(layout):
        shape = (param.shape[0], param.shape[1])
        pruned = sum(known[source].shape[0] for source in param.sources if source in selected) / shape[0]
        if always_dense(param, selected):
            plan[param.name] = keep_dense(param.name, shape, prod(shape), DENSE_REASON[param.kind])
            continue
        stats = expected_stats(shape, 1 - pruned * (1 - density), pattern if pruned == 1 else Pattern())
        plan[param.name] = decide(param.name, stats, machines, batch, formats, param.pairs)
    return plan


DENSE_REASON = {
    "embedding": "dense: rows are looked up, not multiplied",
    "head": "dense: not pruned (--include lm_head prunes it)",
}


def matrices(layout: Layout) -> Iterable[RuntimeParam]:
    return (param for param in layout.params if param.kind != "vector")


def always_dense(param: RuntimeParam, selected: Collection[str]) -> bool:
    """Matrices that are copied in row blocks and never held whole."""
    return param.kind == "embedding" or (param.kind == "head" and param.sources[0] not in selected)


def expected_stats(shape: tuple[int, int], density: float, pattern: Pattern | None = None) -> Stats:
    """Statistics of a matrix whose zeros fall at random: gaps are geometric, values the largest of normal ones."""
    n, k = shape
    nnz = round(density * n * k)
    words, chunks, longest = {}, {}, {}
    for g in GAP_BITS:
        reach = (1 - density) ** (1 << g)  # a gap is longer than one word reaches
        words[g] = min(n * k, round(nnz * (1 + (reach / (1 - reach) if reach < 1 else k)))) if nnz else 0
        chunks[g] = ceil((words[g] + (CHUNK - 1) / 2 * n) / CHUNK) if nnz else 0  # a row ends anywhere in its last
        longest[g] = ceil(min(k, words[g] / n + 4 * sqrt(words[g] / n * (1 - density))) / CHUNK)
    pattern = pattern or Pattern()
    blocks = {}
    if pattern.kind == "block":
        rows, cols = pattern.rows, pattern.cols
        blocks[rows, cols] = round(density * ceil(n / rows) * ceil(k / cols))
    return Stats(
        shape=shape,
        nnz=nnz,
        negative_zeros=0,
        exponents=_normal_exponents(nnz, density),
        words=words,
        chunks=chunks,
        longest=longest,
        two_four=pattern.kind == "n:m" and pattern.m == 4 and pattern.n <= 2,
        blocks=blocks,
    )


def _normal_exponents(nnz: int, density: float) -> tuple[int, ...]:
    """Exponent histogram of the largest `density` of normal values with deviation 0.011, as trained weights have."""
    normal = NormalDist(sigma=0.011)
    cut = normal.inv_cdf(1 - density / 2) if density < 1 else 0.0

    def above(value: float) -> float:
        return min(1.0, 2 * (1 - normal.cdf(max(value, cut))) / density) if density else 0.0

    return tuple(round(nnz * (above(2.0 ** (e - 127)) - above(2.0 ** (e - 126)))) for e in range(256))


def _reason(ranked: Sequence[FormatChoice], ratio: Mapping[FormatChoice, float]) -> str:
    """One line: the winner's expected time against dense, and what came next of another format."""
    best = ranked[0]
    runner = next((choice for choice in ranked if choice.name not in (best.name, "dense")), None)
    if best.name == "dense":
        return f"dense: {runner} would take {ratio[runner]:.2f} of its time" if runner else "dense: nothing else fits"
    text = f"{1 / ratio[best]:.2f} times as fast as dense"
    return f"{text}, {runner} {1 / ratio[runner]:.2f}" if runner and ratio[runner] < 1 else text
