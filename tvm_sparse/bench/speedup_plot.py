"""Speed-up over the fastest dense product by the share of zeros: a line for each number of tokens, and 1 / (1 - s)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log
from statistics import fmean

from tvm_sparse.bench.tables import Row
from tvm_sparse.measure.svg import Frame, line, plot

_COLOURS = ("#1d4ed8", "#0e9f6e", "#c2410c", "#7c3aed", "#b45309", "#475569", "#be123c")
_GREY = "#94a3b8"
_STYLE = """<style>text { font: 11px sans-serif; fill: #475569 } .grid { stroke: #e2e8f0 } .ground { fill: #fff }
.line { fill: none; stroke-width: 1.8 } .name { font-weight: 600 }</style>
<rect class="ground" width="100%" height="100%"/>"""


def draw(rows: Sequence[Row]) -> str:
    """An SVG file's text: geometric means over the shapes, a dot for each shape."""
    top = 5.0 * ceil(max(10.0, *(float(row["ratio"]) for row in rows)) / 5)  # type: ignore[arg-type]
    frame = Frame((0.0, 1.0), (0.0, top), width=560, height=360, right=96)
    ideal = [(s / 100, 1 / (1 - s / 100)) for s in range(91) if 1 / (1 - s / 100) <= top]
    marks = [line(frame, ideal, _GREY, "1 / (1 - sparsity)", dashed=True)]
    marks.append(line(frame, [(0, 1), (1, 1)], _GREY, "dense"))
    names = [(*frame.at(*ideal[-1]), "1 / (1 - s)", _GREY)]
    lines = {(row["batch"], row.get("threads", "")) for row in rows}
    for colour, key in zip(_COLOURS * 9, sorted(lines, key=lambda key: (int(str(key[0])), str(key[1]))), strict=False):
        points: dict[float, list[float]] = {}
        for row in rows:
            if (row["batch"], row.get("threads", "")) == key:
                points.setdefault(float(row["sparsity"]), []).append(float(row["ratio"]))  # type: ignore[arg-type]
        mean = [(s, exp(fmean(map(log, ratios)))) for s, ratios in sorted(points.items())]
        name = f"batch {key[0]}" + (f", {key[1]} threads" if key[1] else "")
        marks += [_dot(frame, s, ratio, colour) for s, ratios in points.items() for ratio in ratios]
        marks.append(line(frame, mean, colour, name))
        names.append((*frame.at(*mean[-1]), name, colour))
    marks += _apart(names)
    labels = "share of zeros", "times the fastest dense"
    text = plot(frame, marks, *labels, x_text="{:.0%}".format)
    head, _, rest = text.partition(">")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{frame.width}" height="{frame.height}"'
    return f"{head.replace('<svg', f'<svg {size}', 1)}>{_STYLE}{rest}\n"


def _dot(frame: Frame, x: float, y: float, colour: str) -> str:
    across, up = frame.at(x, y)
    return f'<circle cx="{across:.1f}" cy="{up:.1f}" r="2" fill="{colour}" fill-opacity="0.5"/>'


def _apart(names: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """The lines' names beside their ends (x, y in pixels, name, colour), moved down where two would overlap."""
    placed, lowest = [], 0.0
    for x, y, name, colour in sorted(names, key=lambda entry: entry[1]):
        lowest = max(y, lowest + 13)
        placed.append(f'<text class="name" x="{x + 5:.1f}" y="{lowest + 4:.1f}" style="fill: {colour}">{name}</text>')
    return placed
