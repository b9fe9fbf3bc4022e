"""The quality study: what pruning costs a model, by method and sparsity, and what fine-tuning brings back.

    python quality_study.py run study --text text --results results.json --device cuda
    python quality_study.py table results.json --plot ../docs/quality.svg --page ../docs/quality.md

`study` and `text` are what train_study.py wrote. Every case prunes the dense model by `tvm_sparse.prune` and judges the
result on the held-out pages: windows of 512 tokens from an empty cache, float32, as `tvm_sparse.evaluate` does it, in
batches. What `results.json` has already is not done again; several files, of runs with different `--only`, make
one table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where tvm_sparse is not installed

from tvm_sparse.measure.svg import Frame, line, plot
from tvm_sparse.prune import prune
from tvm_sparse.pruning.distillation import load
from tvm_sparse.pruning.request import parse_prune

LEVELS = ("50", "60", "70", "75", "80", "90", "2:4")
METHODS = {
    "magnitude": "--prune magnitude",
    "wanda": "--prune wanda",
    "wanda, by matrix": "--prune wanda --granularity matrix",
    "sparsegpt": "--prune sparsegpt",
    "admm": "--prune admm",
    "sparsegpt, follow": "--prune sparsegpt --follow 0.5",
    "admm, follow": "--prune admm --follow 0.5",
    "wanda, owl": "--prune wanda --allocation owl",
    "sparsegpt, owl": "--prune sparsegpt --allocation owl",
    "admm, follow, owl": "--prune admm --follow 0.5 --allocation owl",
    "magnitude, tuned": "--prune magnitude --finetune 120",
    "admm, follow, tuned": "--prune admm --follow 0.5 --finetune 120",
    "admm, follow, tuned by layer": "--prune admm --follow 0.5 --finetune 100 --finetune-by layer",
}
CALIBRATE = "--samples 512 --length 512 --seed 0"
TUNE = "--finetune-batch 64 --finetune-rate 2e-3"
# beside the table: one thing changed at a time
SIDE = {
    **{f"sparsegpt, {n} samples": f"--prune sparsegpt --samples {n}" for n in (16, 64)},
    **{
        f"tuned, rate {rate}, hidden {hidden}":
        f"--prune magnitude --finetune 150 --finetune-rate {rate} --finetune-hidden {hidden}"
        for rate, hidden in (("1e-3", 0), ("2e-3", 0), ("4e-3", 0), ("2e-3", 1))
    },
    **{
        f"tuned by layer, rate {rate}": f"--prune magnitude --finetune-by layer --finetune 100 --finetune-rate {rate}"
        for rate in ("1e-3", "3e-3")
    },
}  # fmt: skip
WINDOW, BATCH, TOKENS = 512, 16, 60_000
FILES = ("text", "teacher")  # of what prune says about fine-tuning
SPEEDS = Path(__file__).resolve().parent.parent / "tuning_logs" / "nvidia-h200" / "bench" / "model.json"
FIELDS = (  # title, key of a result, format
    ("perplexity", "perplexity", "{:.2f}"),
    ("KL divergence", "divergence", "{:.3f}"),
    ("same likeliest token", "same_top", "{:.1%}"),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000", "#999933", "#882255", "#44aa99",
           "#aa4499", "#661100")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Runs


def cases() -> Iterator[tuple[str, list[str]]]:
    """(key, arguments of prune) of every case; the key is "METHOD @ LEVEL"."""
    for level in LEVELS:
        for name, argv in METHODS.items():
            if level != "2:4" or ("owl" not in name and "by matrix" not in name):
                yield f"{name} @ {level}", arguments(argv, level)
    for level in ("60", "75"):
        for name, argv in SIDE.items():
            if level == "75" or "tuned" not in name:
                yield f"{name} @ {level}", arguments(argv, level)


def arguments(argv: str, level: str) -> list[str]:
    share = "--sparsity 0.5 --pattern 2:4" if level == "2:4" else f"--sparsity 0.{level}"
    return f"{CALIBRATE} {TUNE} {share} {argv}".split()


def run(options: argparse.Namespace) -> None:
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    began, dense = time.monotonic(), load(options.model, torch.device(options.device)).eval()
    windows = held_out(options.model, options.text / "heldout.txt").to(options.device)
    if "dense @ 0" not in results:
        save(results, "dense @ 0", judge(dense, dense, windows) | machine(options.device), options.results)
    with tempfile.TemporaryDirectory() as folder:
        for key, argv in cases():
            if key in results or not re.search(options.only, key):
                continue
            if time.monotonic() - began > options.seconds:
                print("out of time: the same command goes on")
                break
            save(results, key, one(options, argv, dense, windows, Path(folder)), options.results)


def one(options: argparse.Namespace, argv: list[str], dense: Any, windows: torch.Tensor, kept: Path) -> dict[str, Any]:
    """Prunes and judges. What is fine-tuned goes on from the same model pruned in one shot, where `kept` has it."""
    began = time.monotonic()
    tuning = argv.index("--finetune") if "--finetune" in argv else len(argv)
    shot = kept / hashlib.sha256(" ".join(argv[:tuning]).encode()).hexdigest()
    text = ["--text", str(options.text / "calibration.txt")]
    made, summary = shot, zeros(options, options.model, [*argv[:tuning], *text], shot)
    try:
        if tuning < len(argv):
            made, text = kept / "tuned", ["--finetune-text", str(options.text / "tuning.txt")]
            learn = [*f"{CALIBRATE} {TUNE} --prune none --teacher".split(), str(options.model), *argv[tuning:]]
            summary = zeros(options, shot, learn + text, made)
        took = time.monotonic() - began
        found = judge(load(made, torch.device(options.device)).eval(), dense, windows)
    finally:
        shutil.rmtree(kept / "tuned", ignore_errors=True)
    facts = {"argv": " ".join(argv), "sparsity": summary["total"]["sparsity"], "seconds": round(took, 1)}
    return found | facts | {"finetune": by_name(summary.get("finetune"))} | machine(options.device)


def by_name(finetune: dict[str, Any] | None) -> dict[str, Any] | None:
    """Files by their names alone: results are published, folders are this machine's."""
    return finetune and {key: Path(found).name if key in FILES and found else found for key, found in finetune.items()}


