"""`bench kernels`: the packed matmul against the fastest dense product of the same run.

Weights are random with zeros at random places. What runs on a CPU is in cpu_race.py, on a GPU in gpu_race.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from math import exp, log
from pathlib import Path
from statistics import fmean

import torch

from tvm_sparse.bench.options import Options, parse
from tvm_sparse.bench.results import merge
from tvm_sparse.bench.speedup_plot import draw
from tvm_sparse.bench.tables import Row, render
from tvm_sparse.errors import Refusal

KEYS = ("machine", "shape", "sparsity", "batch", "threads", "format")
"""What tells rows of several runs apart; a later run's row takes the place of an earlier one's."""


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    if options.machine.is_gpu:
        _on_gpu(options, argv)
        return
    from tvm_sparse.bench import cpu_race

    rows = (row for threads in options.threads for row in cpu_race.measure_all(options, threads))
    publish(options, rows, origin(argv) | cpu_race.machine())


def _on_gpu(options: Options, argv: Sequence[str]) -> None:
    """The library is built here and run here, or either alone: --build-library FILE, --library FILE."""
    from tvm_sparse.bench import gpu_library, gpu_race

    with tempfile.TemporaryDirectory() as folder:
        library = Path(options.library or options.build_library or f"{folder}/kernels.so")
        if not options.library:
            gpu_library.build(library, gpu_race.specs(options), options.machine)
        if options.build_library:
            return
        if not torch.cuda.is_available():
            raise Refusal(f"bench kernels --target {options.machine.name}: no GPU here (--build-library FILE builds)")
        publish(options, gpu_race.measure_all(options, library), origin(argv) | gpu_race.machine())


def publish(options: Options, measured: Iterable[Row], notes: Mapping[str, object]) -> None:
    """Merges each row into --out as it comes, and prints all of this run: those before a failure or Ctrl-C, too."""
    rows: list[Row] = []
    try:
        for row in measured:
            rows.append(row)
            if options.out:
                _keep(Path(options.out), row, notes)
    finally:
        if rows:
            print(render([*rows, *geometric_means(rows)], options.fmt, notes), flush=True)


def _keep(folder: Path, row: Row, notes: Mapping[str, object]) -> None:
    merged = merge(folder, "kernels", [row], KEYS, notes)
    if means := geometric_means(merged):
        merge(folder, "kernels", [], KEYS, notes, {"Geometric means over the shapes": means})
    (folder / "kernels.svg").write_text(draw(merged), encoding="utf-8")


def origin(argv: Sequence[str]) -> dict[str, object]:
    """What was run and when; the machine is the runner's to say."""
    return {"command": " ".join(["python -m tvm_sparse.bench kernels", *argv]), "date": date.today().isoformat()}


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """One row for each sparsity, batch and number of threads: the ratio over the shapes."""
    names = [name for name in ("sparsity", "batch", "threads") if name in rows[0]]
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key, []).append(float(row["ratio"]))  # type: ignore[arg-type]
    if max(len(group) for group in groups.values()) < 2:
        return []
    blank = dict.fromkeys(rows[0], "")
    return [
        {**blank, "shape": "geometric mean", **dict(zip(names, key, strict=True)), "ratio": exp(fmean(map(log, group)))}
        for key, group in groups.items()
    ]
