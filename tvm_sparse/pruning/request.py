"""What the user asked `prune` for: parsed once, frozen; what contradicts itself is refused here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_sparse.command_line import CommandParser
from tvm_sparse.errors import Refusal
from tvm_sparse.pruning.allocation import OWL_REACH, OWL_THRESHOLD
from tvm_sparse.pruning.pattern import Pattern, parse_pattern
from tvm_sparse.pruning.teaching import Budget, Finetune

# What each method compares; the first is its default. Blocks are of 128 columns, all rows.
GRANULARITIES = {
    "magnitude": ("matrix", "row", "global"),
    "wanda": ("row", "matrix"),
    "sparsegpt": ("block",),
    "admm": ("matrix", "row"),
    "none": ("matrix",),  # the zeros that are there
}
UPDATING = ("sparsegpt", "admm")
SAMPLES, LENGTH = 128, 2048


@dataclass(frozen=True)
class PruneRequest:
    """One pruned checkpoint. `text` is None where nothing is calibrated."""

    model: str
    sparsity: float
    method: str
    granularity: str
    pattern: Pattern
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    text: str | None
    samples: int
    length: int
    seed: int
    allocation: str
    owl_threshold: float
    owl_reach: float
    follow: float
    finetune: Finetune | None
    device: str
    out: Path

    def to_json(self) -> dict[str, Any]:
        """What the new values depend on, beside the model and the text."""
        facts: dict[str, Any] = {
            "method": self.method,
            "sparsity": self.sparsity if self.method != "none" else None,
            "granularity": self.granularity if self.pattern.kind == "unstructured" else "pattern",
            "pattern": str(self.pattern),
            "allocation": self.allocation,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        if self.allocation == "owl":
            facts |= {"owl_threshold": self.owl_threshold, "owl_reach": self.owl_reach}
        if self.follow:
            facts["follow"] = self.follow
        if self.finetune:
            facts["finetune"] = self.finetune.to_json()
        return facts


def parse_prune(argv: Sequence[str]) -> PruneRequest:
    """argv -> PruneRequest. Raises Refusal for whatever can be known to be wrong before any work."""
    parser = CommandParser("prune", "Make zeros in a checkpoint: the same files, with other values.")
    add = parser.add_argument
    add("--model", required=True, help="local folder, hub id or registered name")
    add("--sparsity", type=float, help="share of zeros in the pruned matrices, in [0, 1)")
    add("--prune", default="wanda", choices=tuple(GRANULARITIES), help="the method; none: pruned already")
    add("--granularity", choices=("matrix", "row", "global"), help="what weights are compared in "
        "(default: matrix; wanda row; sparsegpt has its own blocks)")  # fmt: skip
    add("--pattern", default="unstructured", help="unstructured, N:M or block:RxC")
    add("--include", action="append", default=[], metavar="REGEX", help="prune these checkpoint names too")
    add("--exclude", action="append", default=[], metavar="REGEX", help="do not prune these; wins over --include")
    add("--text", help="calibration text: a file (text, or JSON lines with a text each), or OWNER/DATASET/FILE")
    add("--samples", type=int, default=SAMPLES, help="calibration sequences")
    add("--length", type=int, default=LENGTH, help="tokens in each")
    add("--seed", type=int, default=0, help="of the choice of sequences")
    add("--allocation", default="uniform", choices=("uniform", "owl"), help="owl: layers with more outliers keep more")
    add("--owl-threshold", type=float, default=OWL_THRESHOLD, help="an outlier is over so many times the mean")
    add("--owl-reach", type=float, default=OWL_REACH, help="how far layers may differ from the mean sparsity")
    add("--follow", type=float, default=0.0, metavar="SHARE", help="sparsegpt and admm: by what "
        "share new weights make up for inputs that are not the dense model's any more; 0.5 is good")  # fmt: skip
    add("--finetune", metavar="BUDGET", help="afterwards train what stays to answer as the dense model does: so many "
        "steps (500), or so long (90s, 10m, 2h)")  # fmt: skip
    add("--finetune-text", metavar="TEXT", help="text to train on (default: --text)")
    add("--finetune-batch", type=int, default=16, help="sequences of --length tokens in a step")
    add("--finetune-rate", type=float, default=1e-3, help="highest learning rate")
    add("--finetune-by", default="model", choices=("model", "layer"), help="the whole model at a time, or one layer "
        "on --samples sequences, in the memory of a layer")  # fmt: skip
    add("--finetune-hidden", type=float, default=0.0, metavar="WEIGHT", help="of hidden states in the loss")
    add("--teacher", help="the dense model to learn from (default: --model, before it is pruned)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--out", type=Path, required=True, help="the new checkpoint")
    args = parser.parse_args(argv)

    finetune = _finetune(args)
    if args.prune == "none":
        if args.sparsity is not None or args.pattern != "unstructured" or args.allocation != "uniform":
            raise Refusal(
                "--prune none takes the zeros that are there: leave --sparsity, --pattern and --allocation out"
            )
        args.sparsity = 0.0
    if args.sparsity is None:
        raise Refusal("--sparsity is missing: 0.75 makes three weights of four zero")
    if not 0 <= args.sparsity < 1:
        raise Refusal(f"--sparsity {args.sparsity:g} is outside [0, 1): 0.75 makes three weights of four zero")
    for flag in ("samples", "length"):
        if getattr(args, flag) < 1:
            raise Refusal(f"--{flag} {getattr(args, flag)} must be at least 1")
    if args.owl_threshold <= 0 or not 0 < args.owl_reach < 1:
        raise Refusal("--owl-threshold must be over 0, --owl-reach between 0 and 1: the paper has 5 and 0.08")
    if not 0 <= args.follow <= 1:
        raise Refusal(f"--follow {args.follow:g} is outside [0, 1]: 0.5 is good")
    if args.follow and args.prune not in UPDATING:
        raise Refusal(f"--follow does not go with --prune {args.prune}, which changes no weight that stays: choose "
                      f"{' or '.join(UPDATING)}")  # fmt: skip
    pattern = parse_pattern(args.pattern, args.sparsity)
    _check_method(args.prune, args.granularity, pattern, args.allocation)
    if args.text is None and needs_text(args.prune, args.allocation):
        what = f"--prune {args.prune}" if args.prune != "magnitude" else "--allocation owl"
        raise Refusal(f"{what} calibrates on a text: pass --text FILE (not the text you judge on), or --prune "
                      "magnitude with --allocation uniform")  # fmt: skip
    return PruneRequest(
        model=args.model,
        sparsity=args.sparsity,
        method=args.prune,
        granularity=args.granularity or GRANULARITIES[args.prune][0],
        pattern=pattern,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        text=args.text,
        samples=args.samples,
        length=args.length,
        seed=args.seed,
        allocation=args.allocation,
        owl_threshold=args.owl_threshold,
        owl_reach=args.owl_reach,
        follow=args.follow,
        finetune=finetune,
        device=_device(args.device) if needs_text(args.prune, args.allocation) or finetune else "cpu",
        out=args.out,
    )


def needs_text(method: str, allocation: str) -> bool:
    return method not in ("magnitude", "none") or allocation == "owl"


def _finetune(args: Any) -> Finetune | None:
    if args.finetune is None:
        if args.prune == "none":
            raise Refusal("--prune none leaves nothing to do without --finetune BUDGET")
        if args.teacher is not None or args.finetune_text is not None:
            given = "--teacher" if args.teacher is not None else "--finetune-text"
            raise Refusal(f"{given} is for fine-tuning: pass --finetune BUDGET too")
        return None
    text = args.finetune_text or args.text
    if text is None:
        raise Refusal("--finetune trains on a text: pass --finetune-text FILE (not the text you judge on)")
    if args.prune == "none" and args.teacher is None:
        raise Refusal("--prune none --finetune needs the dense model to learn from: pass --teacher DENSE")
    if args.finetune_batch < 1:
        raise Refusal(f"--finetune-batch {args.finetune_batch} must be at least 1")
    if not 0 < args.finetune_rate < 1 or not 0 <= args.finetune_hidden < float("inf"):
        raise Refusal("--finetune-rate must be between 0 and 1, --finetune-hidden not under 0")
    if args.finetune_by == "layer" and args.finetune_hidden:
        raise Refusal("--finetune-hidden does not go with --finetune-by layer, whose loss is all of hidden states")
    return Finetune(
        budget=_budget(args.finetune),
        by=args.finetune_by,
        text=text,
        batch=args.finetune_batch,
        length=args.length,
        rate=args.finetune_rate,
        hidden=args.finetune_hidden,
        seed=args.seed,
        teacher=args.teacher,
    )


def _budget(text: str) -> Budget:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or float(found[1]) <= 0 or (not found[2] and "." in found[1]):
        raise Refusal(f"--finetune {text} is no budget: give steps (500) or a time (90s, 10m, 2h)")
    if not found[2]:
        return Budget(steps=int(found[1]))
    return Budget(seconds=float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])


def _check_method(method: str, granularity: str | None, pattern: Pattern, allocation: str) -> None:
    if granularity is not None and granularity not in GRANULARITIES[method]:
        choices = " or ".join(GRANULARITIES[method])
        also = ", leave --granularity out" if method == "sparsegpt" else ""
        raise Refusal(f"--granularity {granularity} does not go with --prune {method}: it compares by {choices}{also}")
    if granularity is not None and pattern.kind != "unstructured":
        raise Refusal(f"--granularity {granularity} does not go with --pattern {pattern}: choose one of them")
    if pattern.kind == "block" and method in ("sparsegpt", "admm"):
        raise Refusal(f"--prune {method} makes no whole blocks: choose wanda or magnitude for --pattern {pattern}")
    if allocation == "owl" and (pattern.kind == "n:m" or granularity == "global"):
        other = f"--pattern {pattern}" if pattern.kind == "n:m" else "--granularity global"
        raise Refusal(f"--allocation owl does not go with {other}, which fixes the shares itself: choose one of them")


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refusal(f"--device {name!r} is not known: choose cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise Refusal(f"--device {name} is not supported: choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refusal(f"--device {name} is not in this machine: pass --device cpu")
    return name