def zeros(options: argparse.Namespace, model: Path, argv: list[str], out: Path) -> dict[str, Any]:
    """One command of prune; what it says goes to a file beside `out`. Returns the summary, of an old run too."""
    request = parse_prune([*argv, "--model", str(model), "--device", options.device, "--out", str(out)])
    with out.with_suffix(".log").open("w") as log, redirect_stderr(log):
        return prune(request)


def held_out(model: Path, text: Path) -> torch.Tensor:
    """Windows [count, 512] of the first 60,000 tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids[:TOKENS]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.inference_mode()
def judge(model: Any, dense: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity, KL(dense || model) in nats a token with its standard error, and how often both hold one likeliest."""
    losses, divergences, same = [], [], []
    for ids in windows.split(BATCH):
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        ours, theirs = (one(**given).logits[:, :-1].float().log_softmax(-1) for one in (model, dense))
        losses.append(-ours.gather(2, ids[:, 1:, None]).double().flatten())
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1).double().flatten())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).double().flatten())
    apart = torch.cat(divergences)
    return {
        "perplexity": float(torch.cat(losses).mean().exp()),
        "divergence": float(apart.mean()),
        "divergence_error": float(apart.std() / len(apart) ** 0.5),
        "same_top": float(torch.cat(same).mean()),
        "tokens": len(apart),
    }


