"""measure.json as text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Rows = list[list[str]]
SMALL_IS_NOT_ZERO = (
    "A small weight is not a zero. Normal distributions, one for each tensor with its own deviation, would have\n"
    "{normal} of their weights under {t}; measured are {share}. Exactly zero: {zeros}.\n"
    "Making {share} zero costs a relative error of {error}."
)
PLURAL = {"row": "rows", "column": "columns", "4x4": "4x4 blocks", "16x16": "16x16 blocks"}


def terminal(report: dict[str, Any]) -> str:
    """The whole report, short of single tensors."""
    parts = [
        heading(report),
        _magnitudes(report),
        small_is_not_zero(report["by_name"]["in all"]),
        _sparsities(report),
        columns(unit_rows(report)),
        _expected(report),
        _similarity(report),
    ]
    return "\n\n".join(parts)


def heading(report: dict[str, Any]) -> str:
    origin = report["weights"]
    where = origin.get("path") or origin.get("id") or f"SYNTHETIC weights, seed {origin.get('seed')}"
    counted = report["by_name"]["in all"]
    return (
        f"{report['model']}: {where}\n{len(report['tensors'])} tensors, {counted['tensors']} of them counted: "
        f"{counted['weights']:,} weights (not: embedding, head, norms, positions)"
    )


def exact_zeros(facts: dict[str, Any]) -> str:
    """A share, or a number where the share would read as nothing."""
    share = facts["zeros"] / facts["weights"]
    return percent(share) if share >= 0.001 else f"{facts['zeros']:,}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def label(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


def _magnitudes(report: dict[str, Any]) -> str:
    return (
        f"{columns(magnitude_rows(report))}\n"
        "from normal: Kolmogorov-Smirnov distance of |w| from normal distributions, one for each tensor with its rms, "
        "0 to 1\nexp. bits: entropy of the exponent"
    )


def magnitude_rows(report: dict[str, Any]) -> Rows:
    thresholds = [f"{t:g}" for t in report["thresholds"]]
    rows = [["component", "tensors", "weights", *(f"< {t}" for t in thresholds), "rms", "from normal", "exp. bits"]]
    fine = {name: facts for name, facts in report["components"].items() if name not in report["by_name"]}
    for name, facts in [*report["by_name"].items(), *fine.items()]:
        if name == next(iter(fine), None):
            rows.append([])
        rows.append(
            [
                name,
                str(facts["tensors"]),
                f"{facts['weights']:,}",
                *(percent(facts["below"][t]) for t in thresholds),
                f"{facts['rms']:.5f}",
                f"{facts['distance_from_normal']:.4f}",
                f"{facts['exponent_entropy']:.2f}",
            ]
        )
    return rows


def small_is_not_zero(facts: dict[str, Any]) -> str:
    t = "0.01" if "0.01" in facts["below"] else next(reversed(facts["below"]))
    share = facts["below"][t]
    return SMALL_IS_NOT_ZERO.format(
        t=t,
        normal=percent(facts["normal_below"][t]),
        share=percent(share),
        zeros=exact_zeros(facts),
        error=percent(error_at(facts, share)),
    )


def error_at(facts: dict[str, Any], sparsity: float) -> float:
    """The error curve, read between its points."""
    points = [[0.0, 0.0], *(point[:2] for point in facts["curve"]), [1.0, 1.0]]
    for (s0, e0), (s1, e1) in pairwise(points):
        if s0 <= sparsity <= s1:
            return e0 + (e1 - e0) * (sparsity - s0) / (s1 - s0)
    return 1.0


def _sparsities(report: dict[str, Any]) -> str:
    note = "up to: largest |w| dropped, one threshold for the row; error: relative, Frobenius, a threshold per tensor"
    return f"{columns(sparsity_rows(report))}\n{note}"


def sparsity_rows(report: dict[str, Any]) -> Rows:
    first = report["by_name"]["in all"]["at"]
    heads = [cell for at in first for cell in (f"{label(at['sparsity'])}: up to", "error")]
    rows = [["made zero", *heads]]
    for name, facts in report["by_name"].items():
        cells = [cell for at in facts["at"] for cell in (f"{at['threshold']:.5f}", f"{at['error_each']:.3f}")]
        rows.append([name, *cells])
    return rows


def unit_rows(report: dict[str, Any]) -> Rows:
    rows = [["all zero in", "of", *(label(at["sparsity"]) for at in report["by_name"]["in all"]["at"])]]
    for name, facts in report["by_name"].items():
        for kind in facts["at"][0]["all_zero"]:
            found = [at["all_zero"][kind] for at in facts["at"]]
            if name == "in all" or any(units["zero"] for units in found):
                of = f"{found[0]['of']:,}"
                rows.append(
                    [f"{name}: {PLURAL[kind]}", of, *(f"{u['zero']:,} (chance {_few(u['chance'])})" for u in found)]
                )
    return rows


def _few(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _expected(report: dict[str, Any]) -> str:
    dense = next(iter(report["expected"][0]["targets"].values()))["dense_bytes"]
    note = f"expected by the plan's cost model for one token; dense {dense / 1e9:.4g} GB; nothing is run here"
    return f"{columns(expected_rows(report))}\n{note}"


def expected_rows(report: dict[str, Any]) -> Rows:
    machines = list(report["expected"][0]["targets"])
    rows = [["projections pruned", "format", "GB", *(f"{name}: times dense" for name in machines)]]
    for row in report["expected"]:
        targets = row["targets"]
        rows.append(
            [
                f"{label(row['sparsity'])} {row['pruning']}",
                row["format"],
                " / ".join(dict.fromkeys(f"{targets[name]['bytes'] / 1e9:.4g}" for name in machines)),
                *(f"{targets[name]['speedup']:.2f}" for name in machines),
            ]
        )
    return rows


def _similarity(report: dict[str, Any]) -> str:
    similarity = report["similarity"]
    rows = [["cosine of weights", "layers", "largest", "between"]]
    for name, facts in [*similarity["kinds"].items(), *similarity["projections"].items()]:
        rows.append([name, str(len(facts["layers"])), *_largest(facts)])
    for name in ("hidden", "added") if "outputs" in report else ():
        facts = report["outputs"][name]
        rows.append([f"outputs: {name}", str(len(facts["layers"])), *_largest(facts)])
    return f"{columns(rows)}\n{candidates(report)}"


def candidates(report: dict[str, Any]) -> str:
    """Pairs of layers that a fold could join, or that there are none."""
    found = report["similarity"]["candidates"]
    pairs = ", ".join(f"{a} and {b}" for a, b in (each["layers"] for each in found[:8]))
    line = f"Pairs of one kind over {report['similarity']['threshold']}: "
    return f"{line}{pairs or 'none, so no layer can stand for another as it is'}"


def tensor_rows(report: dict[str, Any]) -> Rows:
    """One row for each tensor; the page only."""
    thresholds = [f"{t:g}" for t in report["thresholds"]]
    at = report["tensors"][0]["at"]
    errors = [f"error at {label(each['sparsity'])}" for each in at]
    rows = [["tensor", "shape", "component", "zero", *(f"< {t}" for t in thresholds), "rms", "from normal", *errors]]
    for facts in report["tensors"]:
        rows.append(
            [
                facts["name"],
                "x".join(map(str, facts["shape"])),
                facts["component"],
                percent(facts["zeros"] / facts["weights"]),
                *(percent(facts["below"][t]) for t in thresholds),
                f"{facts['rms']:.5f}",
                f"{facts['distance_from_normal']:.4f}",
                *(f"{each['error']:.3f}" for each in facts["at"]),
            ]
        )
    return rows


def _largest(facts: dict[str, Any]) -> list[str]:
    a, b = facts["largest"]["layers"]
    return [f"{facts['largest']['cosine']:.4f}", f"{a} and {b}"]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right; an empty row is an empty line."""
    wide = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(wide)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
