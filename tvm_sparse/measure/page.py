"""measure.html: the report as one self-contained page, its plots inline SVG; no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tvm_sparse.artefact.writer import FULL
from tvm_sparse.errors import Stopped
from tvm_sparse.measure import plots, tables

STYLE = """
:root { --ink: #1c2330; --soft: #667085; --paper: #fbfbf9; --card: #fff; --rule: #e4e5e0; --bar: #7fa3e0;
        --warm: #c2410c; --cold: #1d4ed8; --mark: #fff6e0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --soft: #98a1b3; --paper: #15181e; --card: #1c2129;
        --rule: #313844; --bar: #4a72b8; --warm: #fb923c; --cold: #60a5fa; --mark: #2d2716 } }
body { margin: 0 auto; max-width: 1120px; padding: 36px 28px 80px; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 19px; margin: 44px 0 4px }
p { max-width: 74ch; margin: 6px 0 14px } .soft, figcaption span, .note { color: var(--soft) }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 16px; flex: 1 }
.tiles b { display: block; font-size: 21px; font-variant-numeric: tabular-nums } .tiles span { color: var(--soft) }
.warn { background: var(--mark); border-left: 4px solid #d9a520; padding: 10px 16px; border-radius: 4px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px }
figure.wide { max-width: 760px } figcaption { font-size: 13px } figcaption span { display: block; font-size: 12px }
table { border-collapse: collapse; width: 100%; font-size: 13px; background: var(--card);
        font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; margin: 10px 0 }
th, td { padding: 5px 11px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600 } td:first-child, th:first-child { text-align: left }
tr.all td { font-weight: 650; border-top: 2px solid var(--rule) } tr.gap td { border-top: 2px solid var(--rule) }
svg { width: 100%; height: auto; display: block; overflow: visible } svg text { font-family: inherit }
.plot .grid { stroke: var(--rule); stroke-width: 1 } .tick { font-size: 9.5px; fill: var(--soft) }
.label { font-size: 10.5px; fill: var(--soft) } .line { fill: none; stroke-width: 1.8 }
.heat .ground { fill: var(--card); stroke: var(--rule) } .heat .self { fill: var(--rule) }
.legend b { font-weight: 400; margin-right: 14px; white-space: nowrap }
.legend i { display: inline-block; width: 16px; height: 3px; vertical-align: middle; margin-right: 5px }
.legend i.dash { background: repeating-linear-gradient(90deg, var(--ink) 0 4px, transparent 4px 7px) }
figcaption .scale { display: flex; align-items: center; gap: 6px } .scale em { font-style: normal }
.scale u { flex: 1; height: 6px; background: linear-gradient(90deg, var(--cold), var(--card), var(--warm)) }
details { margin-top: 12px } summary { cursor: pointer; font-weight: 600 }
"""


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Writes under a temporary name and renames. Raises Stopped where the disk is full."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(page(report), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Stopped(f"the disk is full: no room for {path}; make room and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def page(report: dict[str, Any]) -> str:
    title = escape(report["model"])
    body = [
        *_top(report), *_magnitudes(report), *_sparsity(report), *_exponents(report), *_zero_units(report),
        *_expected(report), *_similarity(report), *_tensors(report),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}: weights</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>'
    )


def _top(report: dict[str, Any]) -> list[str]:
    everything = report["by_name"]["in all"]
    where, count = tables.heading(report).split("\n")
    tiles = [
        (f"{everything['weights'] / 1e9:.3f} billion" if everything["weights"] > 1e9 else f"{everything['weights']:,}",
         "weights counted"),
        (f"{everything['rms']:.4f}", "root mean square"),
        (tables.exact_zeros(everything), "exactly zero"),
        (f"{everything['distance_from_normal']:.4f}", "distance from normal, 0 to 1"),
    ]  # fmt: skip
    tiles += [(tables.percent(at["error_each"]), f"error at {tables.label(at['sparsity'])} sparsity")
              for at in everything["at"] if at["sparsity"] in (0.5, 0.75)]  # fmt: skip
    synthetic = "path" not in report["weights"] and "id" not in report["weights"]
    return [
        f"<h1>What is in the weights</h1><p class=soft>{escape(where)}<br>{escape(count)}</p>",
        "<p class=warn>These are synthetic weights: the figures are of a generator, not of a model.</p>" * synthetic,
        '<div class="tiles">' + "".join(f"<div><b>{b}</b><span>{s}</span></div>" for b, s in tiles) + "</div>",
        f"<p class=warn>{escape(tables.small_is_not_zero(everything))}</p>",
    ]


def _magnitudes(report: dict[str, Any]) -> list[str]:
    shown = [plots.histogram(name, facts) for name, facts in report["components"].items() if facts["density"]]
    return [
        "<h2>Magnitudes</h2><p>The share of weights under each threshold, by component. ",
        "“other” is everything that is counted and has none of the seven names; it is split below the line.</p>",
        _table(tables.magnitude_rows(report)),
        "<p class=note>From normal: Kolmogorov-Smirnov, the largest gap, over all magnitudes, between the share of ",
        "weights under one and that of normal distributions, one for each tensor with its root mean square. ",
        "They are the dashed lines below. Exponent bits: entropy.</p>",
        f'<div class="grid">{"".join(shown)}</div>',
    ]


def _sparsity(report: dict[str, Any]) -> list[str]:
    return [
        "<h2>Sparsity against error</h2><p>What magnitude pruning drops of a matrix: the Frobenius norm of dropped ",
        "weights over that of all. It ranks matrices and thresholds; what a model loses, only its perplexity says.</p>",
        plots.error_curves(report["by_name"]),
        _table(tables.sparsity_rows(report)),
        "<p class=note>Up to: the largest |w| dropped with one threshold for the row. Error: with one per tensor.</p>",
    ]


def _exponents(report: dict[str, Any]) -> list[str]:
    shown = [plots.exponents(name, facts) for name, facts in report["by_name"].items()]
    return [
        "<h2>Exponents</h2><p>A bfloat16 spends 8 bits on the exponent; few of its values occur, which is room ",
        "for an index beside the value.</p>",
        f'<div class="grid">{"".join(shown)}</div>',
    ]


def _zero_units(report: dict[str, Any]) -> list[str]:
    return [
        "<h2>All-zero rows, columns and blocks</h2><p>How many would be all zero after magnitude pruning, and how ",
        "many the same share of zeros at random places would make. Near chance means there is no structure to use.</p>",
        _table(tables.unit_rows(report)),
    ]


def _expected(report: dict[str, Any]) -> list[str]:
    return [
        "<h2>Bytes and speed-up to expect</h2><p>From the plan's cost model, one token at a time, all projections ",
        "together; nothing is run here. “plan” takes the fastest format for each matrix.</p>",
        plots.speedups(report),
        _table(tables.expected_rows(report)),
    ]


def _similarity(report: dict[str, Any]) -> list[str]:
    similarity = report["similarity"]
    maps = [plots.similarity(f"whole layers, {name}", facts) for name, facts in similarity["kinds"].items()]
    maps += [plots.similarity(name, facts) for name, facts in similarity["projections"].items()]
    found = [
        "<h2>Layer similarity</h2><p>Cosine of every pair of layers of a kind, as weights. ",
        f"{escape(tables.candidates(report))}. Each map has its own scale.</p>",
        f'<div class="grid">{"".join(maps)}</div>',
    ]
    if "outputs" in report:
        outputs = report["outputs"]
        names = {"hidden": "hidden state after the layer", "added": "what the layer adds"}
        maps = [plots.similarity(text, outputs[name]) for name, text in names.items()]
        found += [
            f"<h2>Layer outputs</h2><p>On {outputs['tokens']:,} tokens of text, mean over tokens. Hidden states ",
            "are alike because every layer adds to one stream; what a layer adds is its own.</p>",
            f'<div class="grid">{"".join(maps)}</div>',
        ]
    return found


def _tensors(report: dict[str, Any]) -> list[str]:
    rows = tables.tensor_rows(report)
    return [f"<h2>Every tensor</h2><details><summary>{len(rows) - 1} tensors</summary>{_table(rows)}</details>"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines, gap = [], False
    for row in body:
        kind = "all" if row and row[0] == "in all" else "gap" if gap else ""
        gap = not row
        if row:
            lines.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
