"""report.json and report.md: per matrix what runs and what it costs, and how the build went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm_sparse.artefact.writer import write_json
from tvm_sparse.folding.page import fold_lines
from tvm_sparse.plan import Plan, PlanEntry
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.targets import Machine


def make_report(
    facts: dict[str, Any], plan: Plan, library: dict[str, Any], machines: Sequence[Machine], weights: dict[str, Any]
) -> dict[str, Any]:
    """Everything the two files say, as one JSON object.

    `facts` head it, `library` is library.json (kernel -> where its schedule came from), `weights` the values' origin.
    """
    schedules = library["schedules"]
    matrices = [_row(entry, schedules, machines[0], facts["dtype"], facts["batch"]) for entry in plan.values()]
    return {**facts, "weights": weights, "bytes": plan.nbytes, "matrices": matrices, "kernels": schedules}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_json(folder / "report.json", report)
    temporary = folder / "report.md.partial"
    temporary.write_text(_markdown(report), encoding="utf-8")
    temporary.replace(folder / "report.md")


def _row(entry: PlanEntry, schedules: dict[str, str], machine: Machine, dtype: str, batch: int) -> dict[str, Any]:
    n, k = entry.shape
    out = "float32" if entry.param in ("lm_head.weight", "embed_tokens.weight") else dtype
    plain = KernelSpec(entry.choice, n, k, batch, dtype, out, machine.arch).name
    kernel = next((name for name in schedules if name == plain or name.startswith(f"{plain}_")), "")  # or a fused one
    expected = {
        name: entry.dense_seconds[name] / seconds for name, seconds in entry.seconds.items() if seconds
    }
    return {
        "param": entry.param,
        "shape": [n, k],
        "density": entry.density,
        "format": str(entry.choice),
        "bytes": entry.nbytes,
        "bits_per_nonzero": entry.bits_per_nonzero,
        "kernel": kernel,
        "schedule": schedules.get(kernel, ""),
        "expected_speedup": expected,
        "reason": entry.reason,
    }


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['model']}",
        "",
        *(f"- {key}: {_plain(report[key])}" for key in ("targets", "dtype", "batch", "context", "pruning", "weights")),
        f"- packed bytes: {report['bytes']:,}",
        f"- peak memory of the build: {report['peak_memory'] / 2**30:.2f} GiB",
        *(f"- {name}: {seconds:.1f} s" for name, seconds in report["seconds"].items()),
        *(f"- note: {note}" for note in report["notes"]),
        *fold_lines(report["fold"]),
        "",
        "Expected speed-up is the plan's estimate against the dense kernel, not a measurement.",
        "",
        "| parameter | shape | density | format | bytes | bits / non-zero | schedule | expected | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["matrices"]:
        expected = ", ".join(f"{name} {value:.2f}" for name, value in row["expected_speedup"].items())
        lines.append(
            f"| {row['param']} | {row['shape'][0]}x{row['shape'][1]} | {row['density']:.4f} | {row['format']} "
            f"| {row['bytes']:,} | {row['bits_per_nonzero']:.2f} | {row['schedule'] or '-'} | {expected or '-'} "
            f"| {row['reason']} |"
        )
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(part) for part in value)
    return str(value)
