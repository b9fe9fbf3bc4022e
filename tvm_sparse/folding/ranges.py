"""Layers as the command line names them: `--fold 8:24` (half-open), `--layers 0-33,26-63` (closed, as executed)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby

from tvm_sparse.errors import Refusal
from tvm_sparse.models.config import LINEAR, ModelConfig

KINDS = {LINEAR: "DeltaNet", "full_attention": "attention"}
Range = tuple[int, int]
"""Layers [start, stop)."""


def parse_fold(text: str) -> tuple[Range, ...]:
    """Reads `8:24` or a comma list of such ranges. Raises Refusal."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", part)
        if match is None:
            raise Refusal(f"--fold: {part.strip()!r} is no range of layers: write 8:24 for layers 8 to 23, or auto")
        start, stop = int(match[1]), int(match[2])
        if stop < start:
            raise Refusal(f"--fold {start}:{stop} goes backwards: write {stop}:{start}")
        found.append((start, stop))
    for one, other in combinations(sorted(found), 2):
        if other[0] < one[1]:
            last = min(one[1], other[1]) - 1
            both = f"layer {last}" if last == other[0] else f"layers {other[0]} to {last}"
            raise Refusal(
                f"--fold {one[0]}:{one[1]} and {other[0]}:{other[1]} overlap, {both} would be folded twice: "
                f"write {one[0]}:{max(one[1], other[1])}, or ranges that do not meet"
            )
    return tuple(found)


def parse_layers(text: str) -> tuple[Range, ...]:
    """Reads `0-33,26-63`: closed ranges, or single layers, in the order of execution. Raises Refusal."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise Refusal(f"--layers: {part.strip()!r} is no range of layers: write 0-33,26-63, the last included")
        start, last = int(match[1]), int(match[2] or match[1])
        if last < start:
            raise Refusal(f"--layers {start}-{last} goes backwards: layers of a range go up, write {last}-{start}")
        found.append((start, last + 1))
    return tuple(found)


def period(kinds: Sequence[str]) -> int:
    """Length of the pattern that a model's kinds of layers repeat: 4 in Qwen3.5."""
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def tied_layers(config: ModelConfig, ranges: Sequence[Range]) -> tuple[tuple[int, ...], ...]:
    """The layers that become one, kind by kind, in each range.

    A range is whole periods of the model's pattern, or neighbours of one kind. Raises Refusal for any other, with the
    nearest that is one.
    """
    for start, stop in ranges:
        if not _foldable(config.layer_types, start, stop):
            raise Refusal(f"--fold {start}:{stop} {_fault(config, start, stop)}; {_nearest_fold(config, start, stop)}")
    return tuple(
        layers
        for start, stop in ranges
        for kind in dict.fromkeys(config.layer_types[start:stop])
        for layers in [tuple(i for i in range(start, stop) if config.layer_types[i] == kind)]
        if len(layers) > 1
    )


def executed_layers(config: ModelConfig, ranges: Sequence[Range]) -> tuple[int, ...]:
    """The layers of `--layers` one after the other.

    What runs must repeat the model's pattern of kinds, so that it is a Qwen3.5 of another depth. Raises Refusal for
    a range that is not in the model or breaks the pattern, with the nearest that does neither.
    """
    kinds = config.layer_types
    repeats = period(kinds)
    found: list[int] = []
    for start, stop in ranges:
        said = f"--layers {_closed(start, stop)}"
        if stop > len(kinds):
            fits = f"nearest is {_closed(min(start, len(kinds) - 1), len(kinds))}"
            raise Refusal(f"{said} is out of the model, which has layers 0 to {len(kinds) - 1}; {fits}")
        for layer in range(start, stop):
            wanted = kinds[len(found) % repeats]
            if kinds[layer] != wanted:
                place = (len(found) - (layer - start)) % repeats
                near = min((i for i in range(len(kinds)) if i % repeats == place), key=lambda i: abs(i - start))
                raise Refusal(
                    f"{said} leaves the pattern {pattern(kinds)}: layer {layer} ({KINDS[kinds[layer]]}) would run "
                    f"where {KINDS[wanted]} is due, after {len(found)} layers; "
                    f"nearest is {_closed(near, max(stop, near + 1))}"
                )
            found.append(layer)
    return tuple(found)


def pattern(kinds: Sequence[str]) -> str:
    return f"[{', '.join(KINDS[kind] for kind in kinds[: period(kinds)])}]"


def spelled(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ",".join(_closed(run[0], run[-1] + 1) for run in runs)


def _closed(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def _foldable(kinds: Sequence[str], start: int, stop: int) -> bool:
    if not 0 <= start < stop <= len(kinds) or stop - start < 2:
        return False
    repeats = period(kinds)
    whole = start % repeats == 0 and stop % repeats == 0
    return len(set(kinds[start:stop])) == 1 or (whole and len(set(kinds[start:stop])) < stop - start)


def _fault(config: ModelConfig, start: int, stop: int) -> str:
    kinds = config.layer_types
    if stop > len(kinds):
        return f"is out of the model, which has layers 0 to {len(kinds) - 1}"
    if stop - start < 2:
        return "has no two layers to make one of"
    return (
        f"cuts layers {start} to {stop - 1} out of the pattern {pattern(kinds)}, whose kinds it would mix: "
        "a range holds whole patterns or one kind"
    )


def _nearest_fold(config: ModelConfig, start: int, stop: int) -> str:
    ranges = list(_fold_ranges(config.layer_types))
    if not ranges:
        return "no range of this model can be folded"
    near = min(ranges, key=lambda r: (abs(r[0] - start) + abs(r[1] - stop), r[0] - r[1]))
    return f"nearest is {near[0]}:{near[1]}"


def _fold_ranges(kinds: Sequence[str]) -> Iterator[Range]:
    return (r for r in combinations(range(len(kinds) + 1), 2) if _foldable(kinds, *r))
