"""Plots as inline SVG text: lines, bars and heat maps. Colours are classes and variables of the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Text = Callable[[float], str]
Points = Sequence[tuple[float, float]]
SHADES = 24  # steps of a heat map's colour: equal neighbours become one rectangle


@dataclass(frozen=True)
class Frame:
    """A plot's area, in pixels inside its margins, and the range of values it shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 420
    height: int = 240
    left: int = 46
    bottom: int = 34
    top: int = 10
    right: int = 18

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        inner = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + across * inner[0], self.top + (1 - min(max(up, 0.0), 1.0)) * inner[1]


def plot(frame: Frame, marks: Sequence[str], x_label: str, y_label: str, ticks: tuple[int, int] = (5, 5),
         x_text: Text = "{:g}".format, y_text: Text = "{:g}".format) -> str:  # fmt: skip
    """Axes with grid lines and labels around marks that are already in the frame's pixels."""
    parts = [f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" class="plot">']
    for i in range(ticks[1] + 1):
        value = frame.y[0] + (frame.y[1] - frame.y[0]) * i / ticks[1]
        x, y = frame.at(frame.x[0], value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{frame.width - frame.right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x - 5:.1f}" y="{y + 3:.1f}" text-anchor="end">{y_text(value)}</text>')
    for i in range(ticks[0] + 1):
        value = frame.x[0] + (frame.x[1] - frame.x[0]) * i / ticks[0]
        x, y = frame.at(value, frame.y[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 13:.1f}" text-anchor="middle">{x_text(value)}</text>')
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{frame.height - 4}" text-anchor="middle">{x_label}</text>')
    if y_label:
        parts.append(
            f'<text class="label" transform="translate(11 {(frame.height - frame.bottom + frame.top) / 2:.0f}) '
            f'rotate(-90)" text-anchor="middle">{y_label}</text>'
        )
    return "".join([*parts, *marks, "</svg>"])


def line(frame: Frame, points: Points, colour: str, title: str = "", dashed: bool = False) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (frame.at(*point) for point in points))
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path class="line" d="{path}" stroke="{colour}"{dash}><title>{escape(title)}</title></path>'


def bars(frame: Frame, steps: Sequence[tuple[float, float, float]], colour: str) -> str:
    """Filled steps (from, to, height), as one path."""
    base = frame.at(frame.x[0], frame.y[0])[1]
    pieces = []
    for start, stop, height in steps:
        (x0, y), (x1, _) = frame.at(start, height), frame.at(min(stop, frame.x[1]), height)
        if x0 < x1:
            pieces.append(f"M{x0:.1f} {base:.1f}V{y:.1f}H{x1:.1f}V{base:.1f}z")
    return f'<path class="bars" d="{"".join(pieces)}" fill="{colour}"/>'


def heat_map(values: Sequence[Sequence[float]], names: Sequence[int], top: float, size: int = 260) -> str:
    """A square matrix: 0 is the page's ground, `top` and over full colour, negative values another one; no diagonal."""
    count, margin = len(values), 26
    cell = (size - margin) / count
    parts = [f'<svg viewBox="0 0 {size} {size}" role="img" class="heat">']
    parts.append(f'<rect class="ground" x="{margin}" y="0" width="{size - margin}" height="{size - margin}"/>')
    for i, row in enumerate(values):
        shades = [None if i == j else round(max(-1.0, min(1.0, value / top)) * SHADES) for j, value in enumerate(row)]
        start = 0
        for j in range(1, count + 1):
            if j < count and shades[j] == shades[start]:
                continue
            shade = shades[start]
            if shade != 0:
                paint = 'class="self"' if shade is None else _paint(shade)
                parts.append(
                    f'<rect {paint} x="{margin + start * cell:.2f}" y="{i * cell:.2f}" '
                    f'width="{(j - start) * cell:.2f}" height="{cell:.2f}"/>'
                )
            start = j
    step = max(1, -(-count // 8))
    for i in range(0, count, step):
        middle = (i + 0.5) * cell
        parts.append(f'<text class="tick" x="{margin - 4}" y="{middle + 3:.1f}" text-anchor="end">{names[i]}</text>')
        below = f'x="{margin + middle:.1f}" y="{size - margin + 13}"'
        parts.append(f'<text class="tick" {below} text-anchor="middle">{names[i]}</text>')
    return "".join([*parts, "</svg>"])


def _paint(shade: int) -> str:
    colour = "var(--warm)" if shade > 0 else "var(--cold)"
    return f'fill="{colour}" fill-opacity="{abs(shade) / SHADES:.2f}"'
