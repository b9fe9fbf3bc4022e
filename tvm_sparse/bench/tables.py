"""Rows of a benchmark as a Markdown table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence

Row = Mapping[str, object]


def render(rows: Sequence[Row], fmt: str, notes: Mapping[str, object]) -> str:
    """`notes` (machine, versions) go under the Markdown table and into the JSON; CSV is the rows alone."""
    if fmt == "json":
        return json.dumps({**notes, "rows": list(rows)}, indent=1)
    if fmt == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().rstrip("\n")
    return "\n".join([*_markdown(rows), "", *(f"{key}: {value}" for key, value in notes.items())])


def _markdown(rows: Sequence[Row]) -> list[str]:
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