def machine(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    return {"machine": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"}


def save(results: dict[str, Any], key: str, found: dict[str, Any], path: Path) -> None:
    results[key] = found
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(results, indent=1) + "\n")
    writing.rename(path)
    print(f"{key:34} perplexity {found['perplexity']:9.3f}  KL {found['divergence']:.4f}  same top "
          f"{found['same_top']:.2%}  {found.get('seconds', 0):5.1f} s", flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Table and plot


def table(options: argparse.Namespace) -> None:
    """Prints perplexity, divergence and agreement by method and level, or puts them into a page; draws a plot."""
    results = {key: found for path in options.results for key, found in json.loads(path.read_text()).items()}
    first = summary(results, milliseconds(options.speeds))
    sections = {"summary": first, "methods": by_method(results), "changes": changes(results)}
    if options.plot:
        options.plot.write_text(drawing(results) + "\n", encoding="utf-8")
    if not options.page:
        print("\n\n".join(sections.values()))
        return
    page = options.page.read_text(encoding="utf-8")
    for name, text in sections.items():
        start, stop = f"<!-- {name}: written by quality_study.py -->\n", f"\n<!-- end of {name} -->"
        before, after = page.split(start, 1)
        page = before + start + text + stop + after.split(stop, 1)[1]
    options.page.write_text(page, encoding="utf-8")


def milliseconds(path: Path) -> dict[str, str]:
    """By level: one token of Qwen3.5-27B, batch 1, position 0, as `tvm_sparse.bench model` found it."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        share, _, how = row["weights"].partition(", ")
        if (row["model"], row["batch"], row["depth"], row["test"][:2], how) == ("qwen3.5-27b", 1, 0, "tg", "random"):
            found[share.removesuffix("% zeros").partition(" as ")[0]] = f"{row['ms/token']:.2f}"
    return found


def summary(results: dict[str, Any], speeds: dict[str, str]) -> str:
    """One row a level: the best in one shot, the best fine-tuned, and how fast the 27B decodes there."""
    titles = " | ".join(title for title, _, _ in FIELDS)
    rows = [f"| zeros | in one shot | {titles} | fine-tuned | {titles} | 27B, ms a token |", "|---" * 10 + "|"]
    for level in ("dense", *LEVELS):
        cells = []
        for tuned in (False, True):
            there = {
                name: found
                for name, _, at in (key.rpartition(" @ ") for key in results)
                if at == level and ("tuned" in name) == tuned and (found := results[f"{name} @ {at}"])
            }
            if level == "dense" and not tuned:
                there = {"": results["dense @ 0"]}
            best = min(there, key=lambda name: there[name]["perplexity"], default=None)
            found = None if best is None else there[best]
            cells += [best or "", *(text.format(found[field]) if found else "" for _, field, text in FIELDS)]
        rows.append(f"| {shown(level)} | " + " | ".join([*cells, speeds.get(level, "")]) + " |")
    return "\n".join(rows)


def by_method(results: dict[str, Any]) -> str:
    """One table a figure, methods by levels."""
    tables = []
    for title, field, text in FIELDS:
        rows = [f"| {title} | " + " | ".join(map(shown, LEVELS)) + " |", "|---" * (1 + len(LEVELS)) + "|"]
        for name in METHODS:
            found = [results.get(f"{name} @ {level}") for level in LEVELS]
            if any(found):
                rows.append(f"| {name} | " + " | ".join(text.format(one[field]) if one else "" for one in found) + " |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def changes(results: dict[str, Any]) -> str:
    rows = ["| one thing changed | perplexity | KL divergence |", "|---|---|---|"]
    for key, found in results.items():
        if key.split(" @ ")[0] in SIDE:
            rows.append(f"| {key.replace(' @ ', ' at ')} % | {found['perplexity']:.2f} | {found['divergence']:.3f} |")
    return "\n".join(rows)


def shown(level: str) -> str:
    return f"{level} %" if level.isdigit() else level


def drawing(results: dict[str, Any]) -> str:
    """Perplexity (logarithmic) by sparsity, one line a method, as a file of its own."""
    shares = [level for level in LEVELS if level != "2:4"]
    lines = {
        name: [(float(level), log10(results[f"{name} @ {level}"]["perplexity"]))
               for level in shares if f"{name} @ {level}" in results]
        for name in METHODS
    }  # fmt: skip
    lines = {name: points for name, points in lines.items() if len(points) > 3}
    dense = log10(results["dense @ 0"]["perplexity"])
    top = max(y for points in lines.values() for _, y in points)
    frame = Frame((50, 90), (floor(dense * 4) / 4, ceil(top * 4) / 4), width=640, height=360, right=150)
    marks = [line(frame, [(50, dense), (90, dense)], "#888", "dense", dashed=True)]
    last = float("inf")
    for (name, points), colour in zip(sorted(lines.items(), key=lambda item: item[1][-1][1]), COLOURS, strict=False):
        marks.append(line(frame, points, colour, name, dashed="owl" in name))
        x, y = frame.at(*points[-1])
        last = min(y + 3, last - 11)
        marks.append(f'<text class="tick" x="{x + 6:.0f}" y="{last:.0f}" fill="{colour}">{name}</text>')
    drawn = plot(frame, marks, "sparsity", "perplexity", (8, 6), "{:.0f} %".format, lambda y: f"{10**y:.0f}")
    style = (
        "<style>text{font:10px sans-serif}.tick:not([fill]),.label{fill:#555}.grid{stroke:#ddd}"
        ".line{fill:none;stroke-width:1.6}</style><rect width='100%' height='100%' fill='#fff'/>"
    )
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", ">" + style, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="prune and judge")
    command.set_defaults(run=run)
    command.add_argument("model", type=Path, help="the dense model")
    command.add_argument("--text", type=Path, required=True, help="folder of heldout, calibration and tuning.txt")
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--only", default="", metavar="REGEX", help="of keys, METHOD @ LEVEL")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--seconds", type=float, default=1e9, help="begin no case after so long")
    command = commands.add_parser("table", help="Markdown of results, and a plot")
    command.set_defaults(run=table)
    command.add_argument("results", type=Path, nargs="+")
    command.add_argument("--speeds", type=Path, default=SPEEDS, help="what `bench model` measured of the 27B")
    command.add_argument("--plot", type=Path, help="an SVG file to write")
    command.add_argument("--page", type=Path, help="a Markdown file to write the tables into, between its markers")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
