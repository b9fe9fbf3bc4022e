"""The quality study: what pruning costs a model, by method and sparsity, and what fine-tuning brings back.

    python quality_study.py run study --text text --results results.json --device cuda
    python quality_study.py table results.json --plot ../docs/quality.svg

`study` and `text` are what train_study.py wrote. Every case prunes the dense model by `tvm_sparse.prune` and judges the
result on the held-out pages: windows of 512 tokens from an empty cache, float32, as `tvm_sparse.evaluate` does it, in
batches. What `results.json` has already is not done again; several files, of runs with different `--only`, make
one table.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where tvm_sparse is not installed

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
    "magnitude, tuned": "--prune magnitude --finetune 300",
    "admm, follow, tuned": "--prune admm --follow 0.5 --finetune 300",
}
CALIBRATE = "--samples 512 --length 512 --seed 0"
TUNE = "--finetune-batch 64 --finetune-rate 1e-3"
# beside the table: one thing changed at a time
SIDE = {
    **{f"sparsegpt, {n} samples": f"--prune sparsegpt --samples {n}" for n in (16, 64)},
    **{
        f"tuned, rate {rate:g}, hidden {hidden:g}":
        f"--prune magnitude --finetune 150 --finetune-rate {rate} --finetune-hidden {hidden}"
        for rate, hidden in ((3e-4, 0), (1e-3, 0), (2e-3, 0), (4e-3, 0), (1e-3, 1), (2e-3, 1))
    },
}  # fmt: skip
WINDOW, BATCH, TOKENS = 512, 16, 60_000


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
    save(results, "dense @ 0", judge(dense, dense, windows) | machine(options.device), options.results)
    for key, argv in cases():
        if key in results or not re.search(options.only, key):
            continue
        if time.monotonic() - began > options.seconds:
            print("out of time: the same command goes on")
            break
        save(results, key, one(options, argv, dense, windows), options.results)


def one(options: argparse.Namespace, argv: list[str], dense: Any, windows: torch.Tensor) -> dict[str, Any]:
    text = ["--text", str(options.text / "calibration.txt")]
    if "--finetune" in argv:
        text += ["--finetune-text", str(options.text / "tuning.txt")]
    began, folder = time.monotonic(), Path(tempfile.mkdtemp())
    try:
        request = parse_prune(
            [*argv, *text, "--model", str(options.model), "--device", options.device, "--out", str(folder / "out")]
        )
        with (folder / "log").open("w") as log, redirect_stderr(log):
            summary = prune(request)
        took = time.monotonic() - began
        pruned = load(folder / "out", torch.device(options.device)).eval()
        found = judge(pruned, dense, windows)
    finally:
        shutil.rmtree(folder)
    facts = {"argv": " ".join(argv), "sparsity": summary["total"]["sparsity"], "prune_seconds": round(took, 1)}
    return found | facts | {"finetune": summary.get("finetune")} | machine(options.device)


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
          f"{found['same_top']:.2%}  {found.get('prune_seconds', 0):5.1f} s", flush=True)  # fmt: skip


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
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
