"""The plots of the page, each from a part of measure.json."""

from __future__ import annotations

from html import escape
from math import erf, exp, pi, sqrt
from typing import Any

from tvm_sparse.measure.svg import Frame, bars, heat_map, line, plot

COLOURS = ("#3b6fd4", "#d9822b", "#2f9e66", "#b8449a", "#c23b3b", "#1a9bb0", "#8a6d1f", "#6b5bd2", "#7a7a7a", "#4f8a10")


def histogram(name: str, facts: dict[str, Any]) -> str:
    """|w| as a density in units of the rms, with that of normal distributions, one for each tensor, over it."""
    rms = facts["rms"]
    steps = [(start / rms, stop / rms, height * rms) for start, stop, height, _ in facts["density"]]
    normal = [((start + stop) / 2 / rms, height * rms) for start, stop, _, height in facts["density"]]
    frame = Frame((0, 4), (0, 1.2), 250, 150, left=30)
    marks = [bars(frame, steps, "var(--bar)"), line(frame, normal, "var(--ink)", "normal", dashed=True)]
    caption = f"{escape(name)} <span>rms {rms:.4g}, from normal {facts['distance_from_normal']:.4f}</span>"
    return figure(plot(frame, marks, "|w| / rms", "", (4, 3)), caption)


def exponents(name: str, facts: dict[str, Any]) -> str:
    """Share of non-zero weights by binary exponent."""
    total = sum(facts["exponents"].values()) or 1
    shares = {int(e): count / total for e, count in facts["exponents"].items()}
    frame = Frame((-24, 4), (0, 0.4), 250, 150, left=34)
    steps = [(e, e + 0.9, share) for e, share in shares.items() if -24 <= e < 4]
    caption = f"{escape(name)} <span>{facts['exponent_entropy']:.2f} bits of 8</span>"
    drawn = plot(frame, [bars(frame, steps, "var(--bar)")], "exponent of |w|", "", (7, 4), y_text="{:.0%}".format)
    return figure(drawn, caption)


def error_curves(rows: dict[str, dict[str, Any]]) -> str:
    """Sparsity against relative error, a line for each row, and what a normal distribution would lose."""
    frame = Frame((0, 1), (0, 1), 640, 360)
    marks, legend = [], []
    for colour, (name, facts) in zip(COLOURS * 3, rows.items(), strict=False):
        marks.append(line(frame, [(0, 0), *((s, error) for s, error, _ in facts["curve"]), (1, 1)], colour, name))
        legend.append(f'<i style="background:{colour}"></i>{escape(name)}')
    marks.append(line(frame, _normal_errors(), "var(--ink)", "normal distribution", dashed=True))
    legend.append('<i class="dash"></i>normal distribution')
    drawn = plot(
        frame,
        marks,
        "sparsity (one threshold for the row)",
        "relative error",
        (10, 5),
        "{:.0%}".format,
        "{:.0%}".format,
    )
    return figure(drawn, f'<div class="legend">{"".join(f"<b>{each}</b>" for each in legend)}</div>', "wide")


def speedups(report: dict[str, Any]) -> str:
    """Expected speed-up of the plan over sparsity, a line for each machine, and 1 / (1 - sparsity)."""
    rows = [row for row in report["expected"] if row["format"] == "plan"]
    top = max([*(t["speedup"] for row in rows for t in row["targets"].values()), 2.0])
    frame = Frame((0, 1), (0, float(-(-top // 1))), 640, 300)
    marks, legend = [], []
    for colour, name in zip(COLOURS, rows[0]["targets"], strict=False):
        points = [(row["sparsity"], row["targets"][name]["speedup"]) for row in rows]
        marks.append(line(frame, [(0.0, 1.0), *points], colour, name))
        legend.append(f'<i style="background:{colour}"></i>{name}')
    bound = [(i / 100, 1 / (1 - i / 100)) for i in range(100) if 1 / (1 - i / 100) <= frame.y[1]]
    marks.append(line(frame, bound, "var(--ink)", "1 / (1 - sparsity)", dashed=True))
    legend.append('<i class="dash"></i>1 / (1 - sparsity)')
    drawn = plot(frame, marks, "sparsity", "times as fast as dense", (5, int(frame.y[1])), "{:.0%}".format)
    return figure(drawn, f'<div class="legend">{"".join(f"<b>{each}</b>" for each in legend)}</div>', "wide")


def similarity(name: str, facts: dict[str, Any]) -> str:
    """A heat map whose full colour is the largest cosine in it, at least 0.05, and said below it."""
    a, b = facts["largest"]["layers"]
    values = facts["cosine"]
    top = max([0.05, *(abs(value) for i, row in enumerate(values) for value in row[:i])])
    drawn = heat_map(values, facts["layers"], top)
    bar = f'<span class="scale"><em>-{top:.2f}</em><u></u><em>{top:.2f}</em></span>'
    largest = f"largest {facts['largest']['cosine']:.4f}, layers {a} and {b}"
    return figure(drawn, f"{escape(name)} <span>{largest}</span>{bar}")


def figure(drawn: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{drawn}<figcaption>{caption}</figcaption></figure>'


def _normal_errors() -> list[tuple[float, float]]:
    """Sparsity and error of cutting a normal distribution at t deviations: sqrt(erf - t phi), in closed form."""
    points = []
    for i in range(81):
        t = i / 20
        share = erf(t / sqrt(2))
        lost = share - t * sqrt(2 / pi) * exp(-t * t / 2)
        points.append((share, sqrt(max(lost, 0.0))))
    return points
