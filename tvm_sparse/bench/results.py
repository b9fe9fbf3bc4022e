"""A folder of benchmark results that grows over several runs: rows merged by key, written as JSON, CSV and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tvm_sparse.bench.tables import Row, render


def merge(
    folder: Path,
    name: str,
    rows: Sequence[Row],
    keys: Sequence[str],
    notes: Mapping[str, object],
    appendix: Mapping[str, Sequence[Row]] | None = None,
) -> list[Row]:
    """Adds `rows` to `folder`/`name`.json; a row whose `keys` are there already takes the place of the old one.

    Each row carries the notes (command, date, machine) of the run it came from. A value that is a mapping makes a
    table of its own in the Markdown, under its key, and columns in the CSV. `appendix` holds tables that follow under
    their titles. Returns all rows, old ones first.
    """
    path = folder / f"{name}.json"
    known: dict[tuple, Row] = {}
    for row in [*_read(path), *({**row, **notes} for row in rows)]:
        known[tuple(str(row.get(key)) for key in keys)] = row
    merged = list(known.values())
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({"rows": merged}, indent=1) + "\n")
    shown = [{key: value for key, value in row.items() if key not in notes} for row in merged]
    origins = {f"run {i + 1}": text for i, text in enumerate(dict.fromkeys(_origin(row, notes) for row in merged))}
    titles = dict.fromkeys(key for row in shown for key, value in row.items() if isinstance(value, Mapping))
    plain = [{key: value for key, value in row.items() if key not in titles} for row in shown]
    tables = {title: _inside(shown, title, keys) for title in titles} | dict(appendix or {})
    parts = [
        render(level(plain), "md", origins),
        *(f"## {name}\n\n{render(t, 'md', {})}" for name, t in tables.items()),
    ]
    _write(folder / f"{name}.md", "\n\n".join(part.rstrip() for part in parts) + "\n")
    _write(folder / f"{name}.csv", render(level([_flat(row) for row in shown]), "csv", {}) + "\n")
    return merged


def level(rows: Sequence[Row]) -> list[Row]:
    """All rows with the same columns, in the order of their first use."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]


def _inside(rows: Sequence[Row], title: str, keys: Sequence[str]) -> list[Row]:
    """What stands under `title`, behind the keys of its row."""
    return level(
        [
            {key: row[key] for key in keys if key in row} | dict(inside)
            for row in rows
            if isinstance(inside := row.get(title), Mapping)
        ]
    )


def _flat(row: Row) -> Row:
    flat: dict[str, object] = {}
    for key, value in row.items():
        flat |= {f"{key}: {name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _origin(row: Row, notes: Mapping[str, object]) -> str:
    return "; ".join(str(row[key]) for key in notes if row.get(key))


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
