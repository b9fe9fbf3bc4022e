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

    Each row carries the notes (command, date, machine) of the run it came from. `appendix` holds tables that follow
    under their titles in the Markdown. Returns all rows, old ones first.
    """
    path = folder / f"{name}.json"
    known: dict[tuple, Row] = {}
    for row in [*_read(path), *({**row, **notes} for row in rows)]:
        known[tuple(str(row.get(key)) for key in keys)] = row
    merged = list(known.values())
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({"rows": merged}, indent=1) + "\n")
    shown = [{key: value for key, value in row.items() if key not in notes} for row in merged]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    level = [{key: row.get(key, "") for key in columns} for row in shown]
    origins = {f"run {i + 1}": text for i, text in enumerate(dict.fromkeys(_origin(row, notes) for row in merged))}
    tables = [
        render(level, "md", origins),
        *(f"## {title}\n\n{render(t, 'md', {})}" for title, t in (appendix or {}).items()),
    ]
    _write(folder / f"{name}.md", "\n\n".join(table.rstrip() for table in tables) + "\n")
    _write(folder / f"{name}.csv", render(level, "csv", {}) + "\n")
    return merged


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
